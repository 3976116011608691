"""The job types: their parameters (pure) and the code that runs on the GPU."""
