"""The simulator's pods and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Literal

SECONDS_PER_HOUR = 3600
Owner = Literal["client", "foreign"]


class Phase(StrEnum):
    """Where a pod is; the outside sees RUNNING in all phases but the last two."""

    ALLOCATING = "allocating"  # -> PULLING
    PULLING = "pulling"  # -> CREATING; -> STOPPED when the image is missing
    CREATING = "creating"  # -> UP; -> BACKOFF when the command cannot be executed
    UP = "up"  # -> BACKOFF when the container exits
    BACKOFF = "backoff"  # -> CREATING
    STOPPED = "stopped"  # EXITED; -> TERMINATED
    TERMINATED = "terminated"  # listed for a while, then gone


@dataclass
class Pod:
    """A rented pod, as it is kept in the state file."""

    id: str
    account: str
    owner: Owner
    name: str
    image: str
    args: str
    env: dict[str, str] = field(repr=False)
    disk: int
    gpu_id: str
    gpu_count: int
    cloud: str
    host: str
    data_center: str | None
    cuda: str
    price: float
    """USD an hour, fixed at creation."""
    created_at: float
    visible_at: float
    phase: Phase = Phase.ALLOCATING
    attempts: int = 1
    locked: bool = False
    container_started_at: float | None = None
    billed_until: float | None = None
    """Set when the pod stops costing money."""

    @property
    def status(self) -> str:
        """The word of the REST API."""
        return {Phase.STOPPED: "EXITED", Phase.TERMINATED: "TERMINATED"}.get(self.phase, "RUNNING")

    @property
    def holds_gpus(self) -> bool:
        """Its cards cannot be given to another pod."""
        return self.phase not in (Phase.STOPPED, Phase.TERMINATED)

    def cost(self, now: float) -> Decimal:
        """USD so far: billed by the second from rental on."""
        until = now if self.billed_until is None else self.billed_until
        return Decimal(str(self.price)) * Decimal(str(max(0.0, until - self.created_at))) / SECONDS_PER_HOUR

    def to_json(self) -> dict[str, Any]:
        """For the state file."""
        # Not `asdict`, whose deep copy was half of the time of a busy simulator.
        return {**vars(self)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Pod:
        """From the state file."""
        return cls(**{**document, "phase": Phase(document["phase"])})


def pod_body(pod: Pod, now: float) -> dict[str, Any]:
    """The pod as REST v2 shows it."""
    actions = {"RUNNING": ["stop", "restart", "terminate"], "EXITED": ["start", "terminate"]}
    return {
        "id": pod.id,
        "name": pod.name,
        "status": pod.status,
        "actions": actions.get(pod.status, []),
        "image": pod.image,
        "args": pod.args,
        "disk": pod.disk,
        "env": pod.env,
        "ports": [],
        "registry": None,
        "cloud": pod.cloud,
        "dataCenterId": None if pod.phase is Phase.ALLOCATING else pod.data_center,
        "cudaVersion": pod.cuda,
        "mounts": {},
        "gpu": {
            "id": pod.gpu_id,
            "count": pod.gpu_count,
            "vcpuCount": 8 * pod.gpu_count,
            "memory": 32 * pod.gpu_count,
        },
        "ssh": {"proxy": None, "direct": None},
        "template": None,
        "cost": pod.price,
        "locked": pod.locked,
        "globalNetworking": {"enabled": False},
        "runtime": _runtime(pod, now),
        "createdAt": iso(pod.created_at),
        "startedAt": iso(pod.created_at),
    }


def iso(moment: float) -> str:
    """Epoch seconds in the notation of the API."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _runtime(pod: Pod, now: float) -> dict[str, Any] | None:
    if pod.phase is not Phase.UP or pod.container_started_at is None:
        return None
    return {
        "uptime": max(1, int(now - pod.container_started_at)),
        "gpus": [{"util": 0, "memoryUtil": 0} for _ in range(pod.gpu_count)],
        "cpu": {"util": 0},
        "memory": {"util": 1},
        "ports": [{"private": 19123, "public": 60000, "type": "http", "ip": "100.65.0.1"}],
    }
