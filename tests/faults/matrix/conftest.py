"""What the rows of the fault matrix share: a control plane on a simulator, and what holds after each."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from control_plane import BILL_SECONDS, EXITS, IMAGE, MOST_ORPHAN_SECONDS, ControlPlane
from local_stack import Stack

from openweights_prefect.ledger import migrator
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from openweights_prefect.simulator.server import SimulatorServer
from openweights_prefect.stack.databases import create_organization
from openweights_prefect.worker import observer
from tests.callers import Callers

_TABLES = "worker, jobs, runs, files, budgets, catalogues, refusals, reservations, pod_intervals"
_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember how the scenario itself went."""
    report = yield
    if report.when == "call":
        item.stash[_failed] = not report.passed
    return report


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def runpod() -> Iterator[SimulatorServer]:
    """One simulated RunPod for all provider rows; each row looks only at what came after its beginning."""
    images = {IMAGE: {"entrypoint": ["sleep", "600"]}, EXITS: {"entrypoint": ["false"]}}
    config = {"rate_limits": {}, "images": images, "balance": 1e6, "spend_limit_per_hour": 1e6}
    with SimulatorServer(config=config, profile="instant") as server:
        yield server


@pytest.fixture(scope="session")
def database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """One ledger for all provider rows, as its owner sees it."""
    name = f"matrix_{os.getpid()}"
    migrator.ensure_database(postgres.url(database="postgres"), name)
    migrator.migrate(postgres.url(database=name))
    create_organization(postgres.url(database=name, user="authenticator"), LOCAL_ORGANIZATION_ID)
    yield postgres.url(database=name)
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")


@pytest.fixture
def ledger(database: str) -> Iterator[Callers]:
    """That ledger, emptied."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("set search_path = ledger")
        connection.execute(f"truncate {_TABLES} cascade")
    callers = Callers(database.replace("postgres@", "authenticator@"))
    yield callers
    callers.close()


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of the control plane; a test may parametrize it."""
    return {}


@pytest.fixture
async def plane(
    ledger: Callers,
    runpod: SimulatorServer,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> AsyncIterator[ControlPlane]:
    """The control plane of one row. Afterwards all pods are ended, and what must hold after each holds."""
    monkeypatch.setattr(observer, "_PASS_SECONDS", 0.05)
    logs = tmp_path / "logs"
    logs.mkdir()
    handler = logging.FileHandler(logs / "worker.log", encoding="utf-8")
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    plane = ControlPlane(ledger, runpod, tmp_path, settings)
    try:
        yield plane
        if request.node.stash.get(_failed, True):
            await plane.clear()
        else:
            await plane.wind_down()
            plane.check(logs)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
        await plane.close()


@pytest.fixture
def row(stack: Stack) -> Iterator[Stack]:
    """The whole stack for one row. Afterwards nothing is broken, and what must hold after each holds."""
    before, foreign = _sums(stack), stack.report()["alive_by_owner"]["foreign"]
    yield stack
    stack.simulator("DELETE", "faults")
    stack.sql("delete from ledger.refusals")
    stack.money_is_safe()
    report = stack.report()
    assert report["alive_by_owner"]["foreign"] == foreign
    logs = [stack.home / "logs", *(stack.home / "simulator" / "pods").glob("*/container.log")]
    assert stack.simulator("POST", "scan", paths=[str(path) for path in logs]) == {"leaks": []}
    assert len(report["alive"]) <= stack.settings.max_workers
    after = _sums(stack)
    assert after["orphan seconds"] - before["orphan seconds"] <= MOST_ORPHAN_SECONDS
    assert abs(after["too much on the bill"] - before["too much on the bill"]) <= after["tolerance"]
    of_ended = (
        "from ledger.reservations r join ledger.worker w on w.id = r.worker_id where w.status = 'terminated'"
    )
    assert stack.select(f"select r.worker_id {of_ended}") == []


def _sums(stack: Stack) -> dict[str, float]:
    ledger_usd = sum(float(row["total_usd"]) for row in stack.call("list_costs", group_by="worker"))
    report = stack.report()
    [(dearest,)] = stack.select("select coalesce(max(price_per_hour), 0) from ledger.worker")
    return {
        "orphan seconds": report["orphan_seconds"],
        "too much on the bill": ledger_usd - report["cost_total"],
        "tolerance": BILL_SECONDS * float(dearest) / 3600 * max(1, len(report["cost_by_pod"])),
    }
