"""Parameters of weighted fine-tuning jobs."""
