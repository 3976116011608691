"""The same job, submitted by many at once and again later, runs once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fault_jobs import with_file
from local_stack import Stack

from openweights_prefect import OpenWeights
from openweights_prefect.ledger.protocol import Row

pytestmark = pytest.mark.stack

_SUBMITS = 64
_PROCESSES = 4


def test_many_submits_at_once_are_one_job(stack: Stack, tmp_path: Path) -> None:
    """From threads that share a client and from other processes: one job, one run, one pod."""
    extra = tmp_path / "extra"
    extra.write_text("shared")
    tag = stack.tag("many")
    pods_before = stack.report()["created"]
    in_processes = _SUBMITS // (2 * _PROCESSES)
    scripts = [stack.submit_script(tag, extra, in_processes) for _ in range(_PROCESSES)]
    outputs: list[Sequence[str]] = []
    with OpenWeights(settings=stack.settings) as ow, ThreadPoolExecutor(_SUBMITS // 2) as pool:
        # The scripts' own job type: their first id comes when everybody submits.
        assert scripts[0].stdout is not None
        scripts[0].stdout.readline()
        with_file(str(extra))
        jobs = list(pool.map(lambda _: ow.with_file.create(tag=tag), range(_SUBMITS // 2)))
        for script in scripts:
            text, _ = script.communicate(timeout=60)
            assert script.returncode == 0
            outputs.append([line for line in text.splitlines() if line != "creating"])
        ids = Counter([job.id for job in jobs] + [line for lines in outputs for line in lines])
        assert ids == {jobs[0].id: _SUBMITS}
        stack.holds(jobs[0], attempts=1)
        assert len(ow.jobs.find(tag=tag)) == 1
    assert stack.report()["created"] - pods_before <= 1


def test_a_finished_job_is_answered_in_one_round_trip(
    stack: Stack, ow: OpenWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitting it again asks the ledger once, runs nothing, and rents nothing."""
    tag = stack.tag("finished")
    job = ow.steady.create(tag=tag, events=5, seconds=0.1).wait(timeout=60, progress=False)
    pods = stack.report()["created"]
    with OpenWeights(settings=stack.settings) as other:
        calls = _recorded(other, monkeypatch)
        again = other.steady.create(tag=tag, events=5, seconds=0.1)
    assert calls == ["submit_job"]
    assert (again.id, again.status, again.outputs) == (job.id, "completed", job.outputs)
    assert len(job.runs) == 1
    assert stack.report()["created"] == pods


def _recorded(ow: OpenWeights, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions of the ledger that this client calls from now on."""
    calls: list[str] = []
    ledger = ow._session.ledger
    call = ledger.call

    def record(function: str, **arguments: Any) -> list[Row]:
        calls.append(function)
        return call(function, **arguments)

    monkeypatch.setattr(ledger, "call", record)
    return calls
