"""Fine-tuning jobs: their parameters."""
