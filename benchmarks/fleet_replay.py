"""A trace of jobs, replayed through a policy of buying and ending pods: a discrete-event simulation."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from figures import p50
from fleet_trace import Boots, TraceJob

from openweights_prefect.provisioning.hardware import usable_vram_gb
from openweights_prefect.provisioning.provider import Offer


@dataclass
class SimulatedPod:
    """A pod of a replay, with what its seconds were spent on."""

    id: str
    offer: Offer
    bought_for: TraceJob
    bought_at: float
    ready_at: float
    """When its boot ends."""
    status: str = "starting"
    models: set[str] = field(default_factory=set)
    idle_since: float = 0.0
    running: TraceJob | None = None
    ended_at: float | None = None
    jobs: int = 0
    run_seconds: float = 0.0
    download_seconds: float = 0.0

    @property
    def alive_seconds(self) -> float:
        """Every second that is paid for."""
        assert self.ended_at is not None, f"{self.id} was never ended"
        return self.ended_at - self.bought_at

    def fits(self, job: TraceJob) -> bool:
        """Enough memory; image and cloud are the same for all jobs of a trace."""
        return usable_vram_gb(self.offer) >= job.needs.requires_vram_gb


class Policy(Protocol):
    """When to buy, to start and to end, by the calls that a replay offers."""

    name: str
    slug: str

    def decide(self, replay: Replay) -> None:
        """Called after every change: a job came, a pod is ready, a run ended, a moment that was asked for."""
        ...


class Replay:
    """The world of one policy. Money runs from the purchase of a pod until its end."""

    def __init__(self, trace: Sequence[TraceJob], boots: Boots, policy: Policy, *, max_pods: int) -> None:
        self.now = 0.0
        self.max_pods = max_pods
        self.queue: list[TraceJob] = []
        """Waiting jobs, the first that came first."""
        self.pods: list[SimulatedPod] = []
        """Those that are alive."""
        self.ended: list[SimulatedPod] = []
        self.waits: dict[int, float] = {}
        """Job number -> seconds from its submit until its own work began."""
        self._boots = boots
        self._policy = policy
        self._bought = 0
        self._order = itertools.count()
        self._looks: set[float] = set()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        for job in trace:
            self.at(job.at, lambda job=job: self.queue.append(job))  # type: ignore[misc]

    def run(self) -> Outcome:
        """Until nothing happens any more: every job has run and every pod has ended."""
        while self._events:
            self.now, _, change = heapq.heappop(self._events)
            change()
            self._policy.decide(self)
        assert not self.queue, f"{self._policy.name} left {len(self.queue)} jobs"
        assert not self.pods, f"{self._policy.name} left {len(self.pods)} pods"
        return Outcome(self._policy.name, self._policy.slug, self.ended, [*self.waits.values()])

    # What a policy may do ------------------------------------------------------------------------

    def at(self, moment: float, change: Callable[[], None]) -> None:
        """Have something happen later; the policy decides after it."""
        heapq.heappush(self._events, (moment, next(self._order), change))

    def look_at(self, moment: float) -> None:
        """Have the policy decide at that moment, once, however often it is asked for."""
        if moment not in self._looks:
            self._looks.add(moment)
            self.at(moment, lambda: self._looks.discard(moment))

    def of_status(self, status: str) -> list[SimulatedPod]:
        """The living pods of that status: `starting`, `active` (idle) or `busy`."""
        return [pod for pod in self.pods if pod.status == status]

    def buy(self, job: TraceJob) -> SimulatedPod:
        """The cheapest pod for that job, which may then run any other that fits."""
        assert len(self.pods) < self.max_pods, f"{self._policy.name} goes beyond the limit"
        boot = self._boots[self._bought]
        self._bought += 1
        pod = SimulatedPod(f"pod-{self._bought}", job.offer, job, self.now, self.now + boot)
        self.pods.append(pod)
        self.at(pod.ready_at, lambda: self._idle(pod))
        return pod

    def start(self, pod: SimulatedPod, job: TraceJob, *, after: float = 0.0) -> float:
        """Let an idle pod run a waiting job, `after` what the dispatch takes. Returns when it will end."""
        assert pod.status == "active"
        assert pod.fits(job)
        self.queue.remove(job)
        pod.status, pod.running = "busy", job
        download = 0.0 if job.model.name in pod.models else job.download_seconds
        begun = self.now + after + download
        self.waits[job.number] = begun - job.at
        pod.download_seconds += download
        pod.run_seconds += job.run_seconds
        pod.jobs += 1
        pod.models.add(job.model.name)
        self.at(begun + job.run_seconds, lambda: self._idle(pod))
        return begun + job.run_seconds

    def end(self, pod: SimulatedPod) -> None:
        """No second of it is paid from now on."""
        assert pod.status == "active"
        self.pods.remove(pod)
        pod.status, pod.ended_at = "terminated", self.now
        self.ended.append(pod)

    def _idle(self, pod: SimulatedPod) -> None:
        pod.status, pod.running, pod.idle_since = "active", None, self.now


@dataclass(frozen=True)
class Outcome:
    """What a policy cost, and how long people waited."""

    name: str
    slug: str
    pods: Sequence[SimulatedPod]
    waits: Sequence[float]

    @property
    def usd(self) -> float:
        """The whole bill."""
        return sum(_usd(pod, pod.alive_seconds) for pod in self.pods)

    @property
    def run_usd(self) -> float:
        """For the jobs' own work."""
        return sum(_usd(pod, pod.run_seconds) for pod in self.pods)

    @property
    def boot_usd(self) -> float:
        """For boots, and for downloads of models."""
        return sum(_usd(pod, pod.ready_at - pod.bought_at + pod.download_seconds) for pod in self.pods)

    @property
    def idle_usd(self) -> float:
        """For everything else: waiting for work, for a dispatch, for somebody to see that a job has ended."""
        return self.usd - self.run_usd - self.boot_usd

    @property
    def wait_p50(self) -> float:
        """Seconds until the work of a job began: the median."""
        return p50(self.waits)

    @property
    def wait_p95(self) -> float:
        """The same that nineteen of twenty do not exceed."""
        return p95(self.waits)


def p95(values: Sequence[float]) -> float:
    """The value that nineteen of twenty do not exceed, interpolated."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def _usd(pod: SimulatedPod, seconds: float) -> float:
    return seconds * pod.offer.price_per_hour / 3600
