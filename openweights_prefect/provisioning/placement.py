"""Which waiting run goes to which pod, and what must be bought: pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from openweights_prefect.provisioning.provider import offer_key
from openweights_prefect.types.hardware import Needs

HINT_SECONDS = 10.0
"""For so long a hinted pod is expected to claim its run before others may."""


@dataclass(frozen=True, kw_only=True)
class WaitingRun:
    """A pending attempt."""

    job_id: str
    run_id: str | None
    """None until its flow run exists."""
    attempt: int
    model: str | None
    needs_class: str
    """Runs of one class fit the same pods."""
    needs: Needs
    hinted_worker_id: str | None = None
    hinted_seconds_ago: float | None = None
    ceiling_per_hour: float | None = None
    """A warm pod that is dearer is not worth it."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> WaitingRun:
        """Read a row of `control_snapshot`."""
        return cls(
            job_id=row["job_id"],
            run_id=row["run_id"],
            attempt=row["attempt"],
            model=row["model"],
            needs_class=row["needs_class"],
            needs=Needs.from_row(row),
            hinted_worker_id=row["hinted_worker_id"],
            hinted_seconds_ago=row["hinted_seconds_ago"],
            ceiling_per_hour=row["ceiling_per_hour"],
        )

    @property
    def freshly_hinted(self) -> bool:
        """A pod was pointed at it a moment ago."""
        return self.hinted_seconds_ago is not None and self.hinted_seconds_ago < HINT_SECONDS


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod that is not terminated. Ages are in seconds; None where there is nothing to count from."""

    id: str
    pod_id: str | None
    """The provider's id; None until it is known."""
    status: str
    docker_image: str
    hardware: str
    price_per_hour: float
    cached_models: tuple[str, ...] = ()
    run_id: str | None = None
    offer_key: str = ""
    """The offer that it was bought as; see `Offer.key`."""
    bought_for: str | None = None
    """The job that made it necessary."""
    host: str | None = None
    reason: str | None = None
    """Why it is to end."""
    shutdown_requested: bool = False
    age_seconds: float = 0.0
    overdue_seconds: float = float("-inf")
    """Since its deadline; negative before."""
    silent_seconds: float | None = None
    """Since its lease ran out, without output of its run either; negative while it counts as alive."""
    heartbeat_seconds: float | None = None
    """Since its last heartbeat."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Pod:
        """Read a row of `control_snapshot`."""
        return cls(
            id=row["id"],
            pod_id=row["pod_id"],
            status=row["status"],
            docker_image=row["docker_image"],
            hardware=row["hardware"],
            price_per_hour=float(row["price_per_hour"]),
            cached_models=tuple(row["cached_models"]),
            run_id=row["run_id"],
            offer_key=offer_key(row["gpu_type"], row["gpu_count"], row["cloud"]),
            bought_for=row["bought_for"],
            host=row["host"],
            reason=row["reason"],
            shutdown_requested=row["shutdown_requested"],
            age_seconds=float(row["age_seconds"]),
            overdue_seconds=float(row["overdue_seconds"]),
            silent_seconds=row["silent_seconds"],
            heartbeat_seconds=row["heartbeat_seconds"],
        )

    def aged(self, age_seconds: float) -> Pod:
        """The same pod at another age, and so as far from its deadline as that makes it."""
        ahead = self.age_seconds - age_seconds
        return replace(self, age_seconds=age_seconds, overdue_seconds=self.overdue_seconds - ahead)

    @property
    def is_idle(self) -> bool:
        """It waits for a run."""
        return self.status == "active" and self.run_id is None and not self.shutdown_requested


@dataclass
class Plan:
    """What one pass decided."""

    hints: dict[str, str] = field(default_factory=dict)
    """Run id -> worker id."""
    purchases: list[WaitingRun] = field(default_factory=list)
    """Runs that need a new pod each."""
    retire: list[str] = field(default_factory=list)
    """Idle pods to end, because nothing that waits can use them and their places are wanted."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Job id -> why it waits."""


def place(
    waiting: Sequence[WaitingRun],
    pods: Sequence[Pod],
    *,
    fitting: Mapping[str, Collection[str]],
    being_bought: int,
    max_workers: int,
    paused: str | None = None,
    later: Collection[str] = (),
) -> Plan:
    """Point runs, in the order given, at idle pods; count starting pods; buy the rest up to the limit.

    `fitting` has the pods that each class of needs fits; the ledger says so, and nobody else. `being_bought`
    pods are on their way to a row in the ledger and count against the limit too. With `paused`, the reason
    for it, nothing is bought; for the jobs of `later`, which could not be bought for just now, neither.
    """
    plan = Plan()
    taken = {run.hinted_worker_id for run in waiting if run.freshly_hinted}
    idle = {pod.id: pod for pod in pods if pod.is_idle and pod.id not in taken}
    starting = {pod.id: pod for pod in pods if pod.status == "starting"}
    prices = {pod.id: pod.price_per_hour for pod in pods}

    def suitable(run: WaitingRun) -> list[str]:
        ceiling = run.ceiling_per_hour
        fits = fitting.get(run.needs_class, ())
        return [worker for worker in fits if ceiling is None or prices[worker] <= ceiling]

    usable = {worker for run in waiting for worker in suitable(run)}
    useless = sorted(
        (pod for pod in idle.values() if pod.id not in usable), key=lambda pod: pod.price_per_hour
    )
    room = max_workers - len(pods) - being_bought
    for run in waiting:
        if run.run_id is None or run.freshly_hinted:
            continue
        fits = suitable(run)
        if pod := _preferred(run, [idle[worker] for worker in fits if worker in idle]):
            plan.hints[run.run_id] = idle.pop(pod.id).id
        elif pod := _oldest([starting[worker] for worker in fits if worker in starting]):
            starting.pop(pod.id)
            plan.reasons[run.job_id] = f"pod {pod.id} ({pod.hardware}) is starting"
        elif paused is not None:
            plan.reasons[run.job_id] = paused
        elif run.job_id in later:
            continue  # Whoever tried has said why.
        elif room > 0:
            room -= 1
            plan.purchases.append(run)
        else:
            plan.reasons[run.job_id] = f"pod limit: all {max_workers} pods of the organization are in use"
            if useless:
                plan.retire.append(useless.pop().id)
    return plan


def _preferred(run: WaitingRun, pods: Sequence[Pod]) -> Pod | None:
    """The model on its disk first, then the cheapest."""
    return min(
        pods,
        key=lambda pod: (run.model not in pod.cached_models, pod.price_per_hour, pod.id),
        default=None,
    )


def _oldest(pods: Sequence[Pod]) -> Pod | None:
    return max(pods, key=lambda pod: (pod.age_seconds, pod.id), default=None)
