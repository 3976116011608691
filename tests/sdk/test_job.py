from __future__ import annotations

import asyncio
import dataclasses
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import (
    ConflictError,
    InvalidParameterError,
    JobFailed,
    LedgerUnavailable,
    NotFoundError,
    WaitTimeout,
)
from openweights_prefect.files.store import LocalFileStore
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.postgres import local_ledger
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.jobs import StoredJobs
from openweights_prefect.resources.patience import Pace, PatientLedger, pause_after
from openweights_prefect.resources.progress import Lines, describe, show_progress
from openweights_prefect.resources.session import Session
from openweights_prefect.settings import Settings


@pytest.fixture
def job(ow: OpenWeights, conversations: Callable[..., Path]) -> Job:
    return ow.fine_tuning.create(model="org/tiny-1B", training_file=str(conversations()), loss="sft")


def in_background(*steps: Callable[[], Any]) -> threading.Thread:
    def play() -> None:
        for step in steps:
            time.sleep(0.15)
            step()

    thread = threading.Thread(target=play)
    thread.start()
    return thread


def test_columns_are_read_only_and_times_are_utc(job: Job) -> None:
    """A job is changed through the ledger only; times can be calculated with."""
    with pytest.raises(AttributeError):
        job.status = "completed"  # type: ignore[misc]
    assert job.created_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - job.created_at) < timedelta(minutes=5)
    assert repr(job) == f"Job(id={job.id!r}, type='fine_tuning', status='pending')"
    with pytest.raises(KeyError, match="nope"):
        job["nope"]


def test_wait_returns_the_completed_job(ow: OpenWeights, job: Job, pod: Any) -> None:
    """The same object comes back, with its outputs."""
    thread = in_background(
        lambda: pod.open(job), lambda: pod.log({"loss": 1.5, "nan": float("nan")}), lambda: pod.finish()
    )
    assert job.wait(timeout=30, progress=False) is job
    thread.join()
    assert job.status == "completed"
    assert job.outputs is not None
    assert job.outputs["loss"] == 1.5
    assert job.started_at is not None
    assert job.finished_at is not None
    assert job.worker_id == job.runs[-1].worker_id
    assert job.url == f"http://127.0.0.1:4200/runs/flow-run/{job.runs[-1].id}"
    assert ow.jobs.retrieve(job.id).wait(progress=False).status == "completed"


def test_wait_raises_with_the_error_and_the_end_of_the_log(job: Job, pod: Any) -> None:
    """The last twenty lines, no more."""
    pod.open(job)
    pod.print("".join(f"line {number}.\n" for number in range(30)))
    pod.finish("failed", why="CUDA out of memory")
    with pytest.raises(JobFailed) as caught:
        job.wait(progress=False)
    message = str(caught.value)
    assert "CUDA out of memory" in message
    assert "line 10." in message
    assert "line 29." in message
    assert "line 9." not in message


def test_wait_for_a_canceled_job_raises(job: Job) -> None:
    """Canceled is not completed."""
    assert job.cancel().status == "canceled"
    with pytest.raises(JobFailed, match="was canceled"):
        job.wait(progress=False)


def test_wait_times_out_and_names_the_reason(ow: OpenWeights, job: Job, pod: Any) -> None:
    """The error says why the job has not started."""
    pod.ledger.call("set_pending_reasons", reasons={job.id: "no capacity for 1x H200"})
    start = time.monotonic()
    with pytest.raises(WaitTimeout, match="no capacity for 1x H200"):
        job.wait(timeout=0.3, progress=False)
    assert time.monotonic() - start < 3
    assert ow.jobs.retrieve(job.id).status == "pending"
    with pytest.raises(InvalidParameterError, match="timeout=-1"):
        job.wait(timeout=-1)


def test_awaiting_many_jobs(ow: OpenWeights, conversations: Callable[..., Path], pod: Any) -> None:
    """`await job` does as `wait`, beside other coroutines."""
    base = {"model": "org/tiny-1B", "training_file": str(conversations()), "loss": "sft"}
    jobs = [ow.fine_tuning.create(**base, seed=seed) for seed in range(3)]
    for job in jobs:
        pod.open(job)
        pod.finish("failed" if job is jobs[2] else "completed", why=None)

    async def gather() -> list[Any]:
        async def wait(job: Job) -> Job:
            return await job

        return await asyncio.gather(*map(wait, jobs), return_exceptions=True)

    first, second, third = asyncio.run(gather())
    assert (first, second) == (jobs[0], jobs[1])
    assert isinstance(third, JobFailed)


