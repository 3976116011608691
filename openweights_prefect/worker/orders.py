"""What is ordered for a run: the pod's row in the ledger, and the request to the provider."""

from __future__ import annotations

from typing import Any

from openweights_prefect.provisioning.hardware import usable_vram_gb
from openweights_prefect.provisioning.placement import WaitingRun
from openweights_prefect.provisioning.provider import Offer, PodRequest
from openweights_prefect.settings import Settings

_DISK_GB = 200
_DEARER = 1.25
"""The provider may ask for so many times the price of the catalogue."""


def pod_row(worker_id: str, run: WaitingRun, offer: Offer, settings: Settings) -> dict[str, Any]:
    """The intent, as `intend_pod` takes it."""
    return {
        "id": worker_id,
        "docker_image": run.needs.docker_image,
        "hardware": f"{offer.count}x {offer.gpu_name}",
        "gpu_type": offer.gpu_id,
        "gpu_count": offer.count,
        "vram_gb": usable_vram_gb(offer),
        "cloud": offer.cloud,
        "price_per_hour": offer.price_per_hour,
        "bought_for": run.job_id,
        # What was asked for holds until the machine is known.
        "cuda": _min_cuda(run, settings),
        "vcpu": run.needs.min_vcpu,
        "ram_gb": run.needs.min_ram_gb,
    }


def pod_request(
    worker_id: str, run: WaitingRun, offer: Offer, settings: Settings, *, token: str, deadline_at: float
) -> PodRequest:
    """The one create call; `token` is what the pod trades for its session, once."""
    needs = run.needs
    return PodRequest(
        name=pod_name(settings.organization_id, worker_id),
        image=needs.docker_image,
        gpu_id=offer.gpu_id,
        gpu_count=offer.count,
        cloud=offer.cloud,
        disk_gb=_DISK_GB,
        min_cuda=_min_cuda(run, settings),
        min_vcpu_per_gpu=_per_card(needs.min_vcpu, offer),
        min_ram_gb_per_gpu=_per_card(needs.min_ram_gb, offer),
        price_ceiling=min(offer.price_per_hour * _DEARER, needs.max_price_per_hour or float("inf")),
        env={
            "OW_POD_ID": worker_id,
            "OW_POD_TOKEN": token,
            "OW_DEADLINE_AT": str(int(deadline_at)),
            "OW_OWNER": settings.organization_id,
            "OW_GPU_COUNT": str(offer.count),
            "OW_GPU_MEMORY_GB": str(offer.memory_gb // offer.count),
            # A pod has no other way to learn what this control plane expects of it.
            "OW_LEASE_SECONDS": str(settings.lease_seconds),
            "OW_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
            "OW_POD_IDLE_SECONDS": str(settings.pod_idle_seconds),
            "OW_CANCEL_GRACE_SECONDS": str(settings.cancel_grace_seconds),
            "OW_CHECKPOINT_GRACE_SECONDS": str(settings.checkpoint_grace_seconds),
            **public_addresses(settings),
        },
    )


def pod_name(organization_id: str, worker_id: str) -> str:
    """The name at the provider: unique, because the ledger's id is."""
    return f"ow-{organization_id[-8:]}-{worker_id}"


def public_addresses(settings: Settings) -> dict[str, str]:
    """Where a pod finds a hosted ledger and what belongs to it.

    A pod of the local stack reads `stack.json`, which knows of no proxy. The provider shows the addresses to
    everybody in its account: never a token, and never a database URL.
    """
    addresses = {"OW_PREFECT_PROXY_URL": settings.prefect_proxy_url}
    if settings.supabase_url:
        addresses |= {
            "SUPABASE_URL": settings.supabase_url,
            "SUPABASE_ANON_KEY": settings.supabase_key,
            "PREFECT_API_URL": settings.prefect_proxy_url or settings.prefect_api_url,
            "OW_FILE_STORE": settings.file_store,
        }
    return {name: value for name, value in addresses.items() if value}


def _min_cuda(run: WaitingRun, settings: Settings) -> str | None:
    return run.needs.min_cuda or settings.min_cuda or None


def _per_card(need: int, offer: Offer) -> int | None:
    return -(-need // offer.count) or None
