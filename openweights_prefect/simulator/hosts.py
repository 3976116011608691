"""The machines: two secure hosts and one community host for every GPU type that is sold there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openweights_prefect.provisioning.hardware import Gpu, Tier, catalogue, gpu_by_id
from openweights_prefect.simulator.model import Pod

_SECURE_PLACES = (("US-KS-2", "12.8"), ("EU-RO-1", "13.0"))
_COMMUNITY_CUDA = "12.8"
_PLACEHOLDER_PRICE = 0.5
"""What RunPod quotes where a type is not sold."""

_SENTINEL = Gpu("unknown", "unknown", (), 0, automatic=False, mig=False, secure=None, community=None)
"""RunPod's catalogue holds this entry too."""


@dataclass(frozen=True)
class Host:
    """A machine with cards of one type."""

    id: str
    gpu_id: str
    cloud: str
    data_center: str | None
    gpu_total: int
    cuda: str


class Inventory:
    """All hosts; what is free follows from the pods that are on them."""

    def __init__(self) -> None:
        self._hosts = [host for index, gpu in enumerate(catalogue()) for host in _hosts_of(index, gpu)]

    def place(
        self,
        pods: Iterable[Pod],
        *,
        gpu_id: str,
        count: int,
        cloud: str,
        min_cuda: str | None,
        data_centers: list[str],
    ) -> Host | None:
        """The first host with room, the same one every time; None if there is none."""
        free = self._free(pods)
        for host in self._hosts:
            fits = (host.gpu_id, host.cloud) == (gpu_id, cloud) and free[host.id] >= count
            placed = not data_centers or host.data_center in data_centers
            if fits and placed and _version(host.cuda) >= _version(min_cuda or "0"):
                return host
        return None

    def catalogue_body(
        self, pods: Iterable[Pod], *, cloud: str, count: int, availability: bool
    ) -> dict[str, Any]:
        """The answer of `GET /v2/catalog/gpus`."""
        free = self._free(pods)
        entries: list[dict[str, Any]] = [_entry(_SENTINEL)]
        for gpu in catalogue():
            entry = _entry(gpu)
            if availability:
                hosts = [
                    h for h in self._hosts if (h.gpu_id, h.cloud) == (gpu.id, cloud) and h.gpu_total >= count
                ]
                entry["availability"] = _level(sum(free[h.id] for h in hosts if free[h.id] >= count), hosts)
            entries.append(entry)
        return {"gpus": entries}

    def _free(self, pods: Iterable[Pod]) -> dict[str, int]:
        free = {host.id: host.gpu_total for host in self._hosts}
        for pod in pods:
            if pod.holds_gpus and pod.host in free:
                free[pod.host] -= pod.gpu_count
        return free


def price_per_hour(gpu_id: str, cloud: str) -> float:
    """USD for one card."""
    gpu = gpu_by_id(gpu_id)
    tier = None if gpu is None else _tier(gpu, cloud)
    return tier.price_per_hour if tier else _PLACEHOLDER_PRICE


def _hosts_of(index: int, gpu: Gpu) -> list[Host]:
    hosts = []
    if gpu.secure and gpu.secure.max_count:
        for number, (place, cuda) in enumerate(_SECURE_PLACES):
            hosts.append(Host(f"s{index:03}{number}", gpu.id, "SECURE", place, gpu.secure.max_count, cuda))
    if gpu.community and gpu.community.max_count:
        hosts.append(
            Host(f"c{index:03}0", gpu.id, "COMMUNITY", None, gpu.community.max_count, _COMMUNITY_CUDA)
        )
    return hosts


def _entry(gpu: Gpu) -> dict[str, Any]:
    tiers = {"secure": gpu.secure, "community": gpu.community}
    return {
        "id": gpu.id,
        "name": gpu.aliases[0] if gpu.aliases else gpu.name,
        "pool": None,
        "manufacturer": "AMD" if gpu.id.startswith("AMD") else "NVIDIA",
        "memory": gpu.memory_gb,
        "secure": gpu.secure is not None,
        "community": gpu.community is not None,
        "price": {
            cloud: tier.price_per_hour if tier else _PLACEHOLDER_PRICE for cloud, tier in tiers.items()
        },
        "maxCount": {cloud: tier.max_count if tier else 0 for cloud, tier in tiers.items()},
        "dataCenters": [],
        "cudaVersions": [],
    }


def _level(free: int, hosts: list[Host]) -> str:
    total = sum(host.gpu_total for host in hosts)
    if not free:
        return "NONE"
    share = free / total
    if share <= 0.25:
        return "LOW"
    return "MEDIUM" if share <= 0.6 else "HIGH"


def _tier(gpu: Gpu, cloud: str) -> Tier | None:
    return gpu.secure if cloud == "SECURE" else gpu.community


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
