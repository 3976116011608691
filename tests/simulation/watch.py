"""What must hold at every step, what was reached, and the trace of a simulation."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from openweights_prefect.provisioning.provider import PodRequest
from tests.simulation.model_ledger import ModelLedger, Speaker
from tests.simulation.model_provider import ModelProvider, SimPod
from tests.simulation.model_rows import Job, Row, fits
from tests.simulation.virtual_loop import Process

DEADLINE_GRACE_SECONDS = 120.0
ORPHAN_SECONDS = 120.0
ZOMBIE_SECONDS = 2.5
UNEXPLAINED_SECONDS = 90.0
LOOK_SECONDS = 5.0
_RECENT_SECONDS = 20.0
NEEDLESS_PODS = 2
"""So many more than jobs may be on their way: who fits whom is not solved to the optimum."""
QUIET = {
    "control_snapshot",
    "renew_lease",
    "append_events",
    "expire_scripts",
    "known_runs",
    "publish_catalogue",
    "expire_events",
}
UNTOLD = {"bootstrap_hash", "pod", "models", "lease_seconds", "ttl_seconds", "details", "batch"}


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass
class Executing:
    """A run that a pod's processes work on at this moment."""

    run_id: str
    job_id: str
    worker_id: str
    boot: str
    process: Process
    thawed_at: float | None = None


