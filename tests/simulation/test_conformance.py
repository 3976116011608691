"""The model of the ledger answers as the real one: the same random calls go to both."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from random import Random
from typing import Any

import psycopg
import pytest

from openweights_prefect.errors import AuthenticationError, PermissionDeniedError
from openweights_prefect.ledger.protocol import Ledger
from tests.callers import Callers, bootstrap_hash
from tests.simulation.model_ledger import CONTROL, ModelLedger, Speaker
from tests.simulation.model_rows import Row

IMAGE = "openweights/test:latest"
USERS = [str(uuid.UUID(int=n)) for n in (7, 8, 9)]
HARDWARE = [("1x L4", 19, 0.4), ("1x A100", 75, 1.2), ("2x A100", 150, 2.4)]
NEEDS: list[Row] = [
    {},
    {"requires_vram_gb": 70},
    {"allowed_hardware": ["2x A100"]},
    {"max_price_per_hour": 0.5},
    {"cloud": "SECURE"},
    {"min_cuda": "12.10"},
    {"min_vcpu": 8, "min_ram_gb": 64},
    {"docker_image": "other"},
]
SECONDS = [0.7, 3.3, 12.9, 31.7, 64.3, 131.9]
REFUSALS = {"refused", "stale", "fenced", "shutdown", "not_found", "abandoned"}
SHIFTED = {
    "ledger.worker": "created_at deadline_at lease_expires_at heartbeat_at idle_since active_at",
    "ledger.runs": "created_at logged_at hinted_at started_at finished_at",
    "ledger.jobs": "created_at started_at finished_at",
    "ledger.pod_intervals": "started_at ended_at",
    "ledger.refusals": "until refused_at",
}
STEPS = 160


class Both:
    """The model and the real ledger, side by side."""

    def __init__(self, callers: Callers, seed: int) -> None:
        self.random = Random(seed)
        self.shift = 0.0
        self.model = ModelLedger(lambda: time.time() + self.shift)
        self.history: list[str] = []
        self.boots: dict[str, list[uuid.UUID]] = {}
        self._callers = callers
        self._admin = psycopg.connect(callers.url.replace("authenticator@", "postgres@"), autocommit=True)
        self._admin.execute("set session_replication_role = replica")
        self._people = {user: self._person(user) for user in USERS}

    def _person(self, user: str) -> Ledger:
        self._admin.execute(
            "insert into ledger.members (organization_id, user_id, role) values (%s, %s, 'user') "
            "on conflict do nothing",
            [self._callers.organization_id, user],
        )
        claims = {
            "role": "authenticated",
            "aud": "authenticated",
            "sub": user,
            "organization_id": self._callers.organization_id,
        }
        return self._callers.open_as(claims)

    def close(self) -> None:
        self._admin.close()
        for person in self._people.values():
            person.close()

    def pass_time(self, seconds: float) -> None:
        """Everything that is stored becomes so much older."""
        self.history.append(f"{seconds} s pass")
        self.shift += seconds
        for table, columns in SHIFTED.items():
            moved = ", ".join(
                f"{name} = {name} - make_interval(secs => {seconds})" for name in columns.split()
            )
            self._admin.execute(f"update {table} set {moved}".encode())

    def call(self, speaker: Speaker, function: str, **arguments: Any) -> list[Row]:
        self.history.append(f"{speaker.role} {speaker.name}: {function} {arguments}")
        expected = self.model.call(speaker, function, arguments)
        try:
            found = self._real(speaker).call(function, **arguments)
        except (AuthenticationError, PermissionDeniedError) as exc:
            found = [{"outcome": type(exc).__name__}]
            words = {str(row.get("outcome", "fenced")) for row in expected}
            self.expect(True, words <= REFUSALS, f"{function} was refused; the model says {expected}")
            return found
        self.expect(_told(function, expected), _told(function, found), f"answer of {function}")
        return found

    def look(self) -> None:
        """Both show the same."""
        [expected], [found] = (
            self.model.call(CONTROL, "control_snapshot", {}),
            self._callers.control.call("control_snapshot"),
        )
        self.expect(_seen(expected), _seen(found), "control_snapshot")
        rows = self._admin.execute(
            "select worker_id, sum(price_per_hour / 3600 * extract(epoch from coalesce(ended_at, now()) "
            "- started_at)) "
            "from ledger.pod_intervals group by worker_id"
        )
        costs = {name: float(usd) for name, usd in rows}
        for pod in self.model.pods.values():
            expected_usd = self.model.cost(pod)
            near = abs(costs.get(pod.id, 0.0) - expected_usd) < 0.002
            self.expect(True, near, f"the cost of {pod.id}: {expected_usd} and {costs.get(pod.id)}")
        reserved = {
            name: float(usd)
            for name, usd in self._admin.execute("select worker_id, usd from ledger.reservations")
        }
        self.expect(sorted(self.model.reservations), sorted(reserved), "reservations")
        for name, usd in reserved.items():
            self.expect(True, abs(usd - self.model.reservations[name]) < 0.01, f"reservation of {name}")
        jobs = {
            name: (status, attempt, failed, lost, error)
            for name, status, attempt, failed, lost, error in self._admin.execute(
                "select id, status, attempt, failed_attempts, lost_attempts, error from ledger.jobs"
            )
        }
        modelled = {
            job.id: (job.status, job.attempt, job.failed_attempts, job.lost_attempts, job.error)
            for job in self.model.jobs.values()
        }
        self.expect(modelled, jobs, "jobs")

    def expect(self, expected: object, found: object, what: str) -> None:
        if expected != found:
            raise AssertionError("\n".join([*self.history, f"{what}: {_difference(expected, found)}"]))

    def _real(self, speaker: Speaker) -> Ledger:
        if speaker.role == "pod":
            return self._callers.pod(speaker.name)
        return self._callers.control if speaker is CONTROL else self._people[speaker.name]


def _told(function: str, rows: list[Row]) -> object:
    if function in ("renew_lease",):
        names = ("fenced", "shutdown", "cancel", "run_id", "next_run")
        return [{name: row.get(name) for name in names} for row in rows]
    if function in ("expire_leases", "known_pods", "known_runs"):
        return sorted(
            tuple(sorted((k, str(v)) for k, v in row.items() if k != "age_seconds")) for row in rows
        )
    kept = ("outcome", "reason", "attempt", "gpu_count", "failures")
    return [{name: row[name] for name in kept if row.get(name) is not None} for row in rows]


def _seen(snapshot: Row) -> Row:
    """A snapshot as far as it can be compared: needs classes have other names, seconds differ."""
    waiting = snapshot["waiting"]
    names = ("job_id", "run_id", "attempt", "hinted_worker_id", "pending_reason", "owner", "ceiling_per_hour")
    pods = [
        {
            name: pod[name]
            for name in ("id", "status", "pod_id", "run_id", "host", "cuda", "reason", "shutdown_requested")
        }
        | {
            name: _rough(pod[name])
            for name in (
                "age_seconds",
                "heartbeat_seconds",
                "idle_seconds",
                "overdue_seconds",
                "silent_seconds",
            )
        }
        for pod in snapshot["pods"]
    ]
    return {
        "waiting": [{name: row[name] for name in names} for row in waiting],
        "total": snapshot["waiting_total"],
        "released": snapshot["released"],
        "fitting": {
            row["job_id"]: sorted(snapshot["fitting"].get(row["needs_class"], [])) for row in waiting
        },
        "pods": sorted(pods, key=lambda pod: str(pod["id"])),
        "refusals": {
            name: (row["failures"], _rough(row["seconds_left"])) for name, row in snapshot["refusals"].items()
        },
        "unmirrored": sorted(row["run_id"] for row in snapshot["unmirrored"]),
    }


class _Near(float):
    """Seconds: two servers and a slow machine do not agree on the last ones."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < 3.0

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__


