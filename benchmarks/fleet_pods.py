"""A local stack with one pod, then with several: how fast jobs begin, and how fast canceled ones are dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from figures import Figure, p50, p90
from fleet_replay import p95
from local_product import Submitter, local_stack

from openweights_prefect import Job, Jobs, OpenWeights, StackError
from openweights_prefect.settings import Settings
from openweights_prefect.stack.environment import common_environment
from openweights_prefect.stack.service import Folders

_START_SECONDS = 120.0
_GONE_SECONDS = 60.0
_STUBBORN_EVERY = 4
"""Each fourth job ignores SIGTERM."""


def time_pods(
    folder: Path, environment: Mapping[str, str], *, pods: int, cancels: int, say: Callable[[str], None]
) -> dict[str, Figure]:
    """First lines with one pod and with `pods`, a burst, cancellations, and what the processes need."""
    neutral = {name: value for name, value in environment.items() if not name.startswith("OW_")}
    neutral = {**common_environment(Folders(folder / "stack"), neutral), "OW_MAX_WORKERS": str(pods)}
    say(f"Starting a local stack in {neutral['OW_HOME']!r}")
    with local_stack(neutral, lambda _: None) as settings, OpenWeights(settings=settings) as ow:
        submitter = Submitter(settings)
        figures: dict[str, Figure] = {"cancel_grace_seconds": settings.cancel_grace_seconds}
        try:
            say("One pod: first lines")
            figures |= _first_lines(submitter, 1, samples=10)
            say(f"{pods} pods: first lines, and a burst")
            figures[f"boot_seconds_{pods}_pods"] = round(submitter.boot_pods(pods), 1)
            figures |= _first_lines(submitter, pods, samples=12)
            jobs = 5 * pods
            seconds = submitter.time_burst(jobs)
            figures[f"jobs_per_minute_{pods}_pods"] = round(60 * jobs / seconds, 1)
            figures |= _memory(Path(neutral["OW_HOME"]), pods)
            say(f"{cancels} running jobs are canceled")
            figures |= _cancels(ow, settings, cancels, at_once=min(pods, 4))
        finally:
            submitter.close()
    return figures


def _first_lines(submitter: Submitter, pods: int, *, samples: int) -> dict[str, Figure]:
    for _ in range(4):
        submitter.time_one()
    seconds = [submitter.time_one().first_line for _ in range(samples)]
    name = f"first_line_{{}}_seconds_{pods}_pod{'s' if pods > 1 else ''}"
    return {name.format("p50"): round(p50(seconds), 3), name.format("p90"): round(p90(seconds), 3)}


def _cancels(ow: OpenWeights, settings: Settings, count: int, *, at_once: int) -> dict[str, Figure]:
    """From just before `job.cancel()` until the entrypoint's process is gone."""
    obedient: list[float] = []
    stubborn: list[float] = []
    for first in range(0, count, at_once):
        numbers = range(first, min(first + at_once, count))
        jobs = [_sleeper(ow, number, stubborn=number % _STUBBORN_EVERY == 0) for number in numbers]
        processes = [psutil.Process(_pid_of(job)) for job in jobs]
        for number, job, process in zip(numbers, jobs, processes, strict=True):
            seconds = _cancel(job, process)
            (stubborn if number % _STUBBORN_EVERY == 0 else obedient).append(seconds)
    beyond = [*obedient, *(seconds - settings.cancel_grace_seconds for seconds in stubborn)]
    return {
        "canceled_jobs": len(beyond),
        "cancel_p50_seconds": round(p50(obedient), 3),
        "cancel_p95_seconds": round(p95(obedient), 3),
        "stubborn_cancel_p50_seconds": round(p50(stubborn), 3),
        "stubborn_cancel_max_seconds": round(max(stubborn), 3),
        "cancel_p95_beyond_grace_seconds": round(p95(beyond), 3),
    }


def _cancel(job: Job, process: psutil.Process) -> float:
    started = time.perf_counter()
    job.cancel()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.perf_counter() - started > _GONE_SECONDS:
            raise StackError(
                f"Process {process.pid} of job {job.id!r} lives {_GONE_SECONDS:g} s after its cancel."
            )
        time.sleep(0.01)
    return time.perf_counter() - started


def _sleeper(ow: OpenWeights, number: int, *, stubborn: bool) -> Job:
    jobs: Jobs = ow.benchmark_sleeper
    return jobs.create(number=number, stubborn=stubborn)


def _pid_of(job: Job) -> int:
    """The entrypoint's process id, when it has printed it: simulated pods share this machine."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if job.refresh().status == "in_progress" and (lines := [*job.logs()]):
            return int(lines[0])
        time.sleep(0.05)
    raise StackError(f"Job {job.id!r} did not begin within {_START_SECONDS:g} s: {job.refresh()}")


def _memory(home: Path, pods: int) -> dict[str, Figure]:
    """Of the agents and what they have preloaded; pages that processes share are divided among them."""
    total = 0
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            of_a_pod = any(part.startswith("openweights_prefect.pod") for part in command)
            if of_a_pod and str(home) in process.environ().values():
                total += process.memory_full_info().pss
        except (psutil.Error, OSError):
            continue
    return {f"memory_mb_per_pod_{pods}_pods": round(total / pods / 2**20, 1)}
