"""The tables of the model ledger: rows as plain objects, with times in seconds of the ledger's clock."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

FINAL = ("completed", "failed", "canceled")


@dataclass
class Job:
    id: str
    created_at: float
    number: int
    created_by: str
    type: str = "custom_job"
    model: str | None = None
    params: Row = field(default_factory=dict)
    mounts: Row = field(default_factory=dict)
    entrypoint: str | None = None
    docker_image: str = ""
    requires_vram_gb: int = 0
    allowed_hardware: list[str] | None = None
    max_price_per_hour: float | None = None
    cloud: str | None = None
    min_cuda: str | None = None
    min_vcpu: int = 0
    min_ram_gb: int = 0
    priority: int = 0
    retries: int = 0
    timeout_seconds: int | None = None
    status: str = "pending"
    attempt: int = 1
    failed_attempts: int = 0
    lost_attempts: int = 0
    cancel_requested: bool = False
    error: str | None = None
    outputs: Row | None = None
    pending_reason: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    needs_class: str = ""

    def __post_init__(self) -> None:
        needs = [
            self.docker_image,
            self.requires_vram_gb,
            self.allowed_hardware,
            self.max_price_per_hour,
            self.cloud,
            self.min_cuda,
            self.min_vcpu,
            self.min_ram_gb,
        ]
        self.needs_class = json.dumps(needs)

    def shown(self) -> Row:
        """The row, as far as anybody in the simulation reads it."""
        names = (
            "id",
            "type",
            "model",
            "entrypoint",
            "status",
            "attempt",
            "failed_attempts",
            "lost_attempts",
            "cancel_requested",
            "error",
            "outputs",
            "pending_reason",
            "timeout_seconds",
            "params",
            "docker_image",
            "priority",
            "retries",
            "created_by",
        )
        return {name: getattr(self, name) for name in names}


@dataclass
class Run:
    id: str
    job: Job
    attempt: int
    created_at: float
    number: int
    status: str = "pending"
    worker_id: str | None = None
    boot: str | None = None
    hinted: str | None = None
    hinted_at: float | None = None
    error: str | None = None
    mirrored: bool = False
    logged_at: float | None = None
    ceiling: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    log_file: str | None = None


@dataclass
class Interval:
    kind: str
    started_at: float
    price: float
    run_id: str | None = None
    ended_at: float | None = None
    duplicate: str | None = None


@dataclass
class Pod:
    id: str
    created_at: float
    number: int
    deadline_at: float
    docker_image: str
    hardware: str
    gpu_type: str
    gpu_count: int
    vram_gb: int
    cloud: str
    price_per_hour: float
    bought_for: str | None = None
    cuda: str | None = None
    vcpu: int = 0
    ram_gb: int = 0
    bootstrap_hash: str = ""
    status: str = "starting"
    pod_id: str | None = None
    host: str | None = None
    session: str | None = None
    proxy_hash: str | None = None
    boot: str | None = None
    boots: int = 0
    run: Run | None = None
    shutdown_requested: bool = False
    cached_models: list[str] = field(default_factory=list)
    reason: str | None = None
    lease_expires_at: float | None = None
    lease_seconds: float = 60.0
    heartbeat_at: float | None = None
    active_at: float | None = None
    idle_since: float | None = None
    terminated_at: float | None = None
    intervals: list[Interval] = field(default_factory=list)

    def shown(self) -> Row:
        """The row, as far as the control plane reads it."""
        names = (
            "id",
            "deadline_at",
            "docker_image",
            "hardware",
            "gpu_type",
            "gpu_count",
            "vram_gb",
            "cloud",
            "price_per_hour",
            "bought_for",
            "cuda",
            "vcpu",
            "ram_gb",
            "status",
            "pod_id",
            "host",
            "boots",
            "boot",
            "shutdown_requested",
            "reason",
            "cached_models",
        )
        return {name: getattr(self, name) for name in names} | {"run_id": self.run.id if self.run else None}


def version(text: str) -> list[int]:
    """`12.8` as numbers."""
    return [int(part) for part in text.split(".")]


def fits(job: Job, pod: Pod) -> bool:
    """True when the pod may run the job."""
    if pod.docker_image != job.docker_image:
        return False
    if job.allowed_hardware is None:
        if job.requires_vram_gb > pod.vram_gb:
            return False
    elif pod.hardware not in job.allowed_hardware:
        return False
    if job.max_price_per_hour is not None and pod.price_per_hour > job.max_price_per_hour:
        return False
    if job.cloud is not None and pod.cloud != job.cloud:
        return False
    if job.min_cuda is not None and (pod.cuda is None or version(pod.cuda) < version(job.min_cuda)):
        return False
    return job.min_vcpu <= pod.vcpu and job.min_ram_gb <= pod.ram_gb