def test_ctrl_c_stops_the_waiting_not_the_job(ow: OpenWeights, settings: Settings, job: Job) -> None:
    """The process ends with a note that the job goes on."""
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what runs in the background\n"
        "from openweights_prefect import OpenWeights\n"
        "OpenWeights().jobs.retrieve(sys.argv[1]).wait(timeout=60)\n"
    )
    waiting = subprocess.Popen(
        [sys.executable, "-c", program, job.id],
        env={
            "OW_DATABASE_URL": settings.database_url,
            "OW_HOME": str(settings.home),
            "PATH": "/usr/bin:/bin",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    shown = waiting.stderr.readline()  # It waits, and says for what.
    assert f"{job.id}: pending: waiting for a pod" in shown
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=60)
    assert f"Stopped waiting; job {job.id} goes on" in said
    assert "KeyboardInterrupt" in said
    assert ow.jobs.retrieve(job.id).status == "pending"


class AwayLedger:
    """Does not answer the first calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def call(self, function: str, **arguments: Any) -> list[Row]:
        if self.left:
            self.left -= 1
            raise LedgerUnavailable("away")
        return [{"function": function}]

    def close(self) -> None:
        pass


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def pace(timeout: float | None, clock: Clock) -> Pace:
    return Pace(timeout, clock=clock.time, sleep=clock.sleep)


def test_a_wait_outlives_an_outage_of_the_ledger() -> None:
    """Without a timeout five minutes are borne, with one its time; then the error is the ledger's."""
    clock = Clock()
    assert PatientLedger(AwayLedger(60), pace(None, clock)).call("ping") == [{"function": "ping"}]
    assert clock.now > 15
    clock = Clock()
    with pytest.raises(LedgerUnavailable):
        PatientLedger(AwayLedger(10**6), pace(None, clock)).call("ping")
    assert 300 < clock.now < 310
    clock = Clock()
    with pytest.raises(LedgerUnavailable):
        PatientLedger(AwayLedger(10**6), pace(40, clock)).call("ping")
    assert clock.now == pytest.approx(40)


def test_a_wait_goes_on_when_the_database_is_back(
    postgres: EmbeddedPostgres, settings: Settings, job: Job, pod: Any
) -> None:
    """Connections are cut and refused for longer than the ledger bears; the wait ends as if nothing was."""
    impatient = local_ledger(settings.database_url, settings.organization_id, patience_seconds=0.3)
    session = Session(impatient, LocalFileStore(settings.files_folder), settings.organization_id, settings)
    refused = threading.Event()

    class Watched:
        close = impatient.close
        organization_id = impatient.organization_id

        def call(self, function: str, **arguments: Any) -> list[Row]:
            try:
                return impatient.call(function, **arguments)
            except LedgerUnavailable:
                refused.set()
                raise

    def outage() -> None:
        pod.open(job)
        with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as server:
            database = str(psycopg.conninfo.conninfo_to_dict(settings.database_url)["dbname"])
            allow = sql.SQL("alter database {} allow_connections {}")
            server.execute(allow.format(sql.Identifier(database), sql.SQL("false")))
            server.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [database]
            )
            assert refused.wait(30)
            server.execute(allow.format(sql.Identifier(database), sql.SQL("true")))
        pod.finish()

    waiting = StoredJobs(dataclasses.replace(session, ledger=Watched())).retrieve(job.id)
    thread = in_background(outage)
    try:
        assert waiting.wait(timeout=60, progress=False).status == "completed"
        assert refused.is_set()
    finally:
        thread.join()
        impatient.close()


def test_a_wait_ends_in_time_during_an_outage(
    postgres: EmbeddedPostgres, settings: Settings, job: Job
) -> None:
    """The ledger itself would bear the outage longer; the error says what was last seen, and the cause."""
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as server:
        database = str(psycopg.conninfo.conninfo_to_dict(settings.database_url)["dbname"])
        name = sql.Identifier(database)
        server.execute(sql.SQL("alter database {} allow_connections false").format(name))
        server.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [database]
        )
        start = time.monotonic()
        with pytest.raises(WaitTimeout, match=r"was pending when last seen\. .*not currently accepting"):
            job.wait(timeout=2, progress=False)
        assert 1.5 < time.monotonic() - start < 5


