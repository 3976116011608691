"""From the start of a second small job to its first step: forked by the preloaded process, and without it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from figures import Figure, p50
from scratch import say
from training_site import TrainingSite

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.pod.preloading import Preloading
from openweights_prefect.runtime import forking

COMMAND = "python -m openweights_prefect.jobs.training.train"
_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.002


def measure_start(site: TrainingSite, *, rounds: int) -> dict[str, Figure]:
    """Medians of starts that take turns; the first of each kind does not count."""
    return asyncio.run(_measure(site, rounds))


async def _measure(site: TrainingSite, rounds: int) -> dict[str, Figure]:
    seconds: dict[str, list[float]] = {"fresh": [], "forked": []}
    began = time.perf_counter()
    async with Preloading(site.folder / "preloaded", job_python=site.job_python) as preloading:
        preloading.want()
        await _until(lambda: bool(preloading.variables()), "the preloaded process")
        preloading_seconds = time.perf_counter() - began
        os.environ.update(preloading.variables())
        for number in range(rounds + 1):
            for kind in seconds:
                taken = await _first_step(site, kind, f"{kind}-{number}")
                if number:
                    seconds[kind].append(taken)
            if number:
                say(
                    f"Start {number} of {rounds}: "
                    + ", ".join(f"{kind} {each[-1]:.2f} s" for kind, each in seconds.items())
                )
    fresh, forked = p50(seconds["fresh"]), p50(seconds["forked"])
    return {
        "fresh_first_step_p50_seconds": round(fresh, 3),
        "warm_first_step_p50_seconds": round(forked, 3),
        "warm_first_step_max_seconds": round(max(seconds["forked"]), 3),
        "warm_start_ratio": round(forked / fresh, 3),
        "preloading_seconds": round(preloading_seconds, 1),
        "starts": rounds,
    }


async def _first_step(site: TrainingSite, kind: str, name: str) -> float:
    """Seconds from the start of a job's process until its first step is in the spool."""
    work = site.make_job(name, model="tiny", case="sft", max_steps=2)
    environment = site.environment(work)
    spool = Path(work / "events.jsonl")
    began = time.perf_counter()
    process: forking.Forked | asyncio.subprocess.Process | None
    if kind == "forked":
        with _silence():
            process = forking.fork(COMMAND, folder=work, environment=environment)
        if process is None:
            raise OpenWeightsError("The preloaded process refused to fork; its reason is above.")
    else:
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", COMMAND), cwd=work, env=environment, stdout=asyncio.subprocess.DEVNULL
        )
    await _until(lambda: _has_stepped(spool), "the first step")
    taken = time.perf_counter() - began
    if code := await process.wait():
        raise OpenWeightsError(f"The training in {str(work)!r} ended with exit code {code}.")
    return taken


@contextmanager
def _silence() -> Iterator[None]:
    """A fork prints where this process prints."""
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _has_stepped(spool: Path) -> bool:
    if not spool.exists():
        return False
    lines = spool.read_text(encoding="utf-8").splitlines()
    return any('"tag":"train"' in line and json.loads(line)["data"]["step"] == 1 for line in lines)


async def _until(seen: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not seen():
        if time.monotonic() > deadline:
            raise OpenWeightsError(f"Not within {_PATIENCE_SECONDS:g} s: {what}. See above.")
        await asyncio.sleep(_POLL_SECONDS)
