"""Prefect: deployments, flow runs, states, artifacts, cache policy."""
