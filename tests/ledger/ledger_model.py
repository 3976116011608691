"""What the ledger must do, in plain Python: one organization, one call after the other.

`Model.apply()` gives the word with which the ledger must answer a call, and `Model.shown()` everything that
must be in its tables afterwards. Locks, row-level security and clocks are not here: that the real one behaves
as if it had none is what the tests are about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

MOST_PODS = 3
FINAL = ("completed", "failed", "canceled")
WITHOUT_A_WORD = "the script ended without a word"

Event = dict[str, int | None]

# Arguments that are always the same, or follow from the others.
_CONSTANT = {
    "bootstrap_hash",
    "hash",
    "source",
    "lease_seconds",
    "models",
    "ttl_seconds",
    "max_pods",
    "command",
}


@dataclass(frozen=True)
class Call:
    """One call of a function: by "person", "control" or "service", else by the pod of that id."""

    speaker: str
    function: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        told = {name: value for name, value in self.arguments.items() if name not in _CONSTANT}
        arguments = ", ".join(f"{name}={_short(value)}" for name, value in told.items())
        return f"{self.speaker}: {self.function}({arguments})"


@dataclass
class Job:
    type: str
    entrypoint: str | None
    files: list[str]
    retries: int
    priority: int
    fits: bool
    status: str = "pending"
    attempt: int = 1
    failed_attempts: int = 0
    lost_attempts: int = 0
    cancel_requested: bool = False
    error: str | None = None
    outputs: Event | None = None

    def reset(self) -> None:
        self.status, self.attempt, self.cancel_requested = "pending", self.attempt + 1, False
        self.failed_attempts, self.lost_attempts, self.error, self.outputs = 0, 0, None, None


@dataclass
class Run:
    job: str
    attempt: int
    status: str = "pending"
    worker: str | None = None
    boot: UUID | None = None
    error: str | None = None
    mirrored: bool = False
    hinted: str | None = None
    hint_is_fresh: bool = True
    lease_is_over: bool | None = None
    """Of a script; None for every other run."""
    started: int = 0
    finished: int = 0
    """Positions in the order of all openings and ends; 0 before."""
    events: list[Event] = field(default_factory=list)
    log: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        return self.status in ("pending", "in_progress")

    @property
    def log_bytes(self) -> int:
        return self.log[-1][1] if self.log else 0


@dataclass
class Pod:
    status: str = "starting"
    provider_id: str | None = None
    session: str | None = None
    boot: UUID | None = None
    run: UUID | None = None
    shutdown_requested: bool = False
    lease_is_over: bool = False
    is_heard: bool = False
    """Its run has logged since the lease was over."""
    boots: int = 0
    bought_for: str | None = None


@dataclass
class Model:
    """The tables of one organization."""

    jobs: dict[str, Job] = field(default_factory=dict)
    runs: dict[UUID, Run] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    moments: int = 0

    def apply(self, call: Call) -> str:
        """Make the call; returns the word of the answer."""
        transition: Callable[..., str] = getattr(self, call.function)
        return transition(call.speaker, **call.arguments)

    def shown(self) -> dict[str, Any]:
        """As `SNAPSHOT` of the state machine shows the tables."""
        return {
            "jobs": {
                name: {key: value for key, value in vars(job).items() if key != "fits"}
                for name, job in self.jobs.items()
            },
            "runs": {str(name): _shown_run(run) for name, run in self.runs.items()},
            "pods": {name: _shown_pod(pod) for name, pod in self.pods.items()},
            "files": sorted(self.files),
            "order": list(self.jobs),
            "reserved": sorted(name for name, pod in self.pods.items() if pod.status != "terminated"),
        }

    # Files and jobs, by people ---------------------------------------------------------------------

    def register_file(self, _: str, file: dict[str, Any]) -> str:
        self.files.add(file["id"])
        return "registered"

    def delete_file(self, _: str, file_id: str) -> str:
        if any(file_id in job.files and job.status not in FINAL for job in self.jobs.values()):
            return "in_use"
        if file_id not in self.files:
            return "not_found"
        self.files.remove(file_id)
        return "deleted"

    def submit_job(self, _: str, job: dict[str, Any]) -> str:
        held = self.jobs.get(job["id"])
        if held is None or held.status in ("failed", "canceled"):
            if not self.files.issuperset(held.files if held else job["files"]):
                return "missing_files"
            if held is not None:
                held.reset()
                return "reset"
            self.jobs[job["id"]] = Job(
                job["type"], job["entrypoint"], job["files"], job["retries"], job["priority"],
                fits=job["requires_vram_gb"] == 0,
            )  # fmt: skip
            return "new"
        return "completed" if held.status == "completed" else "joined"

    def cancel_job(self, _: str, job_id: str) -> str:
        held = self.jobs.get(job_id)
        if held is None:
            return "not_found"
        if held.status == "pending":
            held.status = "canceled"
            for run in self.runs.values():
                if run.job == job_id and run.status == "pending":
                    run.status = "canceled"
            return "canceled"
        if held.status == "in_progress":
            held.cancel_requested = True
            return "canceling"
        return "refused"

    def restart_job(self, _: str, job_id: str) -> str:
        held = self.jobs.get(job_id)
        if held is None:
            return "not_found"
        if held.type in ("flow", "script") or held.status in ("completed", "in_progress"):
            return "refused"
        if held.status == "pending":
            return "reset"
        if not self.files.issuperset(held.files):
            return "missing_files"
        held.reset()
        return "reset"

    def open_script(self, _: str, for_job: str, for_run: UUID, as_boot: UUID, **__: Any) -> str:
        if for_job not in self.jobs:
            self.jobs[for_job] = Job("script", "python probe.py", [], 0, 0, fits=False, status="in_progress")
            self.runs[for_run] = Run(for_job, 1, "in_progress", None, as_boot, mirrored=True,
                                     lease_is_over=False)  # fmt: skip
        run = self.runs[for_run]
        return "opened" if run.boot == as_boot and run.status == "in_progress" else "refused"

    def renew_script(self, _: str, for_run: UUID, as_boot: UUID, **__: Any) -> str:
        run = self.runs.get(for_run)
        held = run is not None and run.boot == as_boot and run.status == "in_progress"
        if run is None or not held or run.lease_is_over is None:
            return "fenced"
        run.lease_is_over = False
        return "renewed"

    def request_shutdown(self, _: str, for_worker: str) -> str:
        pod = self.pods.get(for_worker)
        if pod is None or pod.status == "terminated":
            return "not_found"
        pod.shutdown_requested = True
        return "requested"

    # The control plane -----------------------------------------------------------------------------

    def record_flow_run(self, _: str, for_job: str, for_attempt: int, flow_run: UUID) -> str:
        held = self.jobs.get(for_job)
        taken = any((run.job, run.attempt) == (for_job, for_attempt) for run in self.runs.values())
        wanted = held is not None and held.status == "pending" and held.attempt == for_attempt
        if wanted and not taken and flow_run not in self.runs:
            self.runs[flow_run] = Run(for_job, for_attempt)
        run = self.runs.get(flow_run)
        return "recorded" if run and (run.job, run.attempt) == (for_job, for_attempt) else "stale"

    def adopt_flow_run(self, speaker: str, job: dict[str, Any], flow_run: UUID, created: str) -> str:
        held = self.jobs.get(job["id"])
        if held is not None and held.status in ("failed", "canceled") and created.startswith("20"):
            return held.status
        submitted = self.submit_job(speaker, job)
        if submitted in ("missing_files", "completed"):
            return submitted
        attempt = self.jobs[job["id"]].attempt
        recorded = self.record_flow_run(speaker, job["id"], attempt, flow_run)
        return "adopted" if recorded == "recorded" else "following"

    def hint_runs(self, _: str, hints: dict[str, str]) -> str:
        for run_id, pod in hints.items():
            run = self.runs[UUID(run_id)]
            if run.status == "pending":
                run.hinted, run.hint_is_fresh = pod, True
        return "hinted"

    def abandon_run(self, speaker: str, for_run: UUID, why: str) -> str:
        run = self.runs.get(for_run)
        pointed = speaker not in self.pods or (run is not None and run.hinted == speaker)
        if run is not None and run.status == "pending" and self._speaks(speaker) and pointed:
            run.status, run.error, run.mirrored = "lost", why, True
            run.worker = speaker if speaker in self.pods else None
            job = self.jobs[run.job]
            if job.entrypoint is None:
                job.status = "canceled"
            else:
                job.attempt += 1
        return "abandoned"

    def intend_pod(self, _: str, pod: dict[str, Any], max_pods: int, **__: Any) -> str:
        if pod["id"] in self.pods:
            return "intended"
        if sum(held.status != "terminated" for held in self.pods.values()) >= max_pods:
            return "limit"
        self.pods[pod["id"]] = Pod(bought_for=pod.get("bought_for"))
        return "intended"

    def record_pod(self, _: str, for_worker: str, provider_id: str, **__: Any) -> str:
        pod = self.pods.get(for_worker)
        if pod is None or pod.provider_id not in (None, provider_id):
            return "refused"
        if pod.status == "terminated":
            if pod.provider_id is not None:
                return "refused"
            pod.status = "lost"  # Given up as never created, and there it is after all.
        pod.provider_id = provider_id
        return "recorded"

    def lose_pod(self, _: str, for_worker: str, why: str, counts: bool) -> str:
        if not self._condemn(for_worker, "lost", why):
            return "refused"
        pod = self.pods[for_worker]
        job = self.jobs.get(pod.bought_for or "")
        if counts and not pod.boots and job is not None and job.status == "pending":
            job.lost_attempts += 1
            if job.lost_attempts >= 3:
                self._fail(pod.bought_for or "", f"Lost 3 pods in a row; the last one: {why}")
        return "lost"

    def reject_pod(self, speaker: str, for_worker: str, why: str) -> str:
        if speaker != for_worker or not self._speaks(speaker):
            return "refused"
        return "rejected" if self._condemn(for_worker, "lost", f"unusable host: {why}") else "refused"

    def fail_job(self, _: str, for_job: str, why: str) -> str:
        job = self.jobs.get(for_job)
        if job is None or job.status != "pending":
            return "refused"
        self._fail(for_job, why)
        return "failed"

    def end_pod(self, _: str, for_worker: str, why: str) -> str:
        return "terminated" if self._condemn(for_worker, "terminated", why) else "refused"

    def expire_leases(self, _: str) -> str:
        alive = ("active", "busy", "draining")
        silent = [
            name
            for name, pod in sorted(self.pods.items())
            if pod.status in alive and pod.lease_is_over and not (pod.is_heard and pod.run is not None)
        ]
        for name in silent:
            self._condemn(name, "lost", f"pod {name} was silent for longer than its lease")
        return " ".join(silent)

    def expire_scripts(self, _: str) -> str:
        ended = [run for run in self.runs.values() if run.status == "in_progress" and run.lease_is_over]
        for run in ended:
            job = self.jobs[run.job]
            run.status, run.error = "failed", WITHOUT_A_WORD
            job.status, job.error = "canceled" if job.cancel_requested else "failed", WITHOUT_A_WORD
        return " ".join(sorted(run.job for run in ended))

    # Pods ------------------------------------------------------------------------------------------

    def redeem_bootstrap(self, _: str, hash: str, session_hash: str, source: str) -> str:
        pod = self.pods.get(source.split("/")[0])
        if pod is None or pod.status == "terminated" or pod.session not in (None, session_hash):
            return "refused"
        pod.session = session_hash
        return "redeemed"

    def register_pod(self, speaker: str, for_worker: str, as_boot: UUID, **_: Any) -> str:
        if speaker != for_worker or not self._speaks(speaker):
            return "refused"
        pod = self.pods[for_worker]
        if pod.status not in ("starting", "active", "busy"):
            return "shutdown"
        if pod.boot != as_boot:
            if pod.boots >= 5:
                self._condemn(for_worker, "lost", "its agent restarted 5 times")
                return "shutdown"
            pod.boots += 1
            self._lose(pod.run, f"the agent of pod {for_worker} restarted")
            pod.boot, pod.run, pod.status = as_boot, None, "active"
        pod.lease_is_over = False
        return "registered"

    def renew_lease(self, speaker: str, for_worker: str, as_boot: UUID, **_: Any) -> str:
        pod = self.pods.get(for_worker)
        if speaker != for_worker or not self._speaks(speaker) or pod is None or pod.boot != as_boot:
            return "fenced"
        if pod.status not in ("active", "busy", "draining"):
            return "fenced"
        pod.lease_is_over = False
        if pod.status == "active" and not pod.shutdown_requested:
            self._look_for_work(for_worker)
        return "renewed"

    def open_run(self, speaker: str, for_run: UUID, for_worker: str, as_boot: UUID) -> str:
        run, pod = self.runs.get(for_run), self.pods.get(for_worker)
        if run is None or pod is None or speaker != for_worker or not self._speaks(speaker):
            return "refused"
        if (run.status, run.worker, run.boot) == ("in_progress", for_worker, as_boot):
            return "opened"
        job = self.jobs[run.job]
        waits = run.status == "pending" and job.status == "pending" and run.attempt == job.attempt
        ready = pod.status == "active" and not pod.shutdown_requested and not pod.lease_is_over
        if not (waits and ready and job.fits and pod.boot == as_boot):
            return "refused"
        run.status, run.worker, run.boot = "in_progress", for_worker, as_boot
        run.started = self._moment()
        job.status = "in_progress"
        pod.status, pod.run = "busy", for_run
        return "opened"

    def append_events(
        self, speaker: str, for_run: UUID, as_boot: UUID, first_sequence: int, batch: list[dict[str, Any]]
    ) -> str:
        run = self._held(speaker, for_run, as_boot)
        if run is None:
            return "stale"
        if first_sequence > len(run.events):
            return "gap"
        run.events += [item["data"] for item in batch[len(run.events) - first_sequence :]]
        self._hear(run)
        return "stored"

    def append_log(
        self, speaker: str, for_run: UUID, as_boot: UUID, from_offset: int, to_offset: int, piece: str
    ) -> str:
        run = self._held(speaker, for_run, as_boot)
        if run is None:
            return "stale"
        if from_offset == run.log_bytes:
            run.log.append((from_offset, to_offset, piece))
            self._hear(run)
        return "stored"

    def finish_run(self, speaker: str, for_run: UUID, as_boot: UUID, result: str, why: str | None) -> str:
        run = self.runs.get(for_run)
        if run is None or run.boot != as_boot or not self._reaches(speaker, run):
            return "stale"
        if run.status == result:
            return "finished"
        if run.status != "in_progress":
            return "stale"
        if result == "lost":
            self._lose(for_run, why)
        else:
            self._finish(run, result, why)
        if run.worker is not None:
            pod = self.pods[run.worker]
            pod.status, pod.run = "active" if pod.status == "busy" else pod.status, None
            if result == "failed":
                self._retire_failing(run.worker)
        return "finished"

    def release_pod(self, speaker: str, for_worker: str, as_boot: UUID, why: str, forced: bool) -> str:
        pod = self.pods.get(for_worker)
        if pod is None or speaker != for_worker or not self._speaks(speaker) or pod.boot != as_boot:
            return "refused"
        hinted = any(
            run.status == "pending" and run.hinted == for_worker and run.hint_is_fresh
            for run in self.runs.values()
        )
        if pod.run is not None or pod.status not in ("active", "draining") or (hinted and not forced):
            return "refused"
        pod.status = "draining"
        return "draining"

    # What several of them do -------------------------------------------------------------------------

    def _speaks(self, speaker: str) -> bool:
        """A pod is somebody from the exchange of its one-time token until its end."""
        pod = self.pods.get(speaker)
        if pod is None:
            return speaker in ("person", "control", "service")
        return pod.session is not None and pod.status != "terminated"

    def _reaches(self, speaker: str, run: Run) -> bool:
        return speaker == "person" or (speaker == run.worker and self._speaks(speaker))

    def _held(self, speaker: str, for_run: UUID, boot: UUID) -> Run | None:
        run = self.runs.get(for_run)
        if run is None or not self._reaches(speaker, run):
            return None
        return run if run.status == "in_progress" and run.boot == boot else None

    def _look_for_work(self, pod: str) -> None:
        """A pod without a hint hints the first waiting run at itself: another pod finds another one."""
        jobs = sorted(self.jobs, key=lambda name: -self.jobs[name].priority)
        runs = [run for name in jobs for run in self.runs.values() if run.job == name]
        waiting = [run for run in runs if run.status == "pending" and self.jobs[run.job].fits]
        free = [run for run in waiting if run.hinted is None or not run.hint_is_fresh]
        if free and not any(run.hinted == pod for run in waiting):
            free[0].hinted, free[0].hint_is_fresh = pod, True

    def _finish(self, run: Run, result: str, why: str | None) -> None:
        job = self.jobs[run.job]
        again = result == "failed" and not job.cancel_requested and job.failed_attempts < job.retries
        run.status, run.error, run.finished = result, why, self._moment()
        job.status = "pending" if again else result
        job.attempt += again
        job.failed_attempts += result == "failed"
        job.lost_attempts = 0
        job.error = None if again else why
        job.outputs = _newest(run.events) if result == "completed" else None

    def _lose(self, run_id: UUID | None, why: str | None) -> None:
        if run_id is None or self.runs[run_id].status != "in_progress":
            return
        run = self.runs[run_id]
        job = self.jobs[run.job]
        run.status, run.error, run.finished = "lost", why, self._moment()
        job.lost_attempts += 1
        job.error = None
        ours = job.entrypoint is not None and job.type != "script"
        if job.cancel_requested:
            job.status = "canceled"
        elif not ours or job.lost_attempts >= 3:
            job.status = "failed"
            job.error = f"Lost 3 pods in a row; the last one: {why}" if ours else why
        else:
            job.status, job.attempt = "pending", job.attempt + 1

    def _fail(self, name: str, why: str) -> None:
        self.jobs[name].status, self.jobs[name].error = "failed", why
        for run in self.runs.values():
            if run.job == name and run.status == "pending":
                run.status, run.error, run.finished = "failed", why, self._moment()

    def _moment(self) -> int:
        self.moments += 1
        return self.moments

    def _hear(self, run: Run) -> None:
        if run.worker is not None:
            self.pods[run.worker].is_heard = True

    def _retire_failing(self, name: str) -> None:
        """Five failed runs in a row, of more than one job, while another pod completed one."""
        ended = [run for run in self.runs.values() if run.worker == name and run.finished][-5:]
        failed = len(ended) == 5 and all(run.status == "failed" for run in ended)
        if failed and len({run.job for run in ended}) > 1:
            since = min(run.started for run in ended)
            others = [run for run in self.runs.values() if run.worker not in (None, name)]
            others_succeed = any(run.status == "completed" and run.finished > since for run in others)
            if others_succeed and self.pods[name].status in ("active", "busy"):
                self.pods[name].status = "draining"

    def _condemn(self, name: str, status: Literal["lost", "terminated"], why: str) -> bool:
        pod = self.pods.get(name)
        if pod is None or pod.status in ("terminated", status):
            return False
        self._lose(pod.run, why)
        pod.status, pod.boot, pod.run = status, None, None
        return True


def live_runs(model: Model) -> Iterator[UUID]:
    """Those that wait or run."""
    return (name for name, run in model.runs.items() if run.is_live)


def _short(value: object) -> str:
    if isinstance(value, UUID):
        return str(value)[:8]
    if isinstance(value, dict) and "id" in value:
        return f"{value['id']!r}..."
    return repr(value)


def _newest(events: list[Event]) -> Event:
    return {key: value for event in events for key, value in event.items() if value is not None}


def _shown_run(run: Run) -> dict[str, Any]:
    return {
        "job": run.job,
        "attempt": run.attempt,
        "status": run.status,
        "worker": run.worker,
        "boot": str(run.boot) if run.boot else None,
        "error": run.error,
        "mirrored": run.mirrored,
        "hinted": run.hinted,
        "hint_is_fresh": run.hinted is not None and run.hint_is_fresh,
        "is_script": run.lease_is_over is not None,
        "events": run.events,
        "log": [list(piece) for piece in run.log],
    }


def _shown_pod(pod: Pod) -> dict[str, Any]:
    return {
        "status": pod.status,
        "provider_id": pod.provider_id,
        "session": pod.session,
        "boot": str(pod.boot) if pod.boot else None,
        "run": str(pod.run) if pod.run else None,
        "shutdown_requested": pod.shutdown_requested,
    }
