"""Pods, cards and accounts in the words of RunPod's GraphQL."""

from __future__ import annotations

from typing import Any

from openweights_prefect.provisioning.hardware import Gpu, gpu_by_id
from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.hosts import fingerprint, price_per_hour
from openweights_prefect.simulator.model import ENDED, Phase, Pod, iso
from openweights_prefect.simulator.projection import runtime

_STOCK = {"NONE": None, "LOW": "Low", "MEDIUM": "Medium", "HIGH": "High"}


def pod_view(pod: Pod, now: float, config: SimulatorConfig) -> dict[str, Any]:
    """One pod."""
    desired = {Phase.STOPPED: "EXITED", Phase.ERRORED: "EXITED", Phase.TERMINATED: "TERMINATED"}
    gpu = gpu_by_id(pod.gpu_id)
    return {
        "id": pod.id,
        "name": pod.name,
        "imageName": pod.image,
        "dockerArgs": pod.args,
        "dockerId": None,
        "desiredStatus": desired.get(pod.phase, "RUNNING"),
        "lastStatusChange": "Exited by Runpod" if pod.phase in ENDED else "Rented by User",
        "lastStartedAt": iso(pod.created_at),
        "createdAt": iso(pod.created_at),
        "env": [f"{key}={value}" for key, value in pod.env.items()],
        "ports": ",".join(pod.ports) or None,
        "port": None,
        "podType": "RESERVED",
        "gpuCount": pod.gpu_count,
        "vcpuCount": pod.vcpu,
        "memoryInGb": pod.ram_gb,
        "containerDiskInGb": pod.disk,
        "volumeInGb": 0,
        "volumeMountPath": None,
        "costPerHr": pod.price,
        "uptimeSeconds": 0,  # It is 0 on old pods too.
        "locked": pod.locked,
        "machineId": pod.host,
        "machine": {
            "podHostId": f"{pod.id}-{fingerprint(pod.host)}",
            "gpuDisplayName": gpu.name if gpu else pod.gpu_id,
            "dataCenterId": pod.data_center,
        },
        "runtime": _runtime_view(runtime(pod, now)),
    }


def gpu_view(gpu: Gpu) -> dict[str, Any]:
    """One type of card."""
    counts = [tier.max_count for tier in (gpu.secure, gpu.community) if tier]
    return {
        "id": gpu.id,
        "displayName": gpu.aliases[0] if gpu.aliases else gpu.name,
        "manufacturer": "AMD" if gpu.id.startswith("AMD") else "Nvidia",
        "memoryInGb": gpu.memory_gb,
        "cudaCores": 0,
        "maxGpuCount": max(counts, default=0),
        "secureCloud": gpu.secure is not None,
        "communityCloud": gpu.community is not None,
        "securePrice": price_per_hour(gpu.id, "SECURE"),
        "communityPrice": price_per_hour(gpu.id, "COMMUNITY"),
    }


def price_view(gpu_id: str, cloud: str, stock: str) -> dict[str, Any]:
    """The lowest price of a type in a cloud."""
    return {
        "minimumBidPrice": None,
        "uninterruptablePrice": price_per_hour(gpu_id, cloud),
        "stockStatus": _STOCK[stock],
        "minVcpu": 8,
        "minMemory": 32,
    }


def _runtime_view(told: dict[str, Any] | None) -> dict[str, Any] | None:
    if not told:
        return None
    ports = [
        {
            "ip": port["ip"],
            "isIpPublic": port["type"] == "tcp",
            "privatePort": port["private"],
            "publicPort": port["public"],
            "type": port["type"],
        }
        for port in told["ports"]
    ]
    return {
        "uptimeInSeconds": told["uptime"],
        "ports": ports,
        "gpus": [{"id": None, "gpuUtilPercent": 0, "memoryUtilPercent": 0} for _ in told["gpus"]],
        "container": {"cpuPercent": 0, "memoryPercent": told["memory"]["util"]},
    }
