"""The ledger in memory and in virtual time: one organization, one call after the other, no SQL.

Answers as the real one does; `test_conformance.py` puts the same calls to both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from openweights_prefect.errors import AuthenticationError
from tests.simulation.model_rows import FINAL, Interval, Job, Pod, Row, Run, fits

ORGANIZATION = "00000000-0000-0000-0000-000000000001"
HINT_SECONDS = 10.0
ALIVE = ("active", "busy", "draining")
WAKING = {
    "submit_job",
    "cancel_job",
    "restart_job",
    "register_pod",
    "finish_run",
    "release_pod",
    "lose_pod",
    "expire_leases",
    "abandon_run",
    "reject_pod",
    "fail_job",
}


class NotModelled(AssertionError):
    """The real ledger has learned something that its model has not."""


@dataclass(frozen=True)
class Speaker:
    """Who calls: a person by name, the control plane, or a pod with the secret of its session."""

    role: str
    name: str = ""
    session: str = ""


CONTROL = Speaker("control")


class ModelLedger:
    """Everything that the control plane, the pods and people of one organization see and change."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.jobs: dict[str, Job] = {}
        self.runs: dict[str, Run] = {}
        self.attempts: dict[tuple[str, int], Run] = {}
        self.pods: dict[str, Pod] = {}
        self.alive: dict[str, Pod] = {}
        """Pods that are not terminated."""
        self.reservations: dict[str, float] = {}
        self.refusals: dict[str, Row] = {}
        self.catalogue: Row | None = None
        self.budget: float | None = None
        self.notify: Callable[[str, str], None] = lambda channel, payload: None
        self.waiting: dict[str, Job] = {}
        self._unmirrored: dict[str, Run] = {}
        self._numbers = 0

    def call(self, speaker: Speaker, function: str, arguments: Row) -> list[Row]:
        """What the SQL function of that name answers this speaker."""
        transition: Callable[..., list[Row]] | None = getattr(self, "do_" + function, None)
        if transition is None:
            raise NotModelled(f"the model of the ledger knows no `{function}`")
        try:
            answer = transition(speaker, **arguments)
        except TypeError as exc:
            raise NotModelled(f"the model's `{function}` does not take {sorted(arguments)}: {exc}") from exc
        self._wake(function, arguments)
        return answer

    def _wake(self, function: str, arguments: Row) -> None:
        """Who listens hears of it, as far as anybody depends on that."""
        if function in WAKING:
            self.notify("ow_control", ORGANIZATION)
        for worker_id in arguments["hints"].values() if function == "hint_runs" else ():
            self.notify("ow_pod", worker_id)
        if function in ("request_shutdown", "extend_pod"):
            self.notify("ow_pod", arguments["for_worker"])
        if function == "cancel_job" and (job := self.jobs.get(arguments["job_id"])) is not None:
            run = self.attempts.get((job.id, job.attempt))
            if run is not None and run.status == "in_progress" and run.worker_id:
                self.notify("ow_pod", run.worker_id)

    # People ----------------------------------------------------------------------------------------

    def do_submit_job(self, speaker: Speaker, job: Row) -> list[Row]:
        held = self.jobs.get(job["id"])
        if held is None:
            self._numbers += 1
            known = {name: value for name, value in job.items() if name in Job.__dataclass_fields__}
            held = Job(**known, created_at=self.clock(), number=self._numbers, created_by=speaker.name)
            self.jobs[held.id] = self.waiting[held.id] = held
            answer = "new"
        elif held.status == "completed":
            answer = "completed"
        elif held.status in FINAL:
            self._reset(held, speaker)
            answer = "reset"
        else:
            answer = "joined"
        return [{"outcome": answer, "job": held.shown()}]

    def do_cancel_job(self, _: Speaker, job_id: str) -> list[Row]:
        held = self.jobs.get(job_id)
        if held is None:
            return [{"outcome": "not_found"}]
        answer = "refused"
        if held.status == "pending":
            self._set_status(held, "canceled")
            held.finished_at, held.pending_reason = self.clock(), None
            run = self.attempts.get((held.id, held.attempt))
            if run is not None and run.status == "pending":
                self._end_run(run, "canceled", run.error)
            answer = "canceled"
        elif held.status == "in_progress":
            held.cancel_requested = True
            answer = "canceling"
        return [{"outcome": answer, "job": held.shown()}]

    def do_restart_job(self, speaker: Speaker, job_id: str) -> list[Row]:
        held = self.jobs.get(job_id)
        if held is None:
            return [{"outcome": "not_found"}]
        answer = "refused"
        if held.type not in ("flow", "script"):
            if held.status in ("failed", "canceled"):
                self._reset(held, speaker)
                answer = "reset"
            elif held.status == "pending":
                answer = "reset"
        return [{"outcome": answer, "job": held.shown()}]

    def do_get_job(self, _: Speaker, job_id: str) -> list[Row]:
        held = self.jobs.get(job_id)
        return [] if held is None else [held.shown()]

    def do_request_shutdown(self, _: Speaker, for_worker: str) -> list[Row]:
        pod = self.alive.get(for_worker)
        if pod is None:
            return [{"outcome": "not_found"}]
        pod.shutdown_requested = True
        return [{"outcome": "requested"}]

    def do_extend_pod(self, speaker: Speaker, for_worker: str, deadline_seconds: float) -> list[Row]:
        if speaker.role == "pod":
            self._require_session(speaker)
        pod, now = self.alive.get(for_worker), self.clock()
        own = speaker.role != "pod" or speaker.name == for_worker
        if pod is None or pod.status not in ("starting", "active", "busy") or not own:
            return [{"outcome": "not_found"}]
        deadline = now + deadline_seconds
        more = pod.price_per_hour * (deadline - pod.deadline_at) / 3600
        if more > 0 and self._over_budget(more):
            return [{"outcome": "budget", "deadline_seconds": pod.deadline_at - now}]
        pod.deadline_at = deadline
        if pod.id in self.reservations:
            self.reservations[pod.id] = pod.price_per_hour * (deadline - pod.created_at) / 3600
        return [{"outcome": "extended", "deadline_seconds": deadline_seconds}]

    # The control plane -----------------------------------------------------------------------------

    def do_control_snapshot(self, _: Speaker, max_waiting: int = 100) -> list[Row]:
        line = self._waiting_line()
        chosen = sorted(line, key=lambda place: ((place[2] - 1) // 10, place[1]))[:max_waiting]
        chosen.sort(key=lambda place: place[1])
        classes = {job.needs_class: job for job, _, _ in reversed(chosen)}
        fitting = {
            name: [pod.id for pod in self._placeable() if fits(job, pod)] for name, job in classes.items()
        }
        return [
            {
                "waiting": [self._shown_waiting(job) for job, _, _ in chosen],
                "waiting_total": len(line),
                "released": sum((job.id, job.attempt) in self.attempts for job in self.waiting.values()),
                "fitting": {name: pods for name, pods in fitting.items() if pods},
                "pods": [self._shown_pod(pod) for pod in self.alive.values()],
                "refusals": self._shown_refusals(),
                "unmirrored": self._shown_unmirrored(),
            }
        ]

    def do_record_flow_run(
        self, _: Speaker, for_job: str, for_attempt: int, flow_run: UUID, ceiling: float | None = None
    ) -> list[Row]:
        held, name = self.jobs.get(for_job), str(flow_run)
        wanted = held is not None and held.status == "pending" and held.attempt == for_attempt
        if (
            held is not None
            and wanted
            and (for_job, for_attempt) not in self.attempts
            and name not in self.runs
        ):
            self._numbers += 1
            run = Run(name, held, for_attempt, self.clock(), self._numbers, ceiling=ceiling)
            self.runs[name] = self._unmirrored[name] = self.attempts[for_job, for_attempt] = run
        known = self.runs.get(name)
        recorded = known is not None and (known.job.id, known.attempt) == (for_job, for_attempt)
        return [{"outcome": "recorded" if recorded else "stale"}]

    def do_hint_runs(self, _: Speaker, hints: dict[str, str]) -> list[Row]:
        for run_id, worker_id in hints.items():
            run = self.runs.get(run_id)
            if run is not None and run.status == "pending":
                run.hinted, run.hinted_at = worker_id, self.clock()
        return [{"outcome": "hinted"}]

    def do_set_ceilings(self, _: Speaker, ceilings: dict[str, float | None]) -> list[Row]:
        for run_id, ceiling in ceilings.items():
            if run_id in self.runs and self.runs[run_id].status == "pending":
                self.runs[run_id].ceiling = ceiling
        return [{"outcome": "set"}]

    def do_set_pending_reasons(self, _: Speaker, reasons: dict[str, str]) -> list[Row]:
        for job_id, why in reasons.items():
            if job_id in self.waiting:
                self.waiting[job_id].pending_reason = why
        return [{"outcome": "set"}]

    def do_intend_pod(
        self, _: Speaker, pod: Row, bootstrap_hash: str, ttl_seconds: float, max_pods: int
    ) -> list[Row]:
        held = self.pods.get(pod["id"])
        if held is None:
            most = float(pod["price_per_hour"]) * ttl_seconds / 3600
            if len(self.alive) >= (max_pods or 0):
                return [{"outcome": "limit"}]
            if self._over_budget(most):
                return [{"outcome": "budget"}]
            self._numbers += 1
            known = {name: value for name, value in pod.items() if name in Pod.__dataclass_fields__}
            held = Pod(
                **known,
                created_at=self.clock(),
                number=self._numbers,
                bootstrap_hash=bootstrap_hash,
                deadline_at=self.clock() + ttl_seconds,
            )
            self.pods[held.id] = self.alive[held.id] = held
            held.intervals.append(Interval("boot", self.clock(), held.price_per_hour))
            self.reservations[held.id] = most
        return [
            {
                "outcome": "intended",
                "deadline_at": held.deadline_at,
                "deadline_seconds": held.deadline_at - self.clock(),
            }
        ]

    def do_record_pod(
        self, _: Speaker, for_worker: str, provider_id: str, price: float, details: Row | None = None
    ) -> list[Row]:
        pod, told = self.pods.get(for_worker), details or {}
        if pod is None or pod.pod_id not in (None, provider_id):
            return [{"outcome": "refused"}]
        if pod.status != "terminated":
            pod.pod_id = provider_id
            self._set_price(pod, price)
            pod.host, pod.cuda = told.get("host") or pod.host, told.get("cuda") or pod.cuda
            pod.vcpu, pod.ram_gb = told.get("vcpu") or pod.vcpu, told.get("ram_gb") or pod.ram_gb
        elif pod.pod_id is None:  # given up as never created, and there it is after all
            pod.pod_id, pod.terminated_at, pod.reason = provider_id, None, "found after it was given up"
            self._set_price(pod, price)
            self.alive[pod.id] = pod
            self.reservations[pod.id] = 0.0
            self._move(pod, "lost", None)
        else:
            return [{"outcome": "refused"}]
        if pod.id in self.reservations:
            self.reservations[pod.id] = price * (pod.deadline_at - pod.created_at) / 3600
        if told.get("created_at") and pod.intervals:
            first = pod.intervals[0]
            latest = self.clock() if first.ended_at is None else first.ended_at
            first.started_at = max(pod.created_at, min(_seconds(told["created_at"]), latest))
        return [{"outcome": "recorded"}]

    def do_lose_pod(self, _: Speaker, for_worker: str, why: str, counts: bool = True) -> list[Row]:
        pod = self.pods.get(for_worker)
        if pod is None or not self._condemn(for_worker, "lost", why):
            return [{"outcome": "refused"}]
        job = self.waiting.get(pod.bought_for or "")
        if counts and pod.active_at is None and job is not None:
            job.lost_attempts += 1
            if job.lost_attempts >= 3:
                self.do_fail_job(CONTROL, job.id, f"Lost 3 pods in a row; the last one: {why}")
        return [{"outcome": "lost"}]

    def do_known_pods(self, _: Speaker, worker_ids: list[str]) -> list[Row]:
        pods = [pod for name, pod in self.pods.items() if name in worker_ids]
        return [
            {
                "worker_id": pod.id,
                "pod_id": pod.pod_id,
                "status": pod.status,
                "docker_image": pod.docker_image,
                "age_seconds": self.clock() - pod.created_at,
            }
            for pod in pods
        ]

    def do_record_duplicate(
        self, _: Speaker, for_worker: str, provider_id: str, price: float, seconds: float
    ) -> list[Row]:
        pod = self.pods.get(for_worker)
        if pod is not None:
            self._bill_duplicate(pod, provider_id, price, seconds)
        return [{"outcome": "recorded"}]

    def _bill_duplicate(self, pod: Pod, provider_id: str, price: float, seconds: float) -> None:
        now = self.clock()
        known = {spell.duplicate for each in self.pods.values() for spell in each.intervals}
        if provider_id not in known:
            spell = Interval("teardown", now - max(0.0, seconds), price, ended_at=now, duplicate=provider_id)
            pod.intervals.append(spell)

    def do_expire_leases(self, _: Speaker, silent: list[str] | None = None) -> list[Row]:
        names = [
            name
            for name, pod in self.alive.items()
            if pod.status in ALIVE
            and self._heard_until(pod) < self.clock()
            and (silent is None or name in silent)
        ]
        for name in sorted(names):
            self._condemn(name, "lost", f"pod {name} was silent for longer than its lease")
        return [{"worker_id": name} for name in sorted(names)]

    def do_end_pod(
        self, _: Speaker, for_worker: str, why: str | None = None, billed_seconds_ago: float = 0
    ) -> list[Row]:
        if not self._condemn(for_worker, "terminated", why or "the pod ended"):
            return [{"outcome": "refused"}]
        pod = self.pods[for_worker]
        end = max(self.clock() - max(0.0, billed_seconds_ago), pod.heartbeat_at or 0.0, pod.created_at)
        for interval in pod.intervals:
            if interval.ended_at is not None and interval.ended_at > end:
                interval.started_at, interval.ended_at = min(interval.started_at, end), end
        self.reservations.pop(for_worker, None)
        return [{"outcome": "terminated"}]

    def do_fail_job(self, _: Speaker, for_job: str, why: str) -> list[Row]:
        held = self.waiting.get(for_job)
        if held is None:
            return [{"outcome": "refused"}]
        self._set_status(held, "failed")
        held.error, held.finished_at, held.pending_reason = why[:2000], self.clock(), None
        run = self.attempts.get((held.id, held.attempt))
        if run is not None and run.status == "pending":
            self._end_run(run, "failed", why[:2000])
        return [{"outcome": "failed"}]

    def do_abandon_run(self, speaker: Speaker, for_run: UUID, why: str) -> list[Row]:
        run = self.runs.get(str(for_run))
        pointed = speaker.role != "pod" or (run is not None and run.hinted == speaker.name)
        if run is not None and run.status == "pending" and pointed and self._speaks(speaker):
            self._end_run(run, "lost", why)
            run.mirrored = True
            run.worker_id = speaker.name if speaker.role == "pod" else run.worker_id
            if run.job.status == "pending":
                if run.job.entrypoint is None:
                    self._set_status(run.job, "canceled")
                    run.job.finished_at = self.clock()
                else:
                    run.job.attempt += 1
        return [{"outcome": "abandoned"}]

    def do_mark_mirrored(self, _: Speaker, run_ids: list[UUID]) -> list[Row]:
        for run_id in run_ids:
            if str(run_id) in self.runs:
                self.runs[str(run_id)].mirrored = True
                self._unmirrored.pop(str(run_id), None)
        return [{"outcome": "marked"}]

    def do_known_runs(self, _: Speaker, flow_runs: list[UUID]) -> list[Row]:
        runs = [self.runs[str(name)] for name in flow_runs if str(name) in self.runs]
        return [
            {
                "run_id": run.id,
                "job_id": run.job.id,
                "status": run.status,
                "worker_id": run.worker_id,
                "mirrored": run.mirrored,
            }
            for run in runs
        ]

    def do_expire_scripts(self, _: Speaker) -> list[Row]:
        return []  # nobody opens one here

    def do_expire_events(self, _: Speaker, **__: Any) -> list[Row]:
        return [{"deleted": 0}]

    def do_publish_catalogue(self, _: Speaker, offers: list[Row], limits: Row) -> list[Row]:
        self.catalogue = {"offers": offers, "limits": limits}
        return [{"outcome": "published"}]

    def do_note_refusal(self, _: Speaker, subject: str, why: str, seconds: float) -> list[Row]:
        now, held = self.clock(), self.refusals.get(subject)
        failures = held["failures"] + 1 if held and held["until"] >= now - 86400 else 1
        self.refusals[subject] = {"failures": failures, "reason": why[:2000], "until": now + seconds}
        return [{"outcome": "noted", "failures": failures}]

    def do_clear_refusal(self, _: Speaker, subject: str) -> list[Row]:
        self.refusals.pop(subject, None)
        return [{"outcome": "cleared"}]

    # Pods ------------------------------------------------------------------------------------------

    def do_register_pod(
        self,
        speaker: Speaker,
        for_worker: str,
        as_boot: UUID,
        lease_seconds: int,
        models: list[str],
        proxy_hash: str | None = None,
        provider_id: str | None = None,
    ) -> list[Row]:
        pod, boot = self.alive.get(for_worker), str(as_boot)
        if pod is None or speaker.name != for_worker or not self._speaks(speaker):
            return [{"outcome": "refused"}]
        if pod.status not in ("starting", "active", "busy"):
            return [{"outcome": "shutdown"}]
        if pod.boots >= 5 and pod.boot != boot:
            self._condemn(for_worker, "lost", "its agent restarted 5 times")
            return [{"outcome": "shutdown"}]
        held, now = pod.run, self.clock()
        if pod.boot != boot:
            pod.idle_since, pod.boots, pod.boot = now, pod.boots + 1, boot
            self._move(pod, "active", None)
            if held is not None:
                self._lose_run(held, f"the agent of pod {for_worker} restarted")
        if pod.pod_id is not None and provider_id not in (None, pod.pod_id):
            self._bill_duplicate(pod, pod.pod_id, pod.price_per_hour, now - pod.created_at)
        pod.pod_id = provider_id or pod.pod_id
        pod.proxy_hash = proxy_hash or pod.proxy_hash
        pod.heartbeat_at, pod.active_at, pod.cached_models = now, pod.active_at or now, list(models)
        pod.lease_seconds = min(lease_seconds, 3600)
        pod.lease_expires_at = now + pod.lease_seconds
        return [
            {"outcome": "registered", "gpu_count": pod.gpu_count, "deadline_seconds": pod.deadline_at - now}
        ]

    def do_renew_lease(
        self, speaker: Speaker, for_worker: str, as_boot: UUID, lease_seconds: int, models: list[str]
    ) -> list[Row]:
        pod, now = self.alive.get(for_worker), self.clock()
        held = speaker.name == for_worker and self._speaks(speaker)
        if pod is None or not held or pod.boot != str(as_boot) or pod.status not in ALIVE:
            return [{"fenced": True}]
        pod.heartbeat_at, pod.lease_seconds = now, min(lease_seconds, 3600)
        pod.lease_expires_at = now + pod.lease_seconds
        pod.cached_models = list(models)
        next_run = None
        if pod.run is None and pod.status == "active" and not pod.shutdown_requested:
            next_run = self._look_for_work(pod)
        return [
            {
                "fenced": False,
                "shutdown": pod.shutdown_requested or pod.status == "draining",
                "cancel": pod.run is not None and pod.run.job.cancel_requested,
                "run_id": pod.run.id if pod.run else None,
                "next_run": next_run,
                "deadline_seconds": pod.deadline_at - now,
                "deadline_at": pod.deadline_at,
            }
        ]

    def do_open_run(self, speaker: Speaker, for_run: UUID, for_worker: str, as_boot: UUID) -> list[Row]:
        known = self._speaks(speaker)
        run = self.runs.get(str(for_run)) if known else None
        pod = self.alive.get(for_worker) if known and speaker.name == for_worker else None
        refusal = self._why_not_open(run, pod, str(as_boot))
        if refusal is not None or run is None or pod is None:
            return [{"outcome": "refused", "reason": refusal}]
        now, job = self.clock(), run.job
        run.status, run.worker_id, run.boot = "in_progress", pod.id, str(as_boot)
        run.started_at = run.started_at or now
        self._set_status(job, "in_progress")
        job.started_at, job.pending_reason = job.started_at or now, None
        pod.idle_since = None
        self._move(pod, "busy", run)
        return [{"outcome": "opened", "job": job.shown(), "attempt": run.attempt, "gpu_count": pod.gpu_count}]

    def do_append_events(
        self, speaker: Speaker, for_run: UUID, as_boot: UUID, first_sequence: int, batch: list[Row]
    ) -> list[Row]:
        """Sign of life alone: what a run logs is not kept here."""
        run = self.runs.get(str(for_run))
        if (
            run is None
            or run.boot != str(as_boot)
            or run.status != "in_progress"
            or not self._reaches(speaker, run)
        ):
            return [{"outcome": "stale"}]
        run.logged_at = self.clock()
        return [{"outcome": "stored", "next_sequence": first_sequence + len(batch)}]

    def do_finish_run(
        self,
        speaker: Speaker,
        for_run: UUID,
        as_boot: UUID,
        result: str,
        why: str | None = None,
        log_file_id: str | None = None,
        result_outputs: Row | None = None,
    ) -> list[Row]:
        run = self.runs.get(str(for_run))
        if run is None or run.boot != str(as_boot) or not self._reaches(speaker, run):
            return [{"outcome": "stale", "status": None}]
        if run.status == result:
            return [{"outcome": "finished", "job": run.job.shown()}]
        if run.status != "in_progress":
            return [{"outcome": "stale", "status": run.status}]
        run.log_file = log_file_id
        if result == "lost":
            self._lose_run(run, why)
        else:
            self._finish_run(run, result, why, result_outputs)
        pod = self.alive.get(run.worker_id or "")
        if pod is not None and pod.run is run:
            pod.idle_since = self.clock()
            if run.job.model is not None and run.job.model not in pod.cached_models:
                pod.cached_models = [*pod.cached_models, run.job.model]
            self._move(pod, "active" if pod.status == "busy" else pod.status, None)
        if result == "failed" and run.worker_id is not None:
            self._retire_failing(run.worker_id)
        return [{"outcome": "finished", "job": run.job.shown()}]

    def do_release_pod(
        self, speaker: Speaker, for_worker: str, as_boot: UUID, why: str, forced: bool = False
    ) -> list[Row]:
        pod = self.alive.get(for_worker)
        ours = pod is not None and speaker.name == for_worker and self._speaks(speaker)
        if pod is None or not ours or pod.boot != str(as_boot) or pod.run is not None:
            return [{"outcome": "refused"}]
        if pod.status not in ("active", "draining") or (not forced and self._is_hinted(pod)):
            return [{"outcome": "refused"}]
        pod.reason = why
        self._move(pod, "draining", None)
        return [{"outcome": "draining"}]

    def do_reject_pod(self, speaker: Speaker, for_worker: str, why: str) -> list[Row]:
        ours = speaker.name == for_worker and self._speaks(speaker)
        rejected = ours and self._condemn(for_worker, "lost", f"unusable host: {why}"[:500])
        return [{"outcome": "rejected" if rejected else "refused"}]

    # What it costs ---------------------------------------------------------------------------------

    def cost(self, pod: Pod) -> float:
        """USD of a pod until now."""
        ends = ((i, self.clock() if i.ended_at is None else i.ended_at) for i in pod.intervals)
        return sum(i.price * (end - i.started_at) / 3600 for i, end in ends)

    # What several of them do -----------------------------------------------------------------------

    def _speaks(self, speaker: Speaker) -> bool:
        if speaker.role != "pod":
            return True
        pod = self.alive.get(speaker.name)
        return pod is not None and pod.session is not None and pod.session == speaker.session

    def _require_session(self, speaker: Speaker) -> None:
        if not self._speaks(speaker):
            raise AuthenticationError("the pod has ended")

    def _reaches(self, speaker: Speaker, run: Run) -> bool:
        return speaker.role == "person" or (speaker.name == run.worker_id and self._speaks(speaker))

    def redeem(self, worker_id: str, bootstrap_hash: str, session: str) -> bool:
        """The exchange of a pod's one-time token for its session."""
        pod = self.alive.get(worker_id)
        if pod is None or pod.bootstrap_hash != bootstrap_hash or pod.session not in (None, session):
            return False
        pod.session = session
        return True

    def _set_status(self, job: Job, status: str) -> None:
        job.status = status
        if status == "pending":
            self.waiting[job.id] = job
        else:
            self.waiting.pop(job.id, None)

    def _reset(self, job: Job, speaker: Speaker) -> None:
        self._set_status(job, "pending")
        job.attempt += 1
        job.outputs = job.error = job.pending_reason = job.started_at = job.finished_at = None
        job.cancel_requested, job.failed_attempts, job.lost_attempts = False, 0, 0
        if speaker.role == "person":
            job.created_by = speaker.name

    def _end_run(self, run: Run, status: str, why: str | None) -> None:
        run.status, run.error, run.finished_at = status, why, self.clock()

    def _move(self, pod: Pod, status: str, run: Run | None) -> None:
        """Change the pod's state; what its seconds are for changes with it."""
        if (pod.status, pod.run) == (status, run):
            return
        pod.status, pod.run = status, run
        for interval in pod.intervals:
            if interval.ended_at is None:
                interval.ended_at = self.clock()
        kinds = {"starting": "boot", "active": "idle", "busy": "run"}
        if status == "terminated":
            if pod.pod_id is None:
                pod.intervals.clear()  # it never existed at the provider
            return
        kind = kinds.get(status, "run" if run is not None else "teardown")
        run_id = run.id if run is not None and kind == "run" else None
        pod.intervals.append(Interval(kind, self.clock(), pod.price_per_hour, run_id))

    def _set_price(self, pod: Pod, price: float) -> None:
        if price != pod.price_per_hour:
            pod.price_per_hour = price
            for interval in pod.intervals:
                interval.price = price

    def _condemn(self, name: str, verdict: str, why: str) -> bool:
        pod = self.alive.get(name)
        if pod is None or pod.status == verdict:
            return False
        held = pod.run
        pod.boot = None
        pod.reason = why if verdict == "lost" else pod.reason or why
        if verdict == "terminated":
            pod.terminated_at = self.clock()
            del self.alive[name]
        self._move(pod, verdict, None)
        if held is not None:
            self._lose_run(held, why)
        return True

    def _lose_run(self, run: Run, why: str | None) -> None:
        if run.status != "in_progress":
            return
        job, ending = run.job, None
        self._end_run(run, "lost", why)
        if job.status != "in_progress":
            return
        ours = job.entrypoint is not None and job.type != "script"
        if job.cancel_requested:
            ending = "canceled"
        elif not ours or job.lost_attempts + 1 >= 3:
            ending = "failed"
        job.lost_attempts += 1
        job.error = None
        if ending == "failed":
            job.error = f"Lost 3 pods in a row; the last one: {why}" if ours else why
        if ending is None:
            job.attempt += 1
            job.started_at = None
        job.finished_at = self.clock() if ending else None
        self._set_status(job, ending or "pending")

    def _finish_run(self, run: Run, result: str, why: str | None, outputs: Row | None) -> None:
        job = run.job
        again = result == "failed" and not job.cancel_requested and job.failed_attempts < job.retries
        self._end_run(run, result, why)
        if job.status != "in_progress":
            return
        job.attempt += again
        job.failed_attempts += result == "failed"
        job.lost_attempts = 0
        job.error = None if again else why
        job.outputs = (outputs or {}) if result == "completed" else outputs
        if again:
            job.started_at = None
        job.finished_at = None if again else self.clock()
        self._set_status(job, "pending" if again else result)

    def _retire_failing(self, worker_id: str) -> None:
        pod = self.alive.get(worker_id)
        ended = [
            run for run in self.runs.values() if run.worker_id == worker_id and run.finished_at is not None
        ]
        newest = sorted(ended, key=lambda run: -run.number)[:5]
        if pod is None or pod.status not in ("active", "busy") or len(newest) < 5:
            return
        if any(run.status != "failed" for run in newest) or len({run.job.id for run in newest}) < 2:
            return
        since = min(run.started_at for run in newest if run.started_at is not None)
        elsewhere = (
            run
            for run in self.runs.values()
            if run.status == "completed" and run.worker_id not in (None, worker_id)
        )
        if any(run.finished_at is not None and run.finished_at > since for run in elsewhere):
            pod.reason = "five failed runs in a row"
            self._move(pod, "draining", pod.run)

    def _is_hinted(self, pod: Pod) -> bool:
        fresh = self.clock() - HINT_SECONDS
        runs = (self.attempts.get((job.id, job.attempt)) for job in self.waiting.values())
        return any(
            run is not None
            and run.status == "pending"
            and run.hinted == pod.id
            and run.hinted_at is not None
            and run.hinted_at > fresh
            for run in runs
        )

    def _look_for_work(self, pod: Pod) -> str | None:
        if not self.waiting:
            return None
        pairs = [(job, self.attempts.get((job.id, job.attempt))) for job in self.waiting.values()]
        waiting = [
            run for job, run in pairs if run is not None and run.status == "pending" and fits(job, pod)
        ]
        pointed = [run for run in waiting if run.hinted == pod.id]
        if pointed:
            return min(pointed, key=lambda run: run.hinted_at or 0.0).id
        old = self.clock() - HINT_SECONDS
        free = [
            run
            for run in waiting
            if (run.hinted is None or (run.hinted_at or 0.0) < old)
            and (run.ceiling is None or pod.price_per_hour <= run.ceiling)
        ]
        if not free:
            return None
        run = min(free, key=lambda run: (-run.job.priority, run.job.created_at, run.job.number))
        run.hinted, run.hinted_at = pod.id, self.clock()
        return run.id

    def _why_not_open(self, run: Run | None, pod: Pod | None, boot: str) -> str | None:
        if run is None:
            return "unknown run"
        if pod is None:
            return "another pod"
        if run.status == "in_progress" and run.boot == boot and run.worker_id == pod.id:
            return None
        job = run.job
        late = pod.lease_expires_at is not None and pod.lease_expires_at < self.clock()
        reasons = [
            (run.status != "pending", f"the run is {run.status}"),
            (job.status != "pending", f"the job is {job.status}"),
            (run.attempt != job.attempt, "a newer attempt exists"),
            (pod.boot != boot or late, "the lease is lost"),
            (pod.status != "active" or pod.shutdown_requested, f"the pod is {pod.status}"),
            (not fits(job, pod), "the pod does not fit"),
        ]
        return next((why for found, why in reasons if found), None)

    def _heard_until(self, pod: Pod) -> float:
        heard = pod.lease_expires_at or 0.0
        if pod.run is None or pod.run.logged_at is None:
            return heard
        return max(heard, pod.run.logged_at + pod.lease_seconds)

    def _over_budget(self, more: float) -> bool:
        if self.budget is None:
            return False
        spent = sum(self.cost(pod) for pod in self.pods.values() if pod.status == "terminated")
        return more + spent + sum(self.reservations.values()) > self.budget

    def _waiting_line(self) -> list[tuple[Job, int, int]]:
        """Job, its place, and its place among those with the same needs."""
        busy: dict[str, int] = {}
        for pod in self.alive.values():
            if pod.run is not None:
                busy[pod.run.job.created_by] = busy.get(pod.run.job.created_by, 0) + 1
        turns = []
        for job in sorted(self.waiting.values(), key=lambda job: (-job.priority, job.created_at, job.id)):
            busy[job.created_by] = turn = busy.get(job.created_by, 0) + 1
            turns.append((-job.priority, turn, job.created_at, job.id, job))
        turns.sort(key=lambda turn: turn[:4])
        in_class: dict[str, int] = {}
        line = []
        for place, (*_, job) in enumerate(turns, 1):
            in_class[job.needs_class] = in_class.get(job.needs_class, 0) + 1
            line.append((job, place, in_class[job.needs_class]))
        return line

    def _placeable(self) -> list[Pod]:
        return [
            pod
            for pod in self.alive.values()
            if pod.status in ("starting", "active") and not pod.shutdown_requested
        ]

    def _shown_waiting(self, job: Job) -> Row:
        run = self.attempts.get((job.id, job.attempt))
        hinted_at = run.hinted_at if run is not None else None
        return {
            "job_id": job.id,
            "run_id": run.id if run else None,
            "attempt": job.attempt,
            "type": job.type,
            "model": job.model,
            "params": job.params,
            "mounts": job.mounts,
            "entrypoint": job.entrypoint,
            "docker_image": job.docker_image,
            "requires_vram_gb": job.requires_vram_gb,
            "allowed_hardware": job.allowed_hardware,
            "max_price_per_hour": job.max_price_per_hour,
            "cloud": job.cloud,
            "min_cuda": job.min_cuda,
            "min_vcpu": job.min_vcpu,
            "min_ram_gb": job.min_ram_gb,
            "priority": job.priority,
            "owner": job.created_by,
            "needs_class": job.needs_class,
            "created_at": job.created_at,
            "pending_reason": job.pending_reason,
            "ceiling_per_hour": run.ceiling if run else None,
            "hinted_worker_id": run.hinted if run else None,
            "hinted_seconds_ago": None if hinted_at is None else self.clock() - hinted_at,
        }

    def _shown_pod(self, pod: Pod) -> Row:
        now = self.clock()
        return pod.shown() | {
            "age_seconds": now - pod.created_at,
            "idle_seconds": None if pod.idle_since is None else now - pod.idle_since,
            "overdue_seconds": now - pod.deadline_at,
            "heartbeat_seconds": None if pod.heartbeat_at is None else now - pod.heartbeat_at,
            "silent_seconds": now - self._heard_until(pod) if pod.status in ALIVE else None,
        }

    def _shown_refusals(self) -> Row:
        now = self.clock()
        return {
            subject: {
                "failures": held["failures"],
                "reason": held["reason"],
                "seconds_left": held["until"] - now,
            }
            for subject, held in self.refusals.items()
            if held["until"] > now - 6 * 3600
        }

    def _shown_unmirrored(self) -> list[Row]:
        settled = self.clock() - 10
        runs = [
            run
            for run in self._unmirrored.values()
            if not run.mirrored
            and run.finished_at is not None
            and (run.status in ("lost", "canceled") or run.started_at is None or run.finished_at < settled)
        ]
        runs.sort(key=lambda run: run.finished_at or 0.0)
        return [
            {"run_id": run.id, "job_id": run.job.id, "status": run.status, "error": run.error}
            for run in runs[:100]
        ]


class View:
    """The ledger as one speaker reaches it."""

    def __init__(self, ledger: ModelLedger, speaker: Speaker) -> None:
        self._ledger = ledger
        self.speaker = speaker

    @property
    def organization_id(self) -> str:
        return ORGANIZATION

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        return self._ledger.call(self.speaker, function, arguments)

    def close(self) -> None:
        """Nothing to give back."""


def _seconds(instant: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(instant).timestamp()
