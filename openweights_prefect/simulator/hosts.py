"""The machines: two secure hosts and one community host for every GPU type that is sold there."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openweights_prefect.provisioning.hardware import Gpu, Tier, catalogue, gpu_by_id
from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.faults import Faults
from openweights_prefect.simulator.model import Pod, Rental

_SECURE_PLACES = (("US-KS-2", "12.8"), ("EU-RO-1", "13.0"))
_COMMUNITY_CUDA = "12.8"
_SAME_CUDA = {"RTX PRO": "13.0", "NVIDIA RTX A6000": "12.8"}
"""Types whose secure hosts all had one version, by a part of the id."""
_PLACEHOLDER_PRICE = 0.5
"""What RunPod quotes where a type is not sold."""
_ELSEWHERE = "foreignhost0"
"""Where the foreign pods are: no machine of the inventory."""

_SENTINEL = Gpu("unknown", "unknown", (), 0, automatic=False, mig=False, secure=None, community=None)
"""RunPod's catalogue holds this entry too."""


@dataclass
class Host:
    """A machine with cards of one type."""

    id: str
    gpu_id: str
    cloud: str
    data_center: str | None
    gpu_total: int
    cuda: str
    vcpu_per_gpu: int = 8
    ram_gb_per_gpu: int = 32
    disk_gb: int = 2000
    offline: bool = False


class Inventory:
    """All hosts; what is free follows from the pods that are on them."""

    def __init__(self, config: SimulatorConfig, *, seed: int) -> None:
        self.hosts: dict[str, Host] = {}
        self._config = config
        self._random = random.Random(f"{seed}:placement")
        self._free_at_most: dict[tuple[str, str, str], int] = {}
        for gpu in catalogue():
            for fields in _hosts_of(gpu):
                self.add(gpu_id=gpu.id, **fields)

    def add(self, **fields: Any) -> Host:
        """Put up another machine; raises `TypeError` for a field that a host does not have."""
        number = len(self.hosts)
        sizes = {"vcpu_per_gpu": self._config.vcpu_per_gpu, "ram_gb_per_gpu": self._config.ram_gb_per_gpu}
        host = Host(**{"id": f"host{number:08x}", **sizes, **fields})
        self.hosts[host.id] = host
        return host

    def limit(self, *, gpu: str, cloud: str, dc: str, free: int | None) -> None:
        """Let at most so many cards of a kind be rented from now on; None lifts it, `*` means all."""
        key = (gpu, cloud, dc)
        if free is None:
            self._free_at_most.pop(key, None)
        else:
            self._free_at_most[key] = free

    def place(self, pods: Iterable[Pod], rental: Rental) -> Host | None:
        """A host with room: the same one every time, or any by chance; None if there is none."""
        free = self._free(pods)
        fitting = [host for host in self.hosts.values() if _fits(host, rental, free[host.id])]
        if not fitting:
            return None
        return self._random.choice(fitting) if self._config.placement == "random" else fitting[0]

    def lacks_disk_only(self, pods: Iterable[Pod], rental: Rental) -> bool:
        """Whether there would be room if only the disk were smaller."""
        free = self._free(pods)
        return any(_fits(host, rental, free[host.id], any_disk=True) for host in self.hosts.values())

    def free_gpus(self, host_id: str, pods: Iterable[Pod]) -> int:
        """Cards of one host that nobody has."""
        return self._free(pods).get(host_id, 0)

    def catalogue_body(
        self, pods: Iterable[Pod], *, cloud: str, count: int, availability: bool, faults: Faults
    ) -> dict[str, Any]:
        """The answer of `GET /v2/catalog/gpus`."""
        free = self._free(pods)
        entries: list[dict[str, Any]] = [_entry(_SENTINEL)]
        for gpu in catalogue():
            entry = _entry(gpu)
            mine = [h for h in self.hosts.values() if (h.gpu_id, h.cloud) == (gpu.id, cloud)]
            entry["cudaVersions"] = [
                {"version": v, "available": True} for v in sorted({h.cuda for h in mine})
            ]
            if availability:
                able = [host for host in mine if host.gpu_total >= count and not host.offline]
                level = _level(sum(free[h.id] for h in able if free[h.id] >= count), able)
                facts = {"op": "catalog", "gpu": gpu.id, "cloud": cloud}
                lie = faults.take("catalog", facts)
                entry["availability"] = level if lie is None else str(lie.params.get("level", "HIGH"))
                entry["dataCenters"] = [
                    {"id": h.data_center, "name": h.data_center, "availability": _level(free[h.id], [h])}
                    for h in able
                    if h.data_center
                ]
            entries.append(entry)
        return {"gpus": entries}

    def stock(self, pods: Iterable[Pod], gpu_id: str, cloud: str, count: int) -> str:
        """Availability of one type."""
        free = self._free(pods)
        mine = [h for h in self.hosts.values() if (h.gpu_id, h.cloud) == (gpu_id, cloud) and not h.offline]
        return _level(sum(free[h.id] for h in mine if free[h.id] >= count), mine)

    def _free(self, pods: Iterable[Pod]) -> dict[str, int]:
        free = {host.id: 0 if host.offline else host.gpu_total for host in self.hosts.values()}
        for pod in pods:
            if pod.holds_gpus and pod.host in free:
                free[pod.host] -= pod.gpu_count
        for (gpu, cloud, place), left in self._free_at_most.items():
            for host in self.hosts.values():
                same = gpu in ("*", host.gpu_id) and cloud in ("*", host.cloud)
                if same and place in ("*", host.data_center or ""):
                    taken = max(0, min(free[host.id], left))
                    free[host.id], left = taken, left - taken
        return free


