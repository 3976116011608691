"""Which waiting run goes to which pod, and what must be bought: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HINT_SECONDS = 10.0
"""For so long a hinted pod is expected to claim its run before others may."""


@dataclass(frozen=True)
class WaitingRun:
    """A pending attempt; `run_id` is None until its flow run exists."""

    job_id: str
    run_id: str | None
    attempt: int
    model: str | None
    docker_image: str
    requires_vram_gb: int
    allowed_hardware: tuple[str, ...] | None
    max_price_per_hour: float | None
    hinted_worker_id: str | None
    hinted_seconds_ago: float | None

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> WaitingRun:
        """Read a row of `control_snapshot`."""
        allowed = row["allowed_hardware"]
        return cls(
            job_id=row["job_id"],
            run_id=row["run_id"],
            attempt=row["attempt"],
            model=row["model"],
            docker_image=row["docker_image"],
            requires_vram_gb=row["requires_vram_gb"],
            allowed_hardware=None if allowed is None else tuple(allowed),
            max_price_per_hour=row["max_price_per_hour"],
            hinted_worker_id=row["hinted_worker_id"],
            hinted_seconds_ago=row["hinted_seconds_ago"],
        )

    @property
    def freshly_hinted(self) -> bool:
        """A pod was pointed at it a moment ago."""
        return self.hinted_seconds_ago is not None and self.hinted_seconds_ago < HINT_SECONDS


@dataclass(frozen=True)
class Pod:
    """A pod that is not terminated."""

    id: str
    pod_id: str | None
    status: str
    docker_image: str
    hardware: str
    vram_gb: int
    price_per_hour: float
    cached_models: tuple[str, ...]
    run_id: str | None
    shutdown_requested: bool
    age_seconds: float
    overdue_seconds: float

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Pod:
        """Read a row of `control_snapshot`."""
        return cls(
            id=row["id"],
            pod_id=row["pod_id"],
            status=row["status"],
            docker_image=row["docker_image"],
            hardware=row["hardware"],
            vram_gb=row["vram_gb"],
            price_per_hour=float(row["price_per_hour"]),
            cached_models=tuple(row["cached_models"]),
            run_id=row["run_id"],
            shutdown_requested=row["shutdown_requested"],
            age_seconds=float(row["age_seconds"]),
            overdue_seconds=float(row["overdue_seconds"]),
        )


@dataclass
class Plan:
    """What one pass decided."""

    hints: dict[str, str] = field(default_factory=dict)
    """Run id -> worker id."""
    purchases: list[WaitingRun] = field(default_factory=list)
    """Runs that need a new pod each."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Job id -> why it waits."""


def fits(run: WaitingRun, pod: Pod) -> bool:
    """True when the pod may execute the run; the ledger's `open_run` checks the same."""
    if pod.docker_image != run.docker_image:
        return False
    if run.max_price_per_hour is not None and pod.price_per_hour > run.max_price_per_hour:
        return False
    if run.allowed_hardware is not None:
        return pod.hardware in run.allowed_hardware
    return run.requires_vram_gb <= pod.vram_gb


def place(waiting: Sequence[WaitingRun], pods: Sequence[Pod], *, being_bought: int, max_workers: int) -> Plan:
    """Point runs, in the order given, at idle pods; count starting pods; buy the rest up to the limit.

    `being_bought` pods are on their way to a row in the ledger and count against the limit too.
    """
    plan = Plan()
    reserved = {run.hinted_worker_id for run in waiting if run.freshly_hinted}
    idle = [
        pod for pod in pods if pod.status == "active" and pod.run_id is None and not pod.shutdown_requested
    ]
    idle = [pod for pod in idle if pod.id not in reserved]
    starting = [pod for pod in pods if pod.status == "starting"]
    room = max_workers - len(pods) - being_bought
    for run in waiting:
        if run.run_id is None or run.freshly_hinted:
            continue
        pod = min(
            (pod for pod in idle if fits(run, pod)), key=lambda pod: _preference(run, pod), default=None
        )
        if pod is not None:
            idle.remove(pod)
            plan.hints[run.run_id] = pod.id
            continue
        pod = next((pod for pod in starting if fits(run, pod)), None)
        if pod is not None:
            starting.remove(pod)
            plan.reasons[run.job_id] = f"pod {pod.id} ({pod.hardware}) is starting"
        elif room > 0:
            room -= 1
            plan.purchases.append(run)
        else:
            plan.reasons[run.job_id] = f"pod limit: all {max_workers} pods of the organization are in use"
    return plan


def _preference(run: WaitingRun, pod: Pod) -> tuple[bool, float]:
    """The model on its disk first, then the cheapest."""
    return run.model not in pod.cached_models, pod.price_per_hour
