"""From the spool into the ledger: each event once, in order, whatever is repeated, in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.errors import LedgerUnavailable
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.pod.shipping import Shipper, StaleRun
from openweights_prefect.runtime.entrypoint import RunFolder
from openweights_prefect.runtime.spool import append
from tests.callers import Callers

ROOT = Path(__file__).parents[2]


class Unreliable:
    """A ledger whose answers are lost now and then, before or after the call took effect."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self._ledger = ledger
        self._chance = random.Random(seed)
        self.lost = 0

    @property
    def organization_id(self) -> str:
        return self._ledger.organization_id

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        chance = self._chance.random()
        if chance < 0.2:
            self.lost += 1
            raise LedgerUnavailable("It did not get there.")
        rows = self._ledger.call(function, patience_seconds=patience_seconds, **arguments)
        if chance < 0.4:
            self.lost += 1
            raise LedgerUnavailable("It got there, and the answer was lost.")
        return rows

    def close(self) -> None: ...


async def ignore(events: list[Row], text: str) -> None: ...


class Run:
    """An open run, and where its job writes."""

    def __init__(self, ledger: Callers, folder: Path) -> None:
        self.ledger = ledger.person
        self.id, self.boot = uuid.uuid4(), uuid.uuid4()
        self.folder = RunFolder(folder / "run")
        self.folder.path.mkdir()
        self.folder.spool.touch()
        self.folder.log.touch()
        self.ledger.call("open_script", for_job=f"sjob-{self.id}", for_run=self.id, as_boot=self.boot,
                         command="true", lease_seconds=600)  # fmt: skip

    def shipper(self, ledger: Ledger | None = None, observer: Any = ignore) -> Shipper:
        return Shipper(ledger=ledger or self.ledger, folder=self.folder, run_id=self.id, boot=self.boot,
                       observer=observer)  # fmt: skip

    def log(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            append(self.folder.spool, {"n": number})

    def stored(self) -> list[Row]:
        rows: list[Row] = []
        while page := self.ledger.call(
            "list_events", for_run=self.id, after_id=rows[-1]["id"] if rows else 0
        ):
            rows += page
        return rows

    def check(self, count: int) -> None:
        rows = self.stored()
        assert [row["sequence"] for row in rows] == list(range(count))
        assert [row["data"]["n"] for row in rows] == list(range(count))


@pytest.fixture
def run(ledger: Callers, tmp_path: Path) -> Run:
    return Run(ledger, tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_lost_answers_make_no_gap_and_no_double(run: Run, seed: int) -> None:
    """Also when the shipping is canceled in the middle, and others wait for it to drain."""
    unreliable = Unreliable(run.ledger, seed)
    seen: list[Row] = []

    async def observe(events: list[Row], text: str) -> None:
        seen.extend(events)

    async def scenario() -> None:
        shipper = run.shipper(unreliable, observe)
        writer = asyncio.create_task(asyncio.to_thread(run.log, 0, 20_000))
        for _ in range(10):
            shipping = asyncio.create_task(shipper.run(pace_seconds=0))
            await asyncio.sleep(random.Random(seed).uniform(0, 0.05))
            await asyncio.gather(shipper.drain(), shipper.drain())
            shipping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await shipping
        await writer
        await shipper.drain()

    asyncio.run(scenario())
    run.check(20_000)
    assert unreliable.lost
    numbers = [event["data"]["n"] for event in seen]
    assert sorted(set(numbers)) == list(range(20_000))  # shown again after a cancellation, never left out


def test_drain_ends_while_the_job_goes_on_logging(run: Run) -> None:
    """What was logged before the call is stored; what comes meanwhile may wait."""
    end = threading.Event()

    def log_for_ever() -> None:
        number = 1000
        while not end.is_set():
            append(run.folder.spool, {"n": number})
            number += 1

    async def scenario() -> None:
        run.log(0, 1000)
        writer = asyncio.create_task(asyncio.to_thread(log_for_ever))
        try:
            await asyncio.wait_for(run.shipper().drain(), timeout=30)
            assert len(run.stored()) >= 1000
        finally:
            end.set()
            await writer

    asyncio.run(scenario())


def test_what_is_no_event_harms_no_other(run: Run) -> None:
    """A torn record and garbage do not stop the shipping; the garbage is kept as text."""
    run.log(0, 2)
    with run.folder.spool.open("ab") as stream:
        stream.write(b'\n{"at":1.5,"data":{"torn')
    run.log(2, 2)
    with run.folder.spool.open("ab") as stream:
        stream.write(
            b'garbage \xff\x00\n{"at":1e999,"data":{"x":NaN,"y":"\\u0000"}}\n{"at":1.5,"data":{"torn'
        )
    asyncio.run(run.shipper().drain())
    rows = run.stored()
    assert [row["sequence"] for row in rows] == list(range(6))
    assert [row["data"].get("n") for row in rows] == [0, 1, 2, 3, None, None]
    assert rows[4]["data"]["unreadable_event"].startswith("garbage")
    assert rows[5]["data"]["x"] == {"$float": "NaN"}


def test_a_run_that_was_given_away_is_written_no_more(run: Run) -> None:
    run.log(0, 1)
    run.ledger.call("finish_run", for_run=run.id, as_boot=run.boot, result="failed")
    with pytest.raises(StaleRun):
        asyncio.run(run.shipper().drain())


# Ships a large spool to a ledger that answers at once, and prints how much the memory grew meanwhile, in MB.
BACKLOG = """
import asyncio, json, resource, sys, uuid
from pathlib import Path
from openweights_prefect.pod.shipping import Shipper
from openweights_prefect.runtime.entrypoint import RunFolder
class Swift:
    stored = 0
    def call(self, function, *, first_sequence, batch, **_):
        assert first_sequence == self.stored
        self.stored += len(batch)
        return [{"outcome": "stored"}]
async def ignore(events, text): ...
folder, ledger = RunFolder(Path(sys.argv[1])), Swift()
shipper = Shipper(ledger=ledger, folder=folder, run_id=uuid.uuid4(), boot=uuid.uuid4(), observer=ignore)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
asyncio.run(shipper.drain())
print(ledger.stored, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("event_bytes", [200, 20_000])
def test_memory_does_not_grow_with_the_backlog(tmp_path: Path, event_bytes: int) -> None:
    """A hundred megabytes of spool, in small and in large events."""
    folder = tmp_path / "run"
    folder.mkdir()
    append(folder / "events.jsonl", {"n": 1, "pad": "x" * event_bytes})
    record = (folder / "events.jsonl").read_bytes()
    count = min(100_000_000 // len(record), 150_000)
    with (folder / "events.jsonl").open("ab") as stream:
        for _ in range(count // 50):
            stream.write(record * 50)
    done = subprocess.run(
        [sys.executable, "-c", BACKLOG, folder],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    stored, grown_mb = map(int, done.stdout.split())
    assert stored == count // 50 * 50 + 1
    assert grown_mb < 80