class Watch:
    """Looks on; knows both sides and is asked by neither."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.trace: deque[str] = deque(maxlen=400)
        self.digest = hashlib.sha256()
        self.lines = 0
        self.counts: Counter[str] = Counter()
        self.executing: dict[str, Executing] = {}
        self.orphan_seconds = 0.0
        self.control_able = False
        """A worker lives, and can reach the ledger and the provider."""
        self.able_since = 0.0
        self.unable_seconds = 0.0
        self.single_worker = True
        self.ledger: ModelLedger
        self.provider: ModelProvider
        self.max_workers = 0
        self.stop: Callable[[BaseException], None] = lambda _: None
        self.bill_errors: list[float] = []
        self._created: set[str] = set()
        self._unable_after: dict[str, float] = {}
        self._unexplained: dict[str, float] = {}
        self._left: deque[tuple[float, str]] = deque()

    # What is told ------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """A line of the trace."""
        line = f"{self.now():12.3f} {text}"
        self.digest.update(line.encode() + b"\n")
        self.lines += 1
        self.trace.append(line)

    def reached(self, what: str) -> None:
        """Count something that must sometimes happen."""
        self.counts[what] += 1

    def fail(self, what: str) -> None:
        """An invariant is broken."""
        self.note(f"VIOLATION {what}")
        violation = Violation(what)
        self.stop(violation)  # whoever would catch it
        raise violation

    def saw_call(self, speaker: Speaker, function: str, arguments: Row) -> None:
        """Somebody calls the ledger; what happens all the time is no news."""
        if function not in QUIET:
            told = {name: value for name, value in arguments.items() if name not in UNTOLD}
            self.note(f"{speaker.name or speaker.role}: {function} {told}")

    # Jobs and runs -----------------------------------------------------------------------------------

    def begin(self, found: Executing) -> None:
        """A pod begins to execute a run."""
        job = self.ledger.jobs[found.job_id]
        run = self.ledger.runs[found.run_id]
        self.note(f"{found.worker_id} begins {found.job_id} attempt {run.attempt}")
        if job.status == "completed":
            self.fail(f"job {job.id} is executed again after it completed")
        self.executing[found.run_id] = found
        self.look_at_jobs()

    def end(self, run_id: str) -> None:
        """It stops, however."""
        if found := self.executing.pop(run_id, None):
            self.note(f"{found.worker_id} stops {found.job_id}")

    def end_all_of(self, process: Process) -> None:
        """Its process is dead."""
        for run_id in [run_id for run_id, found in self.executing.items() if found.process is process]:
            self.end(run_id)

    def thawed(self, process: Process) -> None:
        """What was frozen goes on, before it can know what happened meanwhile."""
        for found in self.executing.values():
            if found.process is process:
                found.thawed_at = self.now()

    def look_at_jobs(self) -> None:
        """One executor at most of each job; a thawed one has a moment to see that it is late."""
        by_job: dict[str, Executing] = {}
        for found in self.executing.values():
            if found.process.paused or self._may_be_zombie(found):
                continue
            if found.job_id in by_job:
                other = by_job[found.job_id]
                self.fail(
                    f"job {found.job_id} is executed by {found.worker_id} and {other.worker_id} at once"
                )
            by_job[found.job_id] = found

    def job_moves(self, job: Job, status: str) -> None:
        """The ledger changes the status of a job."""
        if job.status == "completed" and status != "completed":
            self.fail(f"job {job.id} was completed and becomes {status}")
        if job.status == "pending" and status != "pending":
            self._left.append((self.now(), job.id))
        if job.status != status:
            self.note(f"job {job.id} attempt {job.attempt}: {job.status} -> {status}")

    def _may_be_zombie(self, found: Executing) -> bool:
        return found.thawed_at is not None and self.now() - found.thawed_at <= ZOMBIE_SECONDS

    # Pods --------------------------------------------------------------------------------------------

    def intended(self, worker_id: str) -> None:
        """A row for a pod was written."""
        if len(self.ledger.alive) > self.max_workers:
            self.fail(f"{len(self.ledger.alive)} pods have a row; {self.max_workers} are allowed")
        while self._left and self._left[0][0] < self.now() - _RECENT_SECONDS:
            self._left.popleft()
        if not self.single_worker:
            return
        waiting = self.ledger.waiting.values()
        coming = [
            pod
            for pod in self.ledger.alive.values()
            if pod.status == "starting" and not pod.shutdown_requested
        ]
        coming = [pod for pod in coming if any(fits(job, pod) for job in waiting)]
        wanted = sum(any(fits(job, pod) for pod in coming) for job in waiting) + len(self._left)
        if len(coming) > wanted + NEEDLESS_PODS:
            self.fail(f"{len(coming)} pods are on their way for {wanted} jobs that wait")

    def create_called(self, request: PodRequest) -> None:
        """Somebody asks the provider for a pod."""
        self.note(f"create {request.name}")
        if request.name in self._created:
            self.fail(f"create is repeated under the name {request.name}")
        self._created.add(request.name)
        pod = self.ledger.alive.get(request.env["OW_POD_ID"])
        if pod is None:
            self.fail(f"create of {request.name} without a row in the ledger")

    def terminate_called(self, pod_id: str) -> None:
        """Somebody asks the provider to end a pod."""
        self.note(f"terminate {pod_id}")
        pod = self.provider.pods.get(pod_id)
        if pod is not None and (pod.foreign or pod.request.env.get("OW_POD_ID") not in self.ledger.pods):
            self.fail(f"pod {pod_id} ({pod.request.name}) of somebody else is terminated")

    def blind_seconds(self, pods: list[SimPod]) -> float:
        """How long the control plane could not look at these pods' last minutes."""
        return self.unable_seconds

    def look_at_pods(self) -> None:
        """Every few seconds: deadlines, orphans, and jobs that wait without a reason."""
        able = self.control_able and self.now() - self.able_since > 3 * LOOK_SECONDS
        self.unable_seconds += 0.0 if able else LOOK_SECONDS
        for pod in self.provider.existing():
            row = self.ledger.pods.get(pod.request.env["OW_POD_ID"])
            assert row is not None
            seen = self.provider.is_visible(pod)  # Nobody can know of one that the provider hides.
            if able and seen and (row.status == "terminated" or row.pod_id not in (None, pod.id)):
                self._count_orphan(pod)
            overdue = self.ledger.clock() - row.deadline_at
            if overdue > 0 and not able:
                self._unable_after[pod.id] = self._unable_after.get(pod.id, 0.0) + LOOK_SECONDS
            if overdue - self._unable_after.get(pod.id, 0.0) > DEADLINE_GRACE_SECONDS:
                self.fail(f"pod {pod.request.name} ({pod.id}, row {row.status}) is {overdue:.0f} s overdue")
        self._look_for_unexplained(able)
        self.look_at_jobs()

    def _count_orphan(self, pod: SimPod) -> None:
        if self.orphan_seconds == 0:
            self.note(f"{pod.id} of {pod.request.name} is an orphan")
        self.orphan_seconds += LOOK_SECONDS
        self.reached("an orphan was seen")
        if self.orphan_seconds > ORPHAN_SECONDS:
            self.fail(
                f"{self.orphan_seconds:.0f} orphan pod-seconds, the last of {pod.id} ({pod.request.name})"
            )

    def _look_for_unexplained(self, able: bool) -> None:
        for job in self.ledger.waiting.values():
            run = self.ledger.attempts.get((job.id, job.attempt))
            hinted = (
                run is not None and run.hinted_at is not None and run.hinted_at > self.ledger.clock() - 10
            )
            if job.pending_reason or hinted or not able:
                self._unexplained.pop(job.id, None)
                continue
            seconds = self._unexplained[job.id] = self._unexplained.get(job.id, 0.0) + LOOK_SECONDS
            if seconds > UNEXPLAINED_SECONDS:
                self.fail(f"job {job.id} waits {seconds:.0f} s without a reason")
        if len(self._unexplained) > len(self.ledger.waiting):
            self._unexplained = {
                name: s for name, s in self._unexplained.items() if name in self.ledger.waiting
            }
