"""The simulator's pods."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from openweights_prefect.simulator.bills import Charge

Owner = Literal["client", "foreign"]


class Phase(StrEnum):
    """Where a pod is; by default the outside sees RUNNING in all phases but the last three."""

    ALLOCATING = "allocating"  # -> PULLING; -> ERRORED
    PULLING = "pulling"  # -> CREATING; -> STOPPED when the image cannot be had
    CREATING = "creating"  # -> UP; -> BACKOFF when the command cannot be executed; -> STUCK
    UP = "up"  # -> BACKOFF when the container exits
    BACKOFF = "backoff"  # -> CREATING
    STUCK = "stuck"  # no container ever, and billed all the time
    STOPPED = "stopped"  # EXITED; -> CREATING by `start`; -> TERMINATED
    ERRORED = "errored"  # ERROR; -> CREATING by `start`; -> TERMINATED
    TERMINATED = "terminated"  # listed for a while, then gone


ENDED = (Phase.STOPPED, Phase.ERRORED, Phase.TERMINATED)
"""Without cards and without a bill for them."""


@dataclass(frozen=True)
class Rental:
    """What a valid create request asks for."""

    name: str
    image: str
    gpu_id: str
    gpu_count: int
    cloud: str
    disk: int
    args: str = ""
    env: dict[str, str] = field(default_factory=dict, repr=False)
    ports: list[str] = field(default_factory=list)
    registry: str | None = None
    min_cuda: str | None = None
    allowed_cuda: list[str] = field(default_factory=list)
    min_vcpu_per_gpu: int = 0
    min_ram_per_gpu: int = 0
    data_centers: list[str] = field(default_factory=list)


@dataclass
class Pod:
    """A rented pod, as it is kept in the state file."""

    id: str
    number: int
    """The how manieth of this simulator."""
    account: str
    owner: Owner
    name: str
    image: str
    args: str
    env: dict[str, str] = field(repr=False)
    disk: int
    ports: list[str]
    registry: str | None
    gpu_id: str
    gpu_count: int
    vcpu: int
    ram_gb: int
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
    bill: list[Charge] = field(default_factory=list)
    billed_until: float | None = None
    """Set when the pod stops costing money."""
    public_ports: dict[str, int] = field(default_factory=dict)
    """Container port to the port at which the host forwards it; drawn anew at every start."""
    untold_since: float | None = None
    """Nobody has been told of this pod, from creation until it shows in an answer."""
    orphan_seconds: float = 0.0
    """How long nobody was told of it, or it was the second one of a duplicated create."""
    duplicate: bool = False
    ailments: dict[str, float | None] = field(default_factory=dict)
    """Faults that last, with the moment of their end; None: for ever."""
    gpus_missing: int = 0
    ecc_errors: int = 0
    file_bytes: int | None = None
    """The largest file that its processes can write, while its disk is full."""

    @property
    def holds_gpus(self) -> bool:
        """Its cards cannot be given to another pod."""
        return self.phase not in ENDED

    def has(self, ailment: str, now: float) -> bool:
        """Whether a lasting fault is upon it."""
        return ailment in self.ailments and (self.ailments[ailment] or float("inf")) > now

    def to_json(self) -> dict[str, Any]:
        """For the state file."""
        # Not `asdict`, whose deep copy was half of the time of a busy simulator.
        return {**vars(self), "bill": [vars(charge) for charge in self.bill]}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Pod:
        """From the state file."""
        charges = [Charge(**charge) for charge in document["bill"]]
        return cls(**{**document, "phase": Phase(document["phase"]), "bill": charges})


def iso(moment: float) -> str:
    """Epoch seconds in the notation of the API."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def pod_facts(pod: Pod) -> dict[str, str]:
    """What a fault rule can be matched with."""
    return {
        "name": pod.name,
        "gpu": pod.gpu_id,
        "cloud": pod.cloud,
        "image": pod.image,
        "podId": pod.id,
        "host": pod.host,
        "dc": pod.data_center or "",
    }