def price_per_hour(gpu_id: str, cloud: str) -> float:
    """USD for one card."""
    gpu = gpu_by_id(gpu_id)
    tier = None if gpu is None else tier_of(gpu, cloud)
    return tier.price_per_hour if tier else _PLACEHOLDER_PRICE


def tier_of(gpu: Gpu, cloud: str) -> Tier | None:
    """What a cloud asks for a type; None where it is not sold."""
    return gpu.secure if cloud == "SECURE" else gpu.community


def elsewhere(gpu_id: str) -> Host:
    """The machine of the foreign pods."""
    return Host(_ELSEWHERE, gpu_id, "SECURE", "US-KS-2", 8, "12.8")


def fingerprint(host_id: str) -> str:
    """What a pod's ssh name tells of its host: `6441` and four digits."""
    return f"6441{host_id[-4:]}"


def _fits(host: Host, rental: Rental, free: int, *, any_disk: bool = False) -> bool:
    if (host.gpu_id, host.cloud) != (rental.gpu_id, rental.cloud) or host.offline:
        return False
    if free < rental.gpu_count or (rental.data_centers and host.data_center not in rental.data_centers):
        return False
    if rental.allowed_cuda and host.cuda not in rental.allowed_cuda:
        return False
    if version(host.cuda) < version(rental.min_cuda or "0"):
        return False
    if host.vcpu_per_gpu < rental.min_vcpu_per_gpu or host.ram_gb_per_gpu < rental.min_ram_per_gpu:
        return False
    return any_disk or rental.disk <= host.disk_gb


def version(text: str) -> tuple[int, ...]:
    """A CUDA version as numbers, so that 12.11 is above 12.2."""
    return tuple(int(part) for part in text.split("."))


def _hosts_of(gpu: Gpu) -> Iterable[dict[str, Any]]:
    same = next((cuda for part, cuda in _SAME_CUDA.items() if part in gpu.id), None)
    if gpu.secure and gpu.secure.max_count:
        for place, cuda in _SECURE_PLACES:
            total = gpu.secure.max_count
            yield {"cloud": "SECURE", "data_center": place, "gpu_total": total, "cuda": same or cuda}
    if gpu.community and gpu.community.max_count:
        total = gpu.community.max_count
        cuda = same or _COMMUNITY_CUDA
        yield {"cloud": "COMMUNITY", "data_center": None, "gpu_total": total, "cuda": cuda}


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
    if free <= 0 or not total:
        return "NONE"
    share = free / total
    if share <= 0.25:
        return "LOW"
    return "MEDIUM" if share <= 0.6 else "HIGH"
