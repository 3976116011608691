"""The Prefect worker of type `runpod`."""