def _rough(seconds: float | None) -> _Near | None:
    return None if seconds is None else _Near(seconds)


def _difference(expected: object, found: object) -> str:
    """The first place where they differ."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        for key in expected:
            if expected[key] != found[key]:
                return f"{key}: " + _difference(expected[key], found[key])
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return next(
            _difference(one, other) for one, other in zip(expected, found, strict=True) if one != other
        )
    return f"model {expected!r}, real {found!r}"


def _speaker(both: Both, pod: str) -> Speaker:
    """A pod with its session, which it gets at first use."""
    session = f"session of {pod}"
    both.model.redeem(pod, bootstrap_hash(pod), session)
    both._callers.pod(pod)
    return Speaker("pod", pod, session)


def submit(both: Both) -> None:
    name = f"job-{both.random.randint(0, 9)}"
    held = both.model.jobs.get(name)
    draw = Random(name)
    needs = {} if held else draw.choice(NEEDS)
    job: Row = {
        "id": name,
        "type": "probe",
        "entrypoint": "true",
        "docker_image": IMAGE,
        "params": {},
        "model": draw.choice([None, "m"]),
        "priority": draw.randint(0, 1),
        "retries": draw.randint(0, 2),
    }
    both.call(_user(both), "submit_job", job={**job, **needs})


def restart_or_cancel(both: Both) -> None:
    function = both.random.choice(["cancel_job", "restart_job"])
    both.call(_user(both), function, job_id=f"job-{both.random.randint(0, 9)}")


def create_flow_runs(both: Both) -> None:
    for job in both.model.waiting.values():
        if both.random.random() < 0.7:
            attempt = job.attempt - (both.random.random() < 0.1)
            both.call(
                CONTROL,
                "record_flow_run",
                for_job=job.id,
                for_attempt=attempt,
                flow_run=_id(both),
                ceiling=both.random.choice([None, None, 0.5]),
            )


def buy(both: Both) -> None:
    name = f"pod-{len(both.model.pods) if both.random.random() < 0.9 else 0}"
    hardware, vram, price = both.random.choice(HARDWARE)
    pod = {
        "id": name,
        "docker_image": IMAGE,
        "hardware": hardware,
        "gpu_type": "g",
        "gpu_count": 1,
        "vram_gb": vram,
        "cloud": both.random.choice(["SECURE", "COMMUNITY"]),
        "price_per_hour": price,
        "cuda": "12.8",
        "vcpu": 0,
        "ram_gb": 0,
        "bought_for": both.random.choice([*both.model.jobs, None]),
    }
    both.call(
        CONTROL, "intend_pod", pod=pod, bootstrap_hash=bootstrap_hash(name), ttl_seconds=900.0, max_pods=4
    )


def record(both: Both) -> None:
    if both.model.pods:
        name = both.random.choice([*both.model.pods])
        details = both.random.choice([{}, {"host": "h1", "cuda": "12.10"}, {"vcpu": 16, "ram_gb": 128}])
        provider_id = f"p-{name}" if both.random.random() < 0.9 else "p-other"
        both.call(
            CONTROL,
            "record_pod",
            for_worker=name,
            provider_id=provider_id,
            price=both.random.choice([0.4, 1.0]),
            details=details,
        )


def bring_up(both: Both) -> None:
    starting = [pod.id for pod in both.model.alive.values() if pod.status in ("starting", "active")]
    if starting:
        name = both.random.choice(starting)
        boots = both.boots.setdefault(name, [])
        if not boots or both.random.random() < 0.3:
            boots.append(_id(both))
        both.call(
            _speaker(both, name),
            "register_pod",
            for_worker=name,
            as_boot=boots[-1],
            lease_seconds=120,
            models=[],
            provider_id=both.random.choice([None, f"p-{name}", f"twin-{name}"]),
        )


def beat(both: Both) -> None:
    for name, boots in both.boots.items():
        if both.random.random() < 0.8:
            boot = boots[-1] if both.random.random() < 0.95 else boots[0]
            both.call(
                _speaker(both, name),
                "renew_lease",
                for_worker=name,
                as_boot=boot,
                lease_seconds=120,
                models=[],
            )


def open_run(both: Both) -> None:
    for run in [*both.model.runs.values()]:
        if run.status == "pending" and both.boots and both.random.random() < 0.6:
            name = run.hinted if run.hinted in both.boots else both.random.choice([*both.boots])
            both.call(
                _speaker(both, name),
                "open_run",
                for_run=uuid.UUID(run.id),
                for_worker=name,
                as_boot=both.boots[name][-1],
            )


def finish(both: Both) -> None:
    for run in [*both.model.runs.values()]:
        if run.worker_id in both.boots and run.boot is not None and both.random.random() < 0.4:
            result = both.random.choice(["completed", "failed", "failed", "lost", "canceled"])
            both.call(
                _speaker(both, run.worker_id),
                "finish_run",
                for_run=uuid.UUID(run.id),
                as_boot=uuid.UUID(run.boot),
                result=result,
                why=None if result == "completed" else result,
                result_outputs={"a": 1},
            )


def log(both: Both) -> None:
    for run in [*both.model.runs.values()]:
        if run.worker_id in both.boots and run.boot is not None and both.random.random() < 0.3:
            both.call(
                _speaker(both, run.worker_id),
                "append_events",
                for_run=uuid.UUID(run.id),
                as_boot=uuid.UUID(run.boot),
                first_sequence=0,
                batch=[{"data": {"x": 1}}],
            )


def hint(both: Both) -> None:
    pending = [run.id for run in both.model.runs.values() if run.status == "pending"]
    if pending and both.model.alive:
        both.call(
            CONTROL, "hint_runs", hints={both.random.choice(pending): both.random.choice([*both.model.alive])}
        )


def judge(both: Both) -> None:
    alive = [*both.model.alive]
    what = both.random.choice(
        [
            "lose_pod",
            "end_pod",
            "expire_leases",
            "fail_job",
            "note_refusal",
            "clear_refusal",
            "mark_mirrored",
            "known_pods",
            "record_duplicate",
            "set_pending_reasons",
            "set_ceilings",
        ]
    )
    name = both.random.choice([*both.model.pods, "pod-none"])
    jobs = [*both.model.jobs, "job-none"]
    arguments: dict[str, Callable[[], Row]] = {
        "lose_pod": lambda: {"for_worker": name, "why": "dead", "counts": both.random.random() < 0.7},
        "end_pod": lambda: {
            "for_worker": name,
            "why": "gone",
            "billed_seconds_ago": both.random.choice([0.0, 5.0, 100.0]),
        },
        "expire_leases": lambda: {"silent": both.random.choice([alive, alive[:1], None])},
        "fail_job": lambda: {"for_job": both.random.choice(jobs), "why": "never"},
        "note_refusal": lambda: {
            "subject": both.random.choice("ab"),
            "why": "no",
            "seconds": both.random.choice(SECONDS),
        },
        "clear_refusal": lambda: {"subject": both.random.choice("ab")},
        "mark_mirrored": lambda: {"run_ids": [uuid.UUID(run) for run in list(both.model.runs)[:3]]},
        "known_pods": lambda: {"worker_ids": ["pod-0", "pod-1", "pod-none"]},
        "record_duplicate": lambda: {
            "for_worker": name,
            "provider_id": both.random.choice(["twin-0", "twin-1"]),
            "price": 0.4,
            "seconds": 20.0,
        },
        "set_ceilings": lambda: {
            "ceilings": {run: both.random.choice([None, 0.5, 2.0]) for run in both.model.runs}
        },
        "set_pending_reasons": lambda: {
            "reasons": {both.random.choice(jobs): both.random.choice(["x", "y"])}
        },
    }
    both.call(CONTROL, what, **arguments[what]())


def end_of_pod(both: Both) -> None:
    if both.boots:
        name = both.random.choice([*both.boots])
        boot = both.boots[name][-1]
        match both.random.choice(["release", "release", "reject", "shut down", "extend", "abandon"]):
            case "release":
                both.call(
                    _speaker(both, name),
                    "release_pod",
                    for_worker=name,
                    as_boot=boot,
                    why="idle",
                    forced=both.random.random() < 0.3,
                )
            case "reject":
                both.call(_speaker(both, name), "reject_pod", for_worker=name, why="GPU 0")
            case "shut down":
                both.call(_user(both), "request_shutdown", for_worker=name)
            case "extend":
                both.call(
                    _user(both),
                    "extend_pod",
                    for_worker=name,
                    deadline_seconds=both.random.choice([300.0, 2000.0]),
                )
            case _:
                for run in [*both.model.runs.values()][-2:]:
                    both.call(CONTROL, "abandon_run", for_run=uuid.UUID(run.id), why="deleted")


def pass_time(both: Both) -> None:
    both.pass_time(both.random.choice(SECONDS))


def _user(both: Both) -> Speaker:
    return Speaker("person", both.random.choice(USERS))


def _id(both: Both) -> uuid.UUID:
    return uuid.UUID(int=both.random.getrandbits(128))


MOVES = [
    submit,
    submit,
    submit,
    restart_or_cancel,
    create_flow_runs,
    create_flow_runs,
    buy,
    buy,
    record,
    bring_up,
    bring_up,
    bring_up,
    beat,
    beat,
    beat,
    open_run,
    open_run,
    open_run,
    finish,
    finish,
    log,
    hint,
    judge,
    judge,
    end_of_pod,
    pass_time,
    pass_time,
]


@pytest.mark.parametrize("seed", range(6))
def test_the_model_answers_as_the_ledger(ledger: Callers, seed: int) -> None:
    """Whatever is called in whatever order; after each move both show the same."""
    both = Both(ledger, seed)
    try:
        for _ in range(STEPS):
            move = both.random.choice(MOVES)
            move(both)
            both.look()
    finally:
        both.close()
