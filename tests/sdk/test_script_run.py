"""`ow.run` in a script that is not a job: real scripts, ended in every way."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import psycopg
import pytest

from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.types.canonical import decode_event

BEGIN = "from openweights_prefect import OpenWeights\now = OpenWeights()\n"


@pytest.fixture
def run_script(ledger_url: str, tmp_path: Any) -> Any:
    """Run a script to its end; the answer is its exit code."""

    def run(body: str) -> int:
        script = tmp_path / "script.py"
        script.write_text(BEGIN + body, encoding="utf-8")
        environment = {
            "OW_DATABASE_URL": ledger_url,
            "OW_HOME": str(tmp_path / "home"),
            "PATH": "/usr/bin:/bin",
        }
        return subprocess.run(
            [sys.executable, str(script)], env=environment, timeout=60, check=False
        ).returncode

    return run


def only_job(ledger: Ledger) -> dict[str, Any]:
    [job] = ledger.call("list_jobs")
    return job


def test_a_script_is_a_job_with_its_events(run_script: Any, ledger: Ledger) -> None:
    """Everything logged is stored, in order, also NaN and what was logged just before the end."""
    assert run_script("for n in range(700): ow.run.log({'n': n, 'loss': float('nan')})") == 0
    job = only_job(ledger)
    assert (job["type"], job["status"], job["id"][:5]) == ("script", "completed", "sjob-")
    events = [decode_event(event["data"]) for event in ledger.call("list_events", for_job=job["id"])]
    assert [event["n"] for event in events] == list(range(700))
    assert all(event["loss"] != event["loss"] for event in events)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("raise RuntimeError('no luck')", "failed", "RuntimeError: no luck"),
        ("import sys; sys.exit(3)", "failed", "The script exited with 3."),
        ("import sys; sys.exit(0)", "completed", None),
    ],
)
def test_a_script_ends_with_its_true_status(
    run_script: Any, ledger: Ledger, body: str, status: str, error: str | None
) -> None:
    run_script(f"ow.run.log({{'a': 1}})\n{body}")
    job = only_job(ledger)
    assert (job["status"], job["error"]) == (status, error)


def test_a_killed_script_fails_when_its_lease_runs_out(
    run_script: Any, ledger: Ledger, ledger_url: str, pod: Any
) -> None:
    """What was sent before the end is kept."""
    body = "import os, signal\now.run.log({'a': 1})\now.run.flush()\nos.kill(os.getpid(), signal.SIGKILL)"
    assert run_script(body) == -9
    [run] = ledger.call("list_runs")
    assert pod.ledger.call("expire_scripts") == []
    with psycopg.connect(ledger_url.replace("authenticator@", "postgres@")) as connection:
        connection.execute("update ledger.runs set lease_expires_at = now()")  # nobody renews it
    deadline = time.monotonic() + 10
    while only_job(ledger)["status"] == "in_progress" and time.monotonic() < deadline:
        pod.ledger.call("expire_scripts")
    assert only_job(ledger)["error"] == "the script ended without a word"
    assert len(ledger.call("list_events", for_job=run["job_id"])) == 1


def test_a_script_that_never_logs_is_no_job(run_script: Any, ledger: Ledger) -> None:
    assert run_script("ow.jobs.list()") == 0
    assert [job for job in ledger.call("list_jobs") if job["type"] == "script"] == []


def test_uploads_are_tied_to_events(run_script: Any, ledger: Ledger) -> None:
    body = (
        "import io, pathlib, tempfile\n"
        "path = pathlib.Path(tempfile.mkdtemp()) / 'a.txt'; path.write_text('hello')\n"
        "print(ow.run.upload(path, 'results/a.txt'))\n"
        "ow.run.log({'kind': 'blob'}, file=io.BytesIO(b'bytes'))"
    )
    assert run_script(body) == 0
    events = ledger.call("list_events", for_job=only_job(ledger)["id"])
    assert events[0]["data"]["path"] == "results/a.txt"
    assert events[0]["file"] == events[0]["data"]["file"]
    assert str(events[1]["file"]).startswith("event:file-")