def test_pauses_grow() -> None:
    """Ten looks a second at first, one in two seconds in the end."""
    assert [pause_after(elapsed) for elapsed in (0, 1.9, 2, 30, 60, 10_000)] == [0.1, 0.1, 0.5, 0.5, 1, 2]


def test_cancel_and_restart_refuse_what_makes_no_sense(ow: OpenWeights, job: Job, pod: Any) -> None:
    """The refusal names the state."""
    pod.open(job)
    with pytest.raises(ConflictError, match="is in_progress and cannot be restarted"):
        ow.jobs.restart(job.id)
    assert job.cancel().status == "in_progress"
    pod.finish("canceled")
    with pytest.raises(ConflictError, match="is canceled and cannot be canceled"):
        ow.jobs.cancel(job.id)
    assert job.restart() is job
    assert (job.status, job.attempt) == ("pending", 2)
    pod.open(job)
    pod.finish()
    for change in (job.cancel, job.restart):
        with pytest.raises(ConflictError, match="is completed"):
            change()
    for change_by_id in (ow.jobs.cancel, ow.jobs.restart, ow.jobs.retrieve):
        with pytest.raises(NotFoundError, match="ftjob-nope"):
            change_by_id("ftjob-nope")


def test_lists_filter_and_page(
    ow: OpenWeights, job: Job, conversations: Callable[..., Path], pod: Any
) -> None:
    """Newest jobs first, newest runs last; a status that does not exist is refused."""
    other = ow.fine_tuning.create(model="org/tiny-1B", training_file=str(conversations()), loss="sft", seed=2)
    assert [found.id for found in ow.jobs.list()] == [other.id, job.id]
    assert [found.id for found in ow.jobs.list(limit=1, after=other.id)] == [job.id]
    assert ow.jobs.list(status="completed") == []
    assert ow.jobs.list(type="custom") == []
    first = pod.open(job)
    pod.finish("lost", why="pod died")
    second = pod.open(job)
    assert [run.id for run in ow.runs.list(job_id=job.id)] == [first, second]
    assert [run.id for run in ow.runs.list(status="lost")] == [first]
    run = ow.runs.retrieve(second)
    assert (run["status"], run.attempt, run.job_id) == ("in_progress", 2, job.id)
    assert [found.id for found in ow.runs.list(worker_id=run.worker_id)] == [second]
    for listing in (ow.jobs.list, ow.runs.list):
        with pytest.raises(InvalidParameterError, match="finished"):
            listing(status="finished")


def test_events_are_complete_and_in_order(ow: OpenWeights, job: Job, pod: Any) -> None:
    """More than one page, over two runs; NaN comes back as NaN."""
    first = pod.open(job)
    for start in range(0, 1200, 400):
        pod.log(*({"step": step} for step in range(start, start + 400)))
    pod.finish("lost", why="pod died")
    second = pod.open(job)
    pod.log({"loss": float("nan"), "step": None}, {"step": 7})
    events = ow.events.list(job_id=job.id)
    assert [event["data"].get("step") for event in events] == [*range(1200), None, 7]
    assert events[-2]["data"]["loss"] != events[-2]["data"]["loss"]
    assert [event["run_id"] for event in events[-3:]] == [first, second, second]
    assert ow.events.list(run_id=second) == ow.runs.retrieve(second).events
    assert len(ow.events.list(job_id=job.id, after=events[-3]["id"])) == 2
    assert len(job.events()) == 1202


def test_latest_is_the_newest_value_of_each_field(ow: OpenWeights, job: Job, pod: Any) -> None:
    """None does not hide an older value, and the caller's list is left alone."""
    run = pod.open(job)
    pod.log({"loss": 3, "tag": "a"}, {"loss": 2}, {"loss": 1, "tag": None})
    assert ow.events.latest("*", job_id=job.id) == {"loss": 1, "tag": "a"}
    fields = ["loss", "unknown"]
    assert ow.events.latest(fields, run_id=run) == {"loss": 1}
    assert fields == ["loss", "unknown"]
    for arguments in ({}, {"job_id": job.id, "run_id": run}):
        with pytest.raises(InvalidParameterError, match="either job_id or run_id"):
            ow.events.latest(**arguments)
    with pytest.raises(InvalidParameterError, match="run_id='7'"):
        ow.events.list(run_id="7")


