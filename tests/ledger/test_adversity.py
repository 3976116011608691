"""A database that restarts, is away, freezes, is crowded or full.

Nothing acknowledged is lost, no call waits longer than its patience, and afterwards calls work again.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from psycopg import sql

from openweights_prefect.errors import LedgerUnavailable
from openweights_prefect.ledger import embedded, embedded_layout, migrator
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.identity import LocalIdentity
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.postmaster import find_postmaster
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from openweights_prefect.stack.databases import create_organization
from tests.postgres_versions import server_binaries
from tests.supabase_double import SupabaseDouble, prepare_project, prepare_server

IMAGE = "openweights/test:latest"
SLACK_SECONDS = 6.0
"""What a call may take beyond its patience: a grace, the probe for the reason, a busy machine."""


@dataclass
class Site:
    """A ledger on a server of its own, which tests may harm."""

    server: EmbeddedPostgres
    database: str
    double: SupabaseDouble | None
    opened: list[Ledger] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url(database=self.database, user="authenticator")

    def ledger(self, *, patience_seconds: float = 30, connections: int = 8) -> Ledger:
        """As the local person, over the transport of the test."""
        identity = LocalIdentity(LOCAL_ORGANIZATION_ID)
        if self.double is None:
            ledger: Ledger = PostgresLedger(
                self.url, identity=identity, patience_seconds=patience_seconds, connections=connections
            )
        else:
            token = self.double.exchange.grant(identity.claims())
            ledger = self.double.ledger_of(token, patience_seconds=patience_seconds)
        self.opened.append(ledger)
        return ledger

    def admin(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.server.url(database=self.database))


@contextmanager
def running(folder: Path) -> Iterator[EmbeddedPostgres]:
    try:
        yield embedded.start(folder / "postgres", fsync=False, binaries=server_binaries())
    finally:
        embedded.remove(folder / "postgres")


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    folder = Path(tempfile.mkdtemp(prefix="ow-test-adversity-"))
    folder.chmod(0o755)
    try:
        with running(folder) as started:
            prepare_server(started.url(database="postgres"))
            yield started
    finally:
        shutil.rmtree(folder)


def migrated(server: EmbeddedPostgres, *, supabase: bool) -> str:
    """A new database with the ledger."""
    name = f"ledger_{uuid.uuid4().hex[:8]}"
    owner = "project_owner" if supabase else None
    migrator.ensure_database(server.url(database="postgres"), name, owner=owner)
    url = server.url(database=name)
    migrator.migrate(prepare_project(url) if supabase else url)
    create_organization(server.url(database=name, user="authenticator"), LOCAL_ORGANIZATION_ID)
    return name


@pytest.fixture
def site(server: EmbeddedPostgres, transport: str, tmp_path: Path) -> Iterator[Site]:
    database = migrated(server, supabase=transport == "supabase")
    with ExitStack() as stack:
        double = None
        if transport == "supabase":
            double = SupabaseDouble(
                database_url=server.url(database=database, user="authenticator"),
                admin_url=server.url(database=database),
                folder=tmp_path / "supabase",
                connections=8,
            )
            stack.enter_context(double)
        made = Site(server, database, double)
        try:
            yield made
        finally:
            for ledger in made.opened:
                ledger.close()


def a_job(job_id: str) -> dict[str, Any]:
    return {"id": job_id, "type": "probe", "docker_image": IMAGE, "entrypoint": "true", "files": []}


def submit(ledger: Ledger, job_id: str, **how: Any) -> str:
    return str(ledger.call("submit_job", job=a_job(job_id), **how)[0]["outcome"])


def jobs(ledger: Ledger) -> set[str]:
    return {row["id"] for row in ledger.call("list_jobs", max_rows=1000)}


def a_script(ledger: Ledger) -> tuple[uuid.UUID, uuid.UUID]:
    """A run that may log, and its boot."""
    run, boot = uuid.uuid4(), uuid.uuid4()
    answer = ledger.call("open_script", for_job=f"script-{run.hex[:8]}", for_run=run, as_boot=boot,
                         command="python probe.py", lease_seconds=3600)  # fmt: skip
    assert answer[0]["outcome"] == "opened"
    return run, boot


def append(ledger: Ledger, run: tuple[uuid.UUID, uuid.UUID], first: int, batch: list[Any]) -> int:
    answer = ledger.call("append_events", for_run=run[0], as_boot=run[1], first_sequence=first,
                         batch=[{"at": 1.0, "data": {"n": data}} for data in batch])  # fmt: skip
    assert answer[0]["outcome"] == "stored", answer
    return int(answer[0]["next_sequence"])


def refused_in(seconds: float, call: Callable[[], object]) -> str:
    """The message of the `LedgerUnavailable` that the call raises in about this time."""
    began = time.monotonic()
    with pytest.raises(LedgerUnavailable) as caught:
        call()
    assert time.monotonic() - began < seconds + SLACK_SECONDS
    return str(caught.value)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def restart(server: EmbeddedPostgres) -> None:
    embedded.stop(server.folder)
    embedded.start(server.folder, fsync=False, binaries=server_binaries())


def crash(server: EmbeddedPostgres) -> None:
    """As if the machine had lost power, except that what the kernel has is not lost."""
    for process in _processes(server):
        process.kill()
    until(lambda: not embedded.is_running(server.folder))
    embedded.start(server.folder, fsync=False, binaries=server_binaries())


def _processes(server: EmbeddedPostgres) -> list[psutil.Process]:
    postmaster = find_postmaster(embedded_layout.locate(server.folder))
    assert postmaster is not None
    parent = psutil.Process(postmaster.pid)
    return [parent, *parent.children(recursive=True)]


@pytest.mark.parametrize("interruption", [restart, crash])
def test_what_was_acknowledged_survives(site: Site, interruption: Callable[[EmbeddedPostgres], None]) -> None:
    """While four threads submit and one ships events, the server goes away and comes back twice."""
    ledger, stop = site.ledger(), threading.Event()
    run = a_script(ledger)

    def submit_until_stopped(name: str) -> list[str]:
        done: list[str] = []
        while not stop.is_set():
            job_id = f"{name}-{len(done)}"
            assert submit(ledger, job_id) in ("new", "joined")  # Joined: the first answer was lost.
            done.append(job_id)
        return done

    def ship_until_stopped() -> int:
        shipped = 0
        while not stop.is_set():
            shipped = append(ledger, run, shipped, list(range(shipped, shipped + 3)))
        return shipped

    with ThreadPoolExecutor(5) as threads:
        submitting = [threads.submit(submit_until_stopped, f"t{number}") for number in range(4)]
        shipping = threads.submit(ship_until_stopped)
        before = 0
        for _ in range(2):
            before = len(jobs(ledger))
            interruption(site.server)
            until(lambda: len(jobs(ledger)) > before)  # noqa: B023
        stop.set()
        acknowledged = {job_id for future in submitting for job_id in future.result()}
        shipped = shipping.result()
    with site.admin() as connection:
        stored = {
            job_id for (job_id,) in connection.execute("select id from ledger.jobs where type = 'probe'")
        }
        events = connection.execute("select data -> 'n' from ledger.events order by sequence").fetchall()
    assert acknowledged == stored
    assert [number for (number,) in events] == list(range(shipped))


def test_an_outage_is_a_clear_error_in_time_and_then_over(site: Site) -> None:
    ledger = site.ledger(patience_seconds=2)
    assert submit(ledger, "before") == "new"
    embedded.stop(site.server.folder)
    try:
        message = refused_in(2, lambda: submit(ledger, "during"))
    finally:
        embedded.start(site.server.folder, fsync=False, binaries=server_binaries())
    assert "submit_job" in message
    assert "2 s" in message
    until(lambda: _works(ledger))
    assert submit(ledger, "after") == "new"
    assert jobs(ledger) >= {"before", "after"}  # A service in between may make the other call late.


@pytest.mark.parametrize("transport", ["psycopg"])
def test_calls_outlive_an_outage_of_thirty_seconds(site: Site) -> None:
    """More callers than connections; each gets its answer after the server is back."""
    ledger = site.ledger(patience_seconds=120, connections=4)
    assert submit(ledger, "before") == "new"
    embedded.stop(site.server.folder)
    away_until = time.monotonic() + 30
    with ThreadPoolExecutor(12) as threads:
        calls = [threads.submit(submit, ledger, f"during-{number}") for number in range(12)]
        try:
            until(lambda: time.monotonic() > away_until, seconds=40)
            assert not any(call.done() for call in calls)
        finally:
            embedded.start(site.server.folder, fsync=False, binaries=server_binaries())
        assert {call.result(timeout=60) for call in calls} <= {"new", "joined"}
    assert len(jobs(ledger)) == 13


def _ship_until_full(ledger: Ledger, run: tuple[uuid.UUID, uuid.UUID], shipped: int) -> int:
    """Append until the ledger says that it cannot; returns how many were acknowledged."""
    for _ in range(200):
        try:
            shipped = append(ledger, run, shipped, [os.urandom(150_000).hex()])
        except LedgerUnavailable:
            return shipped
    raise AssertionError("the disk did not get full")


def _works(ledger: Ledger) -> bool:
    try:
        ledger.call("ping")
    except LedgerUnavailable:
        return False
    return True


def _waits(admin: psycopg.Connection[tuple[Any, ...]], calls: int = 1) -> bool:
    query = "select count(*) from pg_locks where not granted"
    [(count,)] = admin.execute(query)
    return bool(count >= calls)


def test_a_serialization_failure_is_tried_again(site: Site) -> None:
    """The caller never sees 40001: its transaction had no effect, and the next one has."""
    with site.admin() as connection:
        isolation = sql.SQL("alter database {} set default_transaction_isolation = 'repeatable read'")
        connection.execute(isolation.format(sql.Identifier(site.database)))
    ledger = site.ledger()
    assert submit(ledger, "contended") == "new"
    with site.admin() as other, site.admin() as watch, ThreadPoolExecutor(1) as threads:
        watch.autocommit = True
        other.execute("update ledger.jobs set priority = 7 where id = 'contended'")
        cancel: Future[list[Any]] = threads.submit(ledger.call, "cancel_job", job_id="contended")
        until(lambda: _waits(watch))
        other.commit()
        answer = cancel.result(timeout=30)[0]
    assert (answer["outcome"], answer["job"]["status"], answer["job"]["priority"]) == (
        "canceled",
        "canceled",
        7,
    )


def test_a_deadlock_is_tried_again(site: Site) -> None:
    """The caller never sees 40P01: PostgreSQL ended its transaction, and the next one gets through."""
    ledger = site.ledger()
    assert submit(ledger, "contended") == "new"
    with site.admin() as control:
        control.execute(
            "insert into ledger.runs (id, organization_id, job_id, attempt) values (%s, %s, 'contended', 1)",
            [uuid.uuid4(), LOCAL_ORGANIZATION_ID],
        )
    with site.admin() as other, site.admin() as watch, ThreadPoolExecutor(1) as threads:
        watch.autocommit = True
        other.execute("set local deadlock_timeout = '60s'")  # So that the other side finds it, and ends.
        other.execute("select from ledger.runs for update")
        cancel: Future[list[Any]] = threads.submit(ledger.call, "cancel_job", job_id="contended")
        until(lambda: _waits(watch))
        other.execute("update ledger.jobs set priority = 7 where id = 'contended'")
        other.commit()
        answer = cancel.result(timeout=30)[0]
    assert (answer["outcome"], answer["job"]["priority"]) == ("canceled", 7)


def test_more_threads_than_connections_all_get_through(site: Site) -> None:
    ledger = site.ledger(connections=2)
    with ThreadPoolExecutor(24) as threads:
        outcomes = list(threads.map(lambda number: submit(ledger, f"job-{number}"), range(48)))
    assert outcomes == ["new"] * 48


def test_a_pool_without_a_free_connection_is_a_clear_error_in_time(site: Site) -> None:
    """All connections wait for a lock; who comes then is told so when its patience ends, and so are they."""
    ledger = site.ledger(patience_seconds=3, connections=8)
    assert submit(ledger, "held") == "new"
    with site.admin() as other, site.admin() as watch, ThreadPoolExecutor(9) as threads:
        watch.autocommit = True
        other.execute("select from ledger.jobs for update")
        again = lambda: ledger.call("restart_job", job_id="held")  # noqa: E731
        calls = [threads.submit(refused_in, 3, again) for _ in range(8)]
        until(lambda: _waits(watch, calls=8))
        message = refused_in(1, lambda: ledger.call("ping", patience_seconds=1))
        assert "ping" in message
        assert all("restart_job" in call.result(timeout=30) for call in calls)
    assert submit(ledger, "held") == "joined"


@pytest.mark.parametrize("transport", ["psycopg"])
def test_a_call_that_gave_up_does_not_stay_in_the_database(site: Site) -> None:
    """The server stops as well: a caller that is gone holds no locks, and its call has no late effect."""
    ledger = site.ledger(patience_seconds=1)
    assert submit(ledger, "held") == "new"
    with site.admin() as other, site.admin() as watch:
        watch.autocommit = True
        other.execute("select from ledger.jobs for update")
        refused_in(1, lambda: ledger.call("cancel_job", job_id="held"))
        until(lambda: not _waits(watch))
    assert ledger.call("get_job", job_id="held")[0]["status"] == "pending"


def test_a_frozen_server_is_a_clear_error_in_time(site: Site) -> None:
    """Its sockets are open and nobody answers: connections in use, idle ones and new ones end in time."""
    ledger = site.ledger(patience_seconds=2, connections=4)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda number: submit(ledger, f"before-{number}"), range(4))) == {"new"}
    frozen = _processes(site.server)
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(6) as threads:
            calls = [threads.submit(refused_in, 2, lambda: submit(ledger, "during")) for _ in range(6)]
            assert all("submit_job" in call.result(timeout=60) for call in calls)
    finally:
        for process in frozen:
            process.send_signal(signal.SIGCONT)
    until(lambda: _works(ledger))
    assert submit(ledger, "after") == "new"
    assert jobs(ledger) >= {f"before-{number}" for number in range(4)}


def test_a_full_disk_loses_nothing_that_was_acknowledged(small_disk: Path) -> None:
    """Writers hear in time that the ledger is unavailable; with room again, they go on where they were."""
    with running(small_disk) as server:
        site = Site(server, migrated(server, supabase=False), None)
        ledger = site.ledger(patience_seconds=3)
        run = a_script(ledger)
        shipped = append(ledger, run, 0, ["first"])
        ballast = small_disk / "ballast"
        _fill(ballast, leave_bytes=6_000_000)
        shipped = _ship_until_full(ledger, run, shipped)
        message = refused_in(3, lambda: append(ledger, run, shipped, [os.urandom(3_000_000).hex()]))
        assert "append_events" in message
        ballast.unlink()
        embedded.start(server.folder, fsync=False, binaries=server_binaries())  # Where it gave up altogether.
        until(lambda: _works(ledger))
        stored = append(ledger, run, shipped, ["last"])
        assert len(ledger.call("list_events", for_run=run[0])) == stored >= shipped + 1
        ledger.close()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of its own; only root may make one."""
    folder = Path(tempfile.mkdtemp(prefix="ow-test-disk-"))
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = (
        os.geteuid() == 0 and libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=240m,mode=755") == 0
    )
    try:
        if not mounted:
            pytest.skip("a small file system cannot be mounted here")
        yield folder
    finally:
        if mounted:
            libc.umount2(bytes(folder), 2)  # MNT_DETACH
        folder.rmdir()


def _fill(ballast: Path, *, leave_bytes: int) -> None:
    free = shutil.disk_usage(ballast.parent).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - leave_bytes))
