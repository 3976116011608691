"""Rows 21, 22 and 24: a worker that dies between two steps, two workers at once, and a clock that jumps."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_plane import MAX_WORKERS, ControlPlane

from openweights_prefect.ledger.protocol import Ledger, Row

pytestmark = pytest.mark.anyio


class Killed(BaseException):
    """The process died here."""


class MortalLedger:
    """The control plane's ledger; whoever makes the fatal call dies before or after it."""

    def __init__(self, ledger: Ledger, function: str, *, after: bool) -> None:
        self._ledger = ledger
        self._function = function
        self._after = after
        self.killed = False

    @property
    def organization_id(self) -> str:
        return self._ledger.organization_id

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        fatal = function == self._function
        self.killed = self.killed or fatal
        if fatal and not self._after:
            raise Killed
        rows = self._ledger.call(function, patience_seconds=patience_seconds, **arguments)
        if fatal:
            raise Killed
        return rows

    def close(self) -> None:
        self._ledger.close()


@pytest.mark.parametrize(
    ("function", "after"),
    [("intend_pod", False), ("intend_pod", True), ("record_pod", False), ("record_pod", True)],
    ids=["before the intent", "between intent and create", "between create and record", "after the record"],
)
async def test_row_21_the_worker_dies_in_the_middle_of_a_purchase(
    plane: ControlPlane, function: str, after: bool
) -> None:
    """The next worker finds what there is: the job gets one pod, and no other one is left or paid for."""
    plane.submit()
    mortal = MortalLedger(plane.callers.control, function, after=after)
    plane.start(ledger=mortal)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 20
    while not mortal.killed:
        assert loop.time() < deadline
        await plane.observer.place_once()
        await asyncio.sleep(0.02)
    await asyncio.gather(*plane.observer._buying.values(), return_exceptions=True)
    plane.start()
    for row in plane.living():
        plane.age(row["id"], 91)  # it may be listed by now, or was never created
    await plane.until(lambda: [row for row in plane.living() if row["pod_id"]], "the job has its pod")
    for _ in range(3):
        await plane.work()
    [row] = plane.living()
    assert plane.bought() == [row["pod_id"]]


async def test_row_22_two_workers_at_once(plane: ControlPlane) -> None:
    """Neither limit nor ledger is theirs: no pod too many, and none that the ledger does not know."""
    for _ in range(2 * MAX_WORKERS):
        plane.submit()
    first = plane.observer
    plane.start()

    async def works(observer: Any) -> None:
        for _ in range(6):
            await observer.place_once()
            await observer.reconcile_once()

    await asyncio.gather(works(first), works(plane.observer))
    await asyncio.gather(*first._buying.values(), *plane.observer._buying.values())
    await plane.until(lambda: all(row["pod_id"] for row in plane.living()), "all pods are recorded")
    assert sorted(plane.rented()) == sorted(row["pod_id"] for row in plane.living())
    assert len(plane.bought()) <= MAX_WORKERS


@pytest.mark.parametrize("hours", [1, -1])
async def test_row_24_the_ledgers_clock_jumps(plane: ControlPlane, hours: int) -> None:
    """Every lease seems over, or far from it: no pod is given up before it had time to renew."""
    for _ in range(2):
        plane.submit()
    rows = await plane.until(
        lambda: (found := [row for row in plane.living() if row["pod_id"]])[1:] and found,
        "two pods are bought",
    )
    boots = {row["id"]: plane.report_in(row["id"]) for row in rows}
    await plane.work()
    plane.jump(hours)
    for _ in range(3):
        await plane.work()
    for worker, boot in boots.items():
        answer = plane.callers.call(
            "renew_lease", for_worker=worker, as_boot=boot, lease_seconds=600, models=[]
        )
        assert answer[0]["fenced"] is False
    await plane.work()
    assert {row["id"]: row["status"] for row in plane.living()} == dict.fromkeys(boots, "active")


@pytest.mark.parametrize("hours", [1, -1])
async def test_row_24_starting_pods_when_the_ledgers_clock_jumps(plane: ControlPlane, hours: int) -> None:
    """They are as old as they were, and not an hour older."""
    plane.submit()
    [row] = await plane.until(lambda: [row for row in plane.living() if row["pod_id"]], "a pod is bought")
    await plane.work()
    plane.jump(hours)
    for _ in range(3):
        await plane.work()
    assert [each["id"] for each in plane.living()] == [row["id"]]
