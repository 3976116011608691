"""Training in the job environment: rows to tokens, models, trainers, checkpoints and results."""
