from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from openweights_prefect.cli.main import _COMMANDS, main
from openweights_prefect.cli.output import duration
from openweights_prefect.client import OpenWeights
from openweights_prefect.settings import Settings
from openweights_prefect.stack.addresses import ensure_api_key
from openweights_prefect.stack.service import Folders
from openweights_prefect.stack.services import foreground_worker
from openweights_prefect.types.job import parse_time
from tests.callers import Callers

OW = [sys.executable, "-m", "openweights_prefect.cli"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("OW_", "PREFECT_", "RUNPOD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OW_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def ledger_home(home: Path, ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OW_DATABASE_URL", ledger_url)
    return home


def ow(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def answer(*arguments: str) -> Any:
    result = ow(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def submit(ledger: Callers, name: str, job_type: str = "addition") -> str:
    job = {
        "id": f"{job_type}-{name}",
        "type": job_type,
        "docker_image": "i",
        "entrypoint": "true",
        "model": "m",
    }
    [row] = ledger.call("submit_job", job=job)
    return str(row["job"]["id"])


def leaf_commands(command: click.Command, path: str = "ow") -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    ctx = click.Context(command)
    names = command.list_commands(ctx)
    found = [(f"{path} {name}", command.get_command(ctx, name)) for name in names]
    own = [(path, command)] if command.invoke_without_command else []
    return own + [leaf for name, child in found if child for leaf in leaf_commands(child, name)]


def test_every_command_has_help_with_an_example_and_json() -> None:
    """Nobody has to guess how a command is called."""
    for name, command in leaf_commands(main):
        assert "Example:\n" in (command.help or ""), name
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options or name == "ow worker", name


def test_the_summaries_are_those_of_the_commands() -> None:
    """`ow --help` does not import the commands, but says the same as they do."""
    for name, entry in _COMMANDS.items():
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert (command.help or "").splitlines()[0] == entry.summary


def test_help_is_cheap() -> None:
    """`ow --help` costs at most 0.35 s CPU, and imports neither the client nor rich."""
    costs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*OW, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(costs) <= 0.35


def test_without_a_stack_the_error_is_one_line(home: Path) -> None:
    """A user error: exit code 1, one line on stderr, no traceback, nothing on stdout."""
    done = subprocess.run([*OW, "ls"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: No ledger is configured. Run `ow up`")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["ls", "--limit", "0"], ["ls", "--status", "x"], ["show"], []]
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str]) -> None:
    """Scripts can tell a typing error from a failure."""
    assert ow(*arguments).exit_code == 2


def test_a_bug_keeps_its_traceback(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only our own errors are made short."""
    monkeypatch.setitem(_COMMANDS, "ls", _COMMANDS["ls"]._replace(attribute="missing"))
    assert isinstance(ow("ls").exception, KeyError)


def test_status_of_a_stack_that_is_down(home: Path) -> None:
    """Every service is listed as down, the exit code is 1, and no folder is made."""
    result = ow("status", "--json")
    assert result.exit_code == 1
    listed = {service["name"]: service["up"] for service in json.loads(result.stdout)["services"]}
    assert listed == {"postgres": False, "prefect": False, "simulator": False, "worker": False}
    assert not home.exists()
    assert ow("down").stdout == "Nothing was running.\n"


def test_jobs_are_listed(ledger_home: Path, ledger: Callers) -> None:
    """`ow ls` filters, and prints tab-separated lines into a pipe."""
    one, two = submit(ledger, "1"), submit(ledger, "2", "other")
    assert [job["id"] for job in answer("ls")] == [two, one]
    assert [job["id"] for job in answer("ls", "--type", "other")] == [two]
    assert answer("ls", "--status", "failed") == []
    header, row, _ = ow("ls").stdout.splitlines()
    assert header.split("\t")[:4] == ["ID", "TYPE", "STATUS", "MODEL"]
    assert row.split("\t")[:4] == [two, "other", "pending", "m"]


def test_a_job_is_shown_with_its_runs(ledger_home: Path, ledger: Callers) -> None:
    """`ow show` has the columns, the runs and the address; an unknown job is an error."""
    job, run = submit(ledger, "1"), str(uuid.uuid4())
    ledger.call("record_flow_run", for_job=job, for_attempt=1, flow_run=run)
    document = answer("show", job)
    assert (document["id"], document["status"], document["runs"][0]["id"]) == (job, "pending", run)
    assert run in ow("show", job).stdout
    result = ow("show", "nope")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: No job 'nope'")


def test_cancel_goes_on_after_a_failure(ledger_home: Path, ledger: Callers) -> None:
    """Ids come from the command line and stdin; one that fails sets exit code 1 and stops no other."""
    one, two = submit(ledger, "1"), submit(ledger, "2")
    result = ow("cancel", "nope", "-", one, stdin=f"{two}\n{one}\n")
    assert result.exit_code == 1
    assert result.stdout == f"{two}: canceled\n{one}: canceled\n"
    assert result.stderr.startswith("Error: No job 'nope'")
    assert ow("cancel", one).exit_code == 1
    assert [job["status"] for job in answer("restart", one)["changed"]] == ["pending"]


def test_a_file_is_fetched(ledger_home: Path) -> None:
    """`ow fetch` writes a file under its own name, to a path, or to stdout."""
    source = Path("data.bin")
    source.write_bytes(b"\x00content")
    with OpenWeights() as client:
        file = client.files.upload(source, "custom_job_file")["id"]
    source.unlink()
    assert ow("fetch", file).stdout == "data.bin\n"
    assert Path(answer("fetch", file, "-o", "copy")["paths"][0]).read_bytes() == b"\x00content"
    assert ow("fetch", file, "-o", "-").stdout_bytes == b"\x00content"
    assert ow("fetch", "custom_job_file:file-000000000000").exit_code == 1


def test_logs_and_events_of_a_job_without_runs_are_empty(ledger_home: Path, ledger: Callers) -> None:
    """There is nothing to print yet, and that is no error."""
    job = submit(ledger, "1")
    assert (ow("logs", job).output, ow("events", job).output) == ("", "")
    assert ow("fetch", job).stderr == "The job has no files yet.\n"


def test_pods_and_migrations_are_listed(ledger_home: Path, ledger: Callers) -> None:
    """`ow pod ls` and `ow db status` read the ledger."""
    assert answer("pod", "ls") == []
    assert ow("pod", "terminate", "pod-nope").exit_code == 1
    assert ow("db", "status").exit_code in (0, 1)


def test_doctor_says_what_fails_and_how_to_mend_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stack, the services fail with `ow up` as the mend, and the exit code is 1."""
    monkeypatch.setenv("OW_PREFECT_PORT", "1")  # A stack of the user's may listen on the usual one.
    result = ow("doctor", "--json")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["python"]["ok"]
    assert checks["disk"]["ok"]
    for name in ("settings", "postgresql", "prefect", "work pool", "worker", "runpod", "job interpreter"):
        assert not checks[name]["ok"]
        assert "ow up" in checks[name]["mend"]


def test_a_worker_gets_the_addresses_of_the_settings(home: Path) -> None:
    """`ow worker` becomes a Prefect worker with the pool, the API and, for the local stack, its key."""
    assert "PREFECT_API_URL" in ow("worker").stderr
    home.mkdir()
    folders = Folders(home)
    key = ensure_api_key(folders)
    settings = Settings(home=home, prefect_api_url="http://p/api", runpod_api_url="http://127.0.0.1:4280/v2")
    command, variables = foreground_worker(settings, pool=None, name="w")
    assert command[-7:] == ("start", "--pool", "openweights", "--type", "runpod", "--name", "w")
    assert (variables["PREFECT_API_URL"], variables["RUNPOD_API_KEY"]) == ("http://p/api", key)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (61, "1m1s"), (3600, "1h"), (5400, "1h30m"), (90000, "1d1h")],
)
def test_durations_are_short(seconds: int, text: str) -> None:
    """Two units at most."""
    start = parse_time("2026-01-01T00:00:00+00:00")
    assert start is not None
    assert duration(start, start.fromtimestamp(start.timestamp() + seconds, start.tzinfo)) == text
