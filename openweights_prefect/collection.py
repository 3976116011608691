"""What Prefect finds through the entry point `prefect.collections`: the worker type and the block types."""

from __future__ import annotations

from openweights_prefect.credentials import (
    HuggingFaceCredentials,
    OpenWeightsOrganization,
    RunPodCredentials,
    SupabaseCredentials,
    SupabaseStorage,
)
from openweights_prefect.worker.worker import RunPodWorker

__all__ = [
    "HuggingFaceCredentials",
    "OpenWeightsOrganization",
    "RunPodCredentials",
    "RunPodWorker",
    "SupabaseCredentials",
    "SupabaseStorage",
]
