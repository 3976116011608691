"""What Prefect finds through the entry point `prefect.collections`: the worker of type `runpod`."""

from __future__ import annotations

from openweights_prefect.worker.worker import RunPodWorker

__all__ = ["RunPodWorker"]
