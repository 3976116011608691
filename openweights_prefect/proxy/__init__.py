"""Stands between pods and a shared Prefect server: a pod reaches its own flow runs, and nothing else."""
