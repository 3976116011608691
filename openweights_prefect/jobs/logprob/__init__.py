"""Log-probabilities of a dataset under a model."""