def test_a_stream_yields_events_as_they_come(ow: OpenWeights, job: Job, pod: Any) -> None:
    """It ends by itself with the job."""
    pod.open(job)
    pod.log({"step": 0})
    stream = ow.events.stream(job_id=job.id, timeout=30)
    assert next(stream)["data"] == {"step": 0}
    thread = in_background(lambda: pod.log({"step": 1}), lambda: pod.log({"step": 2}), lambda: pod.finish())
    assert [event["data"]["step"] for event in stream] == [1, 2]
    thread.join()
    with pytest.raises(NotFoundError):
        next(ow.events.stream(job_id="ftjob-nope"))


def test_lines_are_whole_whatever_the_pieces(job: Job, pod: Any) -> None:
    """Pieces may end anywhere; the last line may have no end."""
    pod.open(job)
    for piece in ("one\ntw", "o\r\n", "\n", "thr", "ee\nfour"):
        pod.print(piece)
    assert list(job.logs()) == ["one", "two", "", "three", "four"]
    assert list(job.runs[-1].logs()) == ["one", "two", "", "three", "four"]


def test_following_goes_on_with_the_next_attempt(job: Job, pod: Any) -> None:
    """It starts with the newest run and ends when the job has ended."""
    pod.open(job)
    pod.print("first, be")

    def next_attempt() -> None:
        pod.finish("lost", why="pod died")
        pod.open(job)
        pod.print("second\n")

    thread = in_background(
        lambda: pod.print("gun\n"), next_attempt, lambda: pod.print("end\n"), lambda: pod.finish()
    )
    assert list(job.logs(follow=True)) == ["first, begun", "second", "end"]
    thread.join()
    assert list(job.logs(follow=True)) == ["second", "end"]


def test_a_log_without_pieces_is_read_from_its_file(ow: OpenWeights, job: Job, pod: Any) -> None:
    """Old pieces are deleted; the file stays."""
    log = ow.files.create(io.BytesIO(b"from\nthe file"), purpose="log")
    pod.open(job)
    pod.finish("failed", why="no", log_file=log["id"])
    assert list(job.logs()) == ["from", "the file"]
    assert list(job.logs(follow=True)) == ["from", "the file"]


def test_download_brings_files_and_log(ow: OpenWeights, job: Job, pod: Any, tmp_path: Path) -> None:
    """Files at their paths, the newest of each path, and the log; or each run in a folder of its own."""
    old, new = (ow.files.create(io.BytesIO(text), purpose="result")["id"] for text in (b"old", b"new"))
    first = pod.open(job)
    pod.log({"path": "first.txt"}, file=old)
    pod.print("lost log\n")
    pod.finish("lost", why="pod died")
    second = pod.open(job)
    pod.log({"path": "adapter/weights.bin", "file": old}, file=old)
    pod.log({"path": "adapter/weights.bin", "file": new}, file=new)
    pod.log({"file": new}, {"file": "just a value"}, {"loss": 1})
    log = ow.files.create(io.BytesIO(b"the log\n"), purpose="log")["id"]
    pod.finish(log_file=log)
    folder = tmp_path / "out"
    paths = job.download(folder)
    unnamed = new.replace(":", "-")
    assert {str(path.relative_to(folder)) for path in paths} == {
        "adapter/weights.bin",
        unnamed,
        f"{second}.log",
    }
    assert (folder / "adapter/weights.bin").read_bytes() == b"new"
    assert (folder / f"{second}.log").read_text() == "the log\n"
    job.download(tmp_path / "all", only_last_run=False)
    assert (tmp_path / "all" / first / "first.txt").read_bytes() == b"old"
    assert (tmp_path / "all" / first / f"{first}.log").read_text() == "lost log\n"
    assert (tmp_path / "all" / second / "adapter/weights.bin").exists()


