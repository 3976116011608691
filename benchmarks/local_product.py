"""This product's side of a benchmark: a local stack of its own, and no-op jobs through the SDK."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from openweights_prefect import Job, Jobs, OpenWeights, StackError, register
from openweights_prefect.files.store import LocalFileStore
from openweights_prefect.ledger import embedded
from openweights_prefect.ledger.postgres import local_ledger
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.resources.session import Session
from openweights_prefect.settings import Settings
from openweights_prefect.stack.down import down
from openweights_prefect.stack.service import Folders
from openweights_prefect.stack.up import up

_JOB_SECONDS = 180.0
_PODS_SECONDS = 60.0
_POD_SECONDS = 10.0


class NoopParams(BaseModel):
    """Makes each job another one."""

    number: int


@register("benchmark_noop")
class Noop(Jobs):
    """Prints the time and ends."""

    params = NoopParams
    requires_vram_gb = 8

    def get_entrypoint(self, validated_params: NoopParams) -> str:
        """The command."""
        return "date +%s.%N"


class SleeperParams(BaseModel):
    """Makes each job another one."""

    number: int
    stubborn: bool = False


@register("benchmark_sleeper")
class Sleeper(Jobs):
    """Prints its process id and sleeps until it is canceled."""

    params = SleeperParams
    requires_vram_gb = 8

    def get_entrypoint(self, validated_params: SleeperParams) -> str:
        """The command; a trap of '' is inherited by what it starts."""
        deaf = "trap '' TERM; " if validated_params.stubborn else ""
        return f"{deaf}echo $$; exec sleep 3600"


class Times(NamedTuple):
    """Seconds from just before `create` to each step of a job, by the clock of this one machine."""

    flow_run: float
    """The worker has created the flow run."""
    opened: float
    """A pod holds the run."""
    first_line: float
    """As the job itself printed it."""
    finished: float


class Submitter:
    """Submits no-op jobs as a user would, no two the same."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ow = OpenWeights(settings=settings)
        self._count = 0

    def boot_pods(self, count: int) -> float:
        """Have so many idle pods, by jobs that do not end; seconds until all had booted."""
        started = time.perf_counter()
        jobs = [self._ow.benchmark_sleeper.create(number=-1 - number) for number in range(count)]
        _await_pods(self._settings, count, "active", "busy")
        seconds = time.perf_counter() - started
        for job in jobs:
            job.cancel()
        _await_pods(self._settings, count, "active")
        return seconds

    def count_pods(self) -> int:
        """Pods that have booted and not ended."""
        return _count_pods(self._settings, "active", "busy")

    def time_one(self) -> Times:
        """Submit one job and wait for its end."""
        submitted_at = time.time()
        job = self._submit().wait(_JOB_SECONDS, progress=False)
        [run] = job.runs
        assert run.started_at is not None
        assert job.finished_at is not None
        printed = float(next(job.logs()))
        steps = (run.created_at.timestamp(), run.started_at.timestamp(), printed, job.finished_at.timestamp())
        return Times(*(at - submitted_at for at in steps))

    def time_burst(self, count: int) -> float:
        """Submit many at once; seconds until the last one has finished."""
        submitted_at = time.time()
        jobs = [self._submit() for _ in range(count)]
        ends = [job.wait(_JOB_SECONDS, progress=False).finished_at for job in jobs]
        return max(end.timestamp() for end in ends if end is not None) - submitted_at

    def close(self) -> None:
        """Give back its connections."""
        self._ow.close()

    def _submit(self) -> Job:
        self._count += 1
        return self._ow.benchmark_noop.create(number=self._count)


class RepeatedSubmits(NamedTuple):
    """What submitting a finished job again costs."""

    seconds: list[float]
    calls: int
    """All calls to the ledger together."""


def repeat_finished(settings: Settings, count: int) -> RepeatedSubmits:
    """Submit a job that a `Submitter` has brought to its end, again and again."""
    ledger = _CountingLedger(local_ledger(settings.database_url, settings.organization_id))
    store = LocalFileStore(settings.files_folder)
    jobs = Noop(Session(ledger, store, settings.organization_id, settings))
    jobs.create(number=1)  # Opens the connection.
    ledger.calls = 0
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        job = jobs.create(number=1)
        seconds.append(time.perf_counter() - started)
        assert job.status == "completed", job
    ledger.close()
    return RepeatedSubmits(seconds, ledger.calls)


def _await_pods(settings: Settings, count: int, *statuses: str) -> None:
    """Return when there are so many; each costs seconds of CPU. Raises `StackError` after a while."""
    seconds = _PODS_SECONDS + _POD_SECONDS * count
    deadline = time.monotonic() + seconds
    while _count_pods(settings, *statuses) < count:
        if time.monotonic() > deadline:
            raise StackError(f"There were not {count} {' or '.join(statuses)} pods within {seconds:g} s.")
        time.sleep(0.5)


def _count_pods(settings: Settings, *statuses: str) -> int:
    with closing(local_ledger(settings.database_url, settings.organization_id)) as ledger:
        return len(ledger.call("list_workers", with_status=list(statuses), max_rows=1000))


@contextmanager
def local_stack(environment: Mapping[str, str], progress: Callable[[str], None]) -> Iterator[Settings]:
    """A stack in the folder `OW_HOME`, on ports that are free; its processes and its database end with it."""
    try:
        up(environment=environment, job_python=sys.executable, progress=progress)
        yield Settings.load(environment)
    finally:
        down(environment=environment, progress=progress)
        # As root its data may lie elsewhere, where deleting the folder would leave it.
        embedded.remove(Folders(Path(environment["OW_HOME"])).postgres)


class _CountingLedger:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.calls = 0

    @property
    def organization_id(self) -> str:
        return self._ledger.organization_id

    def call(self, function: str, **arguments: Any) -> list[Row]:
        self.calls += 1
        return self._ledger.call(function, **arguments)

    def close(self) -> None:
        self._ledger.close()
