"""Which call comes next in the state-machine tests: mostly one that may well change something."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from random import Random
from typing import Any

from openweights_prefect.ledger.identity import hash_secret
from tests.ledger.ledger_model import MOST_PODS, Call
from tests.ledger.ledger_world import World

IMAGE = "openweights/test:latest"
POD = {"docker_image": IMAGE, "hardware": "1x L4", "gpu_type": "NVIDIA L4", "gpu_count": 1, "vram_gb": 19,
       "cloud": "SECURE", "price_per_hour": 0.4}  # fmt: skip
FILES = [f"mount:file-{letter}" for letter in "abcd"]
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "second": {},
    "third": {"retries": 2},
    "retried": {"retries": 1, "files": [FILES[0]]},
    "reader": {"files": FILES[1:2]},
    "other reader": {"files": FILES[2:]},
    "large": {"requires_vram_gb": 80},
    "flow": {"type": "flow", "entrypoint": None},
}
SCRIPTS = ["script-1", "script-2"]
PODS = [f"pod-{number}" for number in range(1, 9)]
RESULTS = ["completed", "failed", "canceled", "lost"]


def open_jobs(world: World) -> list[str]:
    """Those that may be submitted and run now."""
    held = world.model.jobs
    return [
        name for name in JOBS if name not in held or held[name].status in ("pending", "failed", "canceled")
    ]


def waiting_readers(world: World) -> list[str]:
    """Those that read files, and do not yet."""
    held = world.model.jobs
    return [name for name in open_jobs(world) if "files" in JOBS[name]
            and (name not in held or held[name].status != "pending")]  # fmt: skip


def idle_pods(world: World) -> list[str]:
    """Those that may take a run now, or be bought."""
    held = world.model.pods
    idle = [name for name, pod in held.items() if pod.status == "active" and not pod.shutdown_requested]
    return idle or [name for name in PODS if name not in held]


def a_job(draw: Random, world: World, names: list[str] | None = None) -> dict[str, Any]:
    """A job of a few names, with options that a second submit may change."""
    name = _job_name(draw, world, names or list(JOBS))
    base = {"id": name, "type": "probe", "docker_image": IMAGE, "entrypoint": "true", "files": [],
            "retries": 0, "requires_vram_gb": 0, "params": {}}  # fmt: skip
    return {**base, **JOBS[name], "priority": draw.randint(0, 2)}


def _job_name(draw: Random, world: World, names: list[str]) -> str:
    if world.focus.job in names and draw.randint(0, 7):
        return str(world.focus.job)
    return str(draw.choice(names))


def _pod(draw: Random, world: World) -> str:
    if world.focus.pod and draw.randint(0, 7):
        return world.focus.pod
    alive = [name for name, pod in world.model.pods.items() if pod.status != "terminated"]
    return str(draw.choice((alive or PODS) * 5 + PODS))


def _run(draw: Random, world: World, status: str = "pending") -> uuid.UUID:
    """Mostly one that has this status."""
    if world.focus.run and draw.randint(0, 7):
        return world.focus.run
    every = list(world.model.runs)
    fitting = [name for name in every if world.model.runs[name].status == status] or every
    found: uuid.UUID = draw.choice(fitting * 4 + every or [uuid.UUID(int=0)])
    return found


def newest_boot(draw: Random, world: World, pod: str) -> uuid.UUID:
    """Mostly the newest process of the pod; never one of another pod, which could not know it."""
    known = world.boots.get(pod) or [uuid.UUID(int=1)]
    found: uuid.UUID = draw.choice(known[-1:] * 2 + known)
    return found


def _holder(draw: Random, world: World, run_id: uuid.UUID) -> tuple[str, uuid.UUID]:
    """Who writes about a run, and under which lease: mostly who executes it."""
    run = world.model.runs.get(run_id)
    if run is not None and run.boot is not None and draw.randint(0, 5):
        return run.worker or "person", run.boot
    pod = _pod(draw, world)
    return pod, newest_boot(draw, world, pod)


def stored_file(file_id: str) -> Call:
    row = {"id": file_id, "purpose": "mount", "filename": "f", "bytes": 1, "sha256": "0" * 64}
    return Call("person", "register_file", {"file": row})


def register_file(draw: Random, world: World) -> Call:
    return stored_file(draw.choice(FILES))


def delete_file(draw: Random, world: World) -> Call:
    return Call("person", "delete_file", {"file_id": world.focus.file or draw.choice(FILES)})


def submit_job(draw: Random, world: World) -> Call:
    return Call("person", "submit_job", {"job": a_job(draw, world)})


def cancel_job(draw: Random, world: World) -> Call:
    return Call("person", "cancel_job", {"job_id": _job_name(draw, world, [*JOBS, *SCRIPTS])})


def restart_job(draw: Random, world: World) -> Call:
    return Call("person", "restart_job", {"job_id": _job_name(draw, world, [*JOBS, *SCRIPTS])})


def record_flow_run(draw: Random, world: World) -> Call:
    name = _job_name(draw, world, list(world.model.jobs) or list(JOBS))
    held = world.model.jobs.get(name)
    attempt = (held.attempt if held else 1) - (draw.randint(0, 5) == 5)
    again = draw.randint(0, 5) == 5
    run = _run(draw, world) if again else world.new_id()
    return Call("control", "record_flow_run", {"for_job": name, "for_attempt": attempt, "flow_run": run})


def adopt_flow_run(draw: Random, world: World) -> Call:
    created = draw.choice(["2000-01-01T00:00:00Z", "2999-01-01T00:00:00Z"])
    return Call("control", "adopt_flow_run",
                {"job": a_job(draw, world), "flow_run": world.new_id(), "created": created})  # fmt: skip


def hint_runs(draw: Random, world: World) -> Call:
    if not (world.model.runs and world.model.pods):
        return Call("control", "hint_runs", {"hints": {}})
    pod = draw.choice(list(world.model.pods))
    return Call("control", "hint_runs", {"hints": {str(_run(draw, world)): pod}})


def abandon_run(draw: Random, world: World) -> Call:
    speaker = draw.choice(["control", _pod(draw, world)])
    return Call(speaker, "abandon_run", {"for_run": _run(draw, world), "why": "its flow run is gone"})


def intended(world: World, pod: str, bought_for: str | None = None) -> Call:
    row = {"id": pod, "bought_for": bought_for, **POD}
    return Call("control", "intend_pod", {"pod": row, "bootstrap_hash": world.token(pod),
                                          "ttl_seconds": 3600, "max_pods": MOST_PODS})  # fmt: skip


def intend_pod(draw: Random, world: World) -> Call:
    return intended(world, draw.choice(PODS), draw.choice([None, *world.model.jobs]))


def fail_job(draw: Random, world: World) -> Call:
    return Call(
        "control", "fail_job", {"for_job": draw.choice(["unknown", *world.model.jobs]), "why": "no image"}
    )


def reject_pod(draw: Random, world: World) -> Call:
    pod = _pod(draw, world)
    speaker = pod if draw.randint(0, 7) else _pod(draw, world)
    return Call(speaker, "reject_pod", {"for_worker": pod, "why": "no GPU"})


def record_pod(draw: Random, world: World) -> Call:
    provider_id = draw.choice(["provider-1", "provider-1", "provider-2"])
    return Call("control", "record_pod",
                {"for_worker": _pod(draw, world), "provider_id": provider_id, "price": 0.4})  # fmt: skip


def redeemed(world: World, pod: str, session: str) -> Call:
    source = f"{pod}/{world.organization_id}/{world.number()}"  # Of its own: nobody is slowed down here.
    arguments = {"hash": world.token(pod), "session_hash": session, "source": source}
    return Call("service", "redeem_bootstrap", arguments)


def redeem_bootstrap(draw: Random, world: World) -> Call:
    """A second agent with the same token makes another secret."""
    pod = _pod(draw, world)
    known = world.model.pods.get(pod)
    stolen = known is not None and known.session is not None and (draw.random() < 0.5)
    return redeemed(world, pod, hash_secret("of a thief") if stolen else world.secret(pod))


def registered(speaker: str, pod: str, boot: uuid.UUID) -> Call:
    arguments = {"for_worker": pod, "as_boot": boot, "lease_seconds": 3600, "models": []}
    return Call(speaker, "register_pod", arguments)


def register_pod(draw: Random, world: World) -> Call:
    pod = _pod(draw, world)
    known = world.boots.setdefault(pod, [])
    if not known or draw.randint(0, 1):
        known.append(world.new_id())
    speaker = pod if draw.randint(0, 7) else _pod(draw, world)
    return registered(speaker, pod, newest_boot(draw, world, pod))


def renew_lease(draw: Random, world: World) -> Call:
    pod = _pod(draw, world)
    speaker = pod if draw.randint(0, 7) else _pod(draw, world)
    return Call(speaker, "renew_lease", {"for_worker": pod, "as_boot": newest_boot(draw, world, pod),
                                         "lease_seconds": 3600, "models": []})  # fmt: skip


def open_run(draw: Random, world: World) -> Call:
    pod = draw.choice([*idle_pods(world), _pod(draw, world)])
    speaker = pod if draw.randint(0, 7) else _pod(draw, world)
    return opened(speaker, pod, _run(draw, world), newest_boot(draw, world, pod))


def opened(speaker: str, pod: str, run: uuid.UUID, boot: uuid.UUID) -> Call:
    return Call(speaker, "open_run", {"for_run": run, "for_worker": pod, "as_boot": boot})


def append_events(draw: Random, world: World) -> Call:
    run_id = _run(draw, world, "in_progress")
    speaker, boot = _holder(draw, world, run_id)
    run = world.model.runs.get(run_id)
    first = max(0, (len(run.events) if run else 0) + draw.choice([0, 0, 1, -1, -3]))
    stored = run.events[first:] if run else []
    known = [{"at": 1.0, "data": data} for data in stored]
    count = draw.randint(0 if known else 1, 3)
    new = [{"at": 1.0, "data": {draw.choice("xy"): draw.choice([None, *range(10)])}}
           for _ in range(count)]  # fmt: skip
    return Call(speaker, "append_events", {"for_run": run_id, "as_boot": boot, "first_sequence": first,
                                           "batch": known + new})  # fmt: skip


def append_log(draw: Random, world: World) -> Call:
    run_id = _run(draw, world, "in_progress")
    speaker, boot = _holder(draw, world, run_id)
    run = world.model.runs.get(run_id)
    start = max(0, (run.log_bytes if run else 0) + draw.choice([0, 0, 1, -1]))
    piece = "x" * draw.randint(1, 4)
    return Call(speaker, "append_log", {"for_run": run_id, "as_boot": boot, "from_offset": start,
                                        "to_offset": start + len(piece), "piece": piece})  # fmt: skip


def finish_run(draw: Random, world: World) -> Call:
    run_id = _run(draw, world, "in_progress")
    speaker, boot = _holder(draw, world, run_id)
    result = draw.choice(RESULTS)
    why = None if result == "completed" else f"it {result}"
    return Call(speaker, "finish_run", {"for_run": run_id, "as_boot": boot, "result": result, "why": why})


def release_pod(draw: Random, world: World) -> Call:
    pod = _pod(draw, world)
    arguments = {"for_worker": pod, "as_boot": newest_boot(draw, world, pod), "why": "idle"}
    return Call(pod, "release_pod", {**arguments, "forced": (draw.random() < 0.5)})


def lose_pod(draw: Random, world: World) -> Call:
    counts = draw.random() < 0.8
    return Call(
        "control", "lose_pod", {"for_worker": _pod(draw, world), "why": "host gone", "counts": counts}
    )


def end_pod(draw: Random, world: World) -> Call:
    return Call("control", "end_pod", {"for_worker": _pod(draw, world), "why": "it is gone"})


def request_shutdown(draw: Random, world: World) -> Call:
    return Call("person", "request_shutdown", {"for_worker": _pod(draw, world)})


def expire_leases(draw: Random, world: World) -> Call:
    return Call("control", "expire_leases", {})


def expire_scripts(draw: Random, world: World) -> Call:
    return Call("control", "expire_scripts", {})


def open_script(draw: Random, world: World) -> Call:
    name = draw.choice(SCRIPTS)
    run = uuid.uuid5(uuid.UUID(world.organization_id), name)
    return Call("person", "open_script", {"for_job": name, "for_run": run, "as_boot": uuid.uuid5(run, "boot"),
                                          "command": "python probe.py", "lease_seconds": 3600})  # fmt: skip


def renew_script(draw: Random, world: World) -> Call:
    run_id = _run(draw, world, "in_progress")
    run = world.model.runs.get(run_id)
    boot = (run.boot if run else None) or world.new_id()
    return Call("person", "renew_script", {"for_run": run_id, "as_boot": boot, "lease_seconds": 3600})


Chooser = Callable[[Random, World], Call]
OF_PEOPLE: list[Chooser] = [
    submit_job, submit_job, cancel_job, restart_job, request_shutdown, register_file, delete_file,
    open_script, renew_script,
]  # fmt: skip
OF_CONTROL: list[Chooser] = [
    record_flow_run, record_flow_run, adopt_flow_run, hint_runs, abandon_run, intend_pod, record_pod,
    lose_pod, lose_pod, end_pod, expire_leases, expire_leases, expire_scripts, fail_job,
]  # fmt: skip
OF_PODS: list[Chooser] = [
    open_run, open_run, open_run, register_pod, register_pod, renew_lease, renew_lease, release_pod,
    redeem_bootstrap, reject_pod,
]  # fmt: skip
OF_RUNS: list[Chooser] = [append_events, append_events, append_log, finish_run, finish_run]
# What has been prepared, who comes there, and whom it meets.
MEETINGS: list[tuple[str, Chooser, list[Chooser]]] = [
    ("claim", open_run, [lose_pod, end_pod, register_pod, release_pod, cancel_job, open_run, abandon_run]),
    ("claim", renew_lease, [renew_lease, open_run, hint_runs, register_pod]),
    ("work", finish_run, [lose_pod, end_pod, register_pod, cancel_job, append_events, finish_run]),
    ("work", append_events, [append_events, append_log, lose_pod, register_pod, finish_run]),
    ("work", register_pod, [register_pod, lose_pod, end_pod, renew_lease]),
    ("silence", expire_leases, [renew_lease, expire_leases, finish_run, register_pod, end_pod]),
    ("files", delete_file, [submit_job, restart_job, adopt_flow_run]),
    ("nothing", submit_job, [submit_job, cancel_job, restart_job, adopt_flow_run, register_file]),
    ("nothing", intend_pod, [intend_pod, intend_pod, end_pod]),
    ("claim", fail_job, [open_run, renew_lease, cancel_job, lose_pod, fail_job]),
    ("work", reject_pod, [finish_run, lose_pod, register_pod, renew_lease]),
    ("claim", record_flow_run, [record_flow_run, cancel_job, abandon_run, adopt_flow_run]),
    ("nothing", open_script, [open_script, renew_script, expire_scripts, cancel_job]),
]