@pytest.mark.parametrize(
    "path",
    [
        "../../escape.txt",
        "/tmp/escape.txt",
        "a/../../escape.txt",
        "C:\\escape.txt",
        "",
        ".",
        7,
        ["x"],
        "a\nb",
    ],
)
def test_a_hostile_path_stays_inside(ow: OpenWeights, job: Job, pod: Any, tmp_path: Path, path: Any) -> None:
    """What leads elsewhere is written under a name made of its id."""
    file_id = ow.files.create(io.BytesIO(b"content"), purpose="result")["id"]
    run = pod.open(job)
    pod.log({"path": path, "file": file_id}, file=file_id)
    folder = tmp_path / "deep" / "out"
    paths = ow.runs.retrieve(run).download(folder)
    assert paths == [folder / file_id.replace(":", "-")]
    assert not list(tmp_path.rglob("escape*"))


def test_a_link_in_the_target_folder_is_not_followed(
    ow: OpenWeights, job: Job, pod: Any, tmp_path: Path
) -> None:
    """Nor is one that lies there already a way out."""
    file_id = ow.files.create(io.BytesIO(b"content"), purpose="result")["id"]
    pod.open(job)
    pod.log({"path": "link/escape.txt"}, file=file_id)
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidParameterError, match="leads out"):
        job.download(tmp_path / "out")
    assert not list((tmp_path / "outside").iterdir())


def test_progress_in_words(job: Job, pod: Any) -> None:
    """Reason while it waits, pod and share while it runs, the end when it ends; odd values are borne."""
    now = job.created_at + timedelta(seconds=3725)
    waiting = describe(job, None, {}, now=now)
    assert waiting == ("pending: waiting for a pod", None, "", "1:02:05")
    pod.open(job)
    job.refresh()
    running = describe(job, "w-1 (2x A100)", {"step": 5, "total_steps": 20, "loss": 1.23456}, now=now)
    assert running[:3] == ("running on w-1 (2x A100)", 0.25, "step 5/20, loss 1.2346")
    assert describe(job, None, {"progress": 0.5, "step": "x", "loss": float("nan")}, now=now)[1:3] == (
        0.5,
        "",
    )
    assert describe(job, None, {"progress": 17, "step": True, "total": 0}, now=now).share == 1.0
    pod.finish("failed", why="boom\n  at line 7")
    assert describe(job.refresh(), None, {}, now=now).state == "failed: boom at line 7"


def test_wait_prints_what_happens(job: Job, pod: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each state, with the pod and its hardware; nothing with `progress=False`."""
    gate = threading.Event()

    def run() -> None:
        gate.wait(10)
        run_id = pod.open(job)
        pod.log({"progress": 0.5, "loss": 2.0})
        deadline = time.monotonic() + 10
        while "50%" not in "".join(shown) and time.monotonic() < deadline:
            time.sleep(0.05)
            shown.append(capsys.readouterr().err)
        pod.finish()
        shown.append(run_id)

    shown: list[str] = []
    thread = threading.Thread(target=run)
    thread.start()
    gate.set()
    job.wait(timeout=30)
    thread.join()
    text = "".join(shown[:-1]) + capsys.readouterr().err
    assert f"running on w-{shown[-1][:8]} (1x H200) 50% loss 2.0000" in text
    assert text.splitlines()[-1].startswith(f"{job.id}: completed 100%")
    job.wait(progress=False)
    assert capsys.readouterr().err == ""


def test_without_a_terminal_only_changes_are_printed(job: Job) -> None:
    """The same state twice is one line."""
    stream = io.StringIO()
    with show_progress(job.id, enabled=True, stream=stream) as display:
        assert isinstance(display, Lines)
        display.update(job, None, {})
        display.update(job, None, {})
    [line] = stream.getvalue().splitlines()
    assert line.startswith(f"{job.id}: pending: waiting for a pod (0:0")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_live_bar_on_a_terminal(job: Job, pod: Any) -> None:
    """The bar shows the state, brackets and all."""
    stream = Terminal()
    pod.ledger.call("set_pending_reasons", reasons={job.id: "no [b]capacity[/b]"})
    with show_progress(job.id, enabled=True, stream=stream) as display:
        assert display is not None
        display.update(job.refresh(), None, {})
        display.say("a [note]")
    assert "no [b]capacity[/b]" in stream.getvalue()
    assert "a [note]" in stream.getvalue()
