"""Pods of an account by their name."""

from __future__ import annotations

from openweights_prefect.provisioning.provider import ProviderPod
from openweights_prefect.provisioning.runpod.client import RunPodClient


async def named(client: RunPodClient, name: str) -> list[ProviderPod]:
    """Those with exactly this name that still exist."""
    return [pod for pod in await client.list() if pod.name == name and pod.status != "TERMINATED"]
