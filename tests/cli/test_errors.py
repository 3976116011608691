"""What a user meets when something is wrong: one clear error, no traceback, nothing half-made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import (
    ConfigurationError,
    InvalidFileError,
    InvalidParameterError,
    LedgerUnavailable,
    NotFoundError,
    OpenWeightsError,
)
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.postgres import local_ledger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings
from openweights_prefect.stack.addresses import forget_addresses, write_addresses
from openweights_prefect.stack.service import HOME_VARIABLE, Folders
from tests.callers import Callers, bootstrap_hash

OW = (sys.executable, "-m", "openweights_prefect.cli")
GOOD_LINE = json.dumps(
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
)
UPLOAD = """
import sys
from openweights_prefect import OpenWeights, OpenWeightsError
with OpenWeights() as ow:
    try:
        ow.files.upload(sys.argv[1], "custom_job_file")
    except OpenWeightsError as exc:
        print(exc, len(ow.files.list()), sep="|")
"""
WAIT = (
    "import sys; from openweights_prefect import OpenWeights; OpenWeights().jobs.retrieve(sys.argv[1]).wait()"
)
# A file system of its own for one command: `$1` options of mount, `$2` where, then the command.
MOUNTED = (
    'mount -t tmpfs -o "$1" none "$2" && folder=$2 && shift 2 && "$@"; code=$?; ls -AR "$folder"; exit $code'
)


@pytest.fixture
def ow(tmp_path: Path, ledger_url: str) -> Iterator[OpenWeights]:
    with OpenWeights(settings=Settings(home=tmp_path / "home", database_url=ledger_url)) as client:
        yield client


@pytest.fixture
def training_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text(GOOD_LINE + "\n")
    return path


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user without a stack."""
    return {"PATH": os.defpath, "HOME": str(tmp_path), "OW_HOME": str(tmp_path / "home")}


@pytest.fixture
def job_id(ledger: Callers) -> str:
    """A job that waits."""
    row = {"id": "probe-1", "type": "probe", "docker_image": "i", "entrypoint": "true"}
    return str(ledger.call("submit_job", job=row)[0]["job"]["id"])


def run(*command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def error_of(*arguments: str, environment: dict[str, str]) -> str:
    """The error of a command that fails as it should."""
    done = run(*OW, *arguments, environment=environment)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("Error: "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def assert_nothing_is_stored(ow: OpenWeights) -> None:
    assert ow.jobs.list() == []
    assert ow.files.list() == []
    assert [path for path in ow.settings.files_folder.rglob("*") if path.is_file()] == []


def start_run(ledger: Callers, job_id: str, *, log: str) -> None:
    """A pod runs the job and has printed something."""
    flow_run, boot = str(uuid.uuid4()), str(uuid.uuid4())
    ledger.call("record_flow_run", for_job=job_id, for_attempt=1, flow_run=flow_run)
    pod = {"id": "w-1", "docker_image": "i", "hardware": "1x L4", "gpu_type": "NVIDIA L4", "gpu_count": 1,
           "vram_gb": 19, "cloud": "SECURE", "price_per_hour": 0.4}  # fmt: skip
    ledger.call("intend_pod", pod=pod, bootstrap_hash=bootstrap_hash("w-1"), ttl_seconds=3600, max_pods=1)
    ledger.call("register_pod", for_worker="w-1", as_boot=boot, lease_seconds=600, models=[])
    ledger.call("open_run", for_run=flow_run, for_worker="w-1", as_boot=boot)
    [answer] = ledger.call(
        "append_log", for_run=flow_run, as_boot=boot, from_offset=0, to_offset=len(log), piece=log
    )
    assert answer["outcome"] == "stored"


def interrupt(*command: str, environment: dict[str, str], stream: str, after: str) -> tuple[int, str]:
    """Ctrl-C as soon as the command has printed `after`; its exit code and all of its stderr."""
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        line = (child.stdout if stream == "stdout" else child.stderr).readline()
        assert after in line
        child.send_signal(signal.SIGINT)
        _, rest = child.communicate(timeout=20)
    finally:
        child.kill()
        child.wait()
    return child.returncode, rest


def mounted(options: str, folder: Path, *command: str, environment: dict[str, str]) -> Any:
    """Run a command that sees a file system of its own at `folder`; stdout ends with what is left there."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a mount of its own needs root and `unshare`")
    folder.mkdir(exist_ok=True)
    if run("unshare", "--mount", "true", environment=environment).returncode != 0:
        pytest.skip("this system does not allow mount namespaces")
    shell = ("unshare", "--mount", "sh", "-c", MOUNTED, "sh", options, str(folder))
    return run(*shell, *command, environment=environment)


# Parameters and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": "fast"}, r"learning_rate='fast': .*Give a number in \(0, 1\]"),
        ({"r": -1}, "r=-1: .*greater than or equal to 1"),
        ({"loss": "magic"}, "loss='magic': .*'sft', 'dpo' or 'orpo'"),
        ({"learnin_rate": 1e-4}, "'learnin_rate' is unknown; did you mean 'learning_rate'"),
        ({"timeout": 0}, "timeout=0: .*greater than or equal to 1"),
        ({"model": "./nowhere"}, r"model='\./nowhere' .*`config\.json`; check the path"),
        ({"allowed_hardware": ["1x H20O"]}, "'1x H20O' is not a hardware.*'2x A100'.*H200"),
        ({"allowed_hardware": ["0x H200"]}, "'0x H200' is not a hardware.*'2x A100'.*H200"),
    ],
)
def test_a_bad_parameter(
    ow: OpenWeights, training_file: Path, arguments: dict[str, Any], message: str
) -> None:
    """The field, its value, and what would be right; an unknown GPU with those of near names."""
    base = {"model": "org/m", "training_file": str(training_file), "loss": "sft"}
    with pytest.raises(InvalidParameterError, match=message):
        ow.fine_tuning.create(**{**base, **arguments})
    assert_nothing_is_stored(ow)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', r"line 2: is not JSON \(.* at column \d+\)"),
        ('{"messages": "no"}', "line 2: messages is 'no' instead of a list"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', r"line 2: .*role is 'bot'; use 'system'"),
        ('{"prompt": "x"}', "line 2: has neither `messages` nor `text`"),
    ],
)
def test_a_broken_line(ow: OpenWeights, training_file: Path, line: str, message: str) -> None:
    """An upload, and a job that would upload, name the file, the line and what is wrong with it."""
    training_file.write_text(f"{GOOD_LINE}\n{line}\n{GOOD_LINE}\n")
    with pytest.raises(InvalidFileError, match=rf"(?s)train\.jsonl' .*: 1 bad line\.\n  {message}"):
        ow.files.upload(training_file, "conversations")
    with pytest.raises(InvalidFileError, match=message):
        ow.fine_tuning.create(model="org/m", training_file=str(training_file), loss="sft")
    assert_nothing_is_stored(ow)


def test_a_missing_file(ow: OpenWeights, training_file: Path) -> None:
    """A path that is not there, a file id that is not stored, a mount: each is named."""
    with pytest.raises(InvalidParameterError, match=r"'nowhere\.jsonl' does not exist; check the path"):
        ow.files.upload("nowhere.jsonl", "conversations")
    with pytest.raises(InvalidParameterError, match=r"training_file='nowhere\.jsonl' is neither a file id"):
        ow.fine_tuning.create(model="org/m", training_file="nowhere.jsonl", loss="sft")
    unknown = "conversations:file-0123456789ab"
    with pytest.raises(InvalidParameterError, match=f"training_file='{unknown}'. Upload it with"):
        ow.fine_tuning.create(model="org/m", training_file=unknown, loss="sft")
    with pytest.raises(NotFoundError, match=rf"No file '{unknown}' .*`ow\.files\.list\(\)`"):
        ow.files.get_by_id(unknown)
    assert_nothing_is_stored(ow)


def test_a_file_that_was_deleted_meanwhile(ow: OpenWeights, training_file: Path) -> None:
    """A canceled job is not run again without its file: the id is named; the local file is uploaded anew."""
    file_id = ow.files.upload(training_file, "conversations")["id"]
    arguments = {"model": "org/m", "loss": "sft"}
    job = ow.fine_tuning.create(training_file=file_id, **arguments)
    job.cancel()
    assert ow.files.delete(file_id)
    with pytest.raises(OpenWeightsError, match=f"{job.id}' cannot be restarted: its files {file_id} were"):
        job.restart()
    with pytest.raises(InvalidParameterError, match=f"training_file='{file_id}'. Upload it with"):
        ow.fine_tuning.create(training_file=file_id, **arguments)
    assert job.refresh().status == "canceled"
    again = ow.fine_tuning.create(training_file=str(training_file), **arguments)
    assert (again.id, again.status) == (job.id, "pending")


# Token and ledger -------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["sk-123456789", "ow_", "ow_short", "ow_with space"])
def test_a_wrong_token(token: str, environment: dict[str, str], ledger_url: str) -> None:
    """Argument and variable are refused alike, naming both, without the secret."""
    variables = {**environment, "OW_DATABASE_URL": ledger_url}
    with pytest.raises(ConfigurationError, match=r"`auth_token` \(or OPENWEIGHTS_API_KEY") as by_argument:
        OpenWeights(token, settings=Settings.load(variables))
    with pytest.raises(ConfigurationError) as by_variable:
        OpenWeights(settings=Settings.load({**variables, "OPENWEIGHTS_API_KEY": token}))
    assert str(by_argument.value) == str(by_variable.value)
    assert token not in str(by_variable.value).replace("'ow_'", "")


def test_a_token_is_kept_secret_and_the_argument_counts(
    environment: dict[str, str], ledger_url: str, ledger: Callers
) -> None:
    """`OpenWeights(token)` replaces the variable; no repr shows it; commands refuse a wrong one too."""
    variables = {**environment, "OW_DATABASE_URL": ledger_url, "OPENWEIGHTS_API_KEY": "sk-secret"}
    token = "ow_0123456789"
    ledger.call("create_token", token_name="t", hash=hash_secret(token), prefix=token[:8])
    with OpenWeights(token, settings=Settings.load(variables)) as client:
        assert client.settings.api_key == token
        assert token not in repr(client.settings)
    message = error_of("ls", environment=variables)
    assert "OPENWEIGHTS_API_KEY" in message
    assert "sk-secret" not in message
    assert message.count("\n") == 1


def test_without_a_stack(environment: dict[str, str]) -> None:
    """Never started: the error names `ow up` and the variable, and no folder is made."""
    for command in (["ls"], ["logs", "x"], ["pod", "ls"]):
        message = error_of(*command, environment=environment)
        assert message.startswith("Error: No ledger is configured. Run `ow up`")
        assert message.count("\n") == 1
    assert not Path(environment["OW_HOME"]).exists()


def test_with_a_stopped_stack(environment: dict[str, str]) -> None:
    """After `ow down` the error is the same: there is no address any more."""
    folders = Folders(Path(environment["OW_HOME"]))
    folders.home.mkdir()
    write_addresses(folders, Settings(home=folders.home, database_url="postgresql://x"))
    forget_addresses(folders)
    assert "No ledger is configured. Run `ow up`" in error_of("ls", environment=environment)


def test_with_a_stack_that_died(environment: dict[str, str], tmp_path: Path) -> None:
    """The error has the cause and `ow up`; the connection pool adds no warnings of its own."""
    url = f"postgresql://authenticator@/openweights?host={tmp_path}"
    program = (
        "import sys; from openweights_prefect.ledger.postgres import local_ledger\n"
        "ledger = local_ledger(sys.argv[1], 'o', patience_seconds=0.5)\n"
        "try: ledger.call('ping')\n"
        "except Exception as exc: print(type(exc).__name__, exc)\n"
        "finally: ledger.close()\n"
    )
    done = run(sys.executable, "-c", program, url, environment=environment)
    assert done.stderr == ""
    assert done.stdout.startswith("LedgerUnavailable The ledger did not answer `ping` in 0.5 s")
    assert "No such file or directory" in done.stdout
    assert done.stdout.endswith("`ow status` says so, `ow up` starts it.\n")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("url", ["nonsense", "host=h password=hunter2", "mysql://u:hunter2@h/d"])
def test_a_ledger_url_that_is_none(environment: dict[str, str], url: str) -> None:
    """Found at once, by the client and by `ow up`; the password stays out of the message."""
    variables = {**environment, "OW_DATABASE_URL": url}
    for command in ("ls", "up"):
        message = error_of(command, environment=variables)
        assert "`OW_DATABASE_URL`" in message
        assert "Write it like postgresql://" in message
        assert "hunter2" not in message


def test_a_damaged_address_file(environment: dict[str, str]) -> None:
    """The error names the file and a mend that works."""
    folders = Folders(Path(environment["OW_HOME"]))
    folders.home.mkdir()
    folders.addresses.write_text('{"database_url": ')
    for command in ("ls", "status", "up"):
        message = error_of(command, environment=environment)
        assert f"'{folders.addresses}' is damaged" in message
        assert "Delete it and run `ow up`" in message


def test_a_home_that_cannot_be_used(environment: dict[str, str], tmp_path: Path) -> None:
    """A file where a folder should be: every command says to set `OW_HOME`."""
    (tmp_path / "file").touch()
    variables = {**environment, "OW_HOME": str(tmp_path / "file" / "home")}
    for command in ("ls", "up", "down", "status"):
        message = error_of(command, environment=variables)
        assert variables["OW_HOME"] in message
        assert "Set `OW_HOME` to a folder that you can" in message


def test_a_read_only_home(environment: dict[str, str], tmp_path: Path, ledger_url: str) -> None:
    """`ow up` and an upload say what cannot be written; the ledger has no row of the file."""
    disk = tmp_path / "disk"
    variables = {**environment, "OW_HOME": str(disk / "home"), "OW_DATABASE_URL": ledger_url}
    done = mounted("ro,size=2g", disk, *OW, "up", environment=variables)
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr
    assert done.stderr.endswith("Set `OW_HOME` to a folder that you can write to.\n")
    source = tmp_path / "data.bin"
    source.write_bytes(b"content")
    done = mounted("ro", disk, sys.executable, "-c", UPLOAD, str(source), environment=variables)
    message, rows = done.stdout.splitlines()[0].split("|")
    assert message.startswith(f"Cannot write '{disk}/home/files/")
    assert "Read-only file system" in message
    assert rows == "0"


# Machine ----------------------------------------------------------------------------------------


def test_no_free_disk_for_the_stack(environment: dict[str, str], tmp_path: Path) -> None:
    """`ow up` looks first: one error with the figures, and nothing is written."""
    disk = tmp_path / "disk"
    variables = {**environment, "OW_HOME": str(disk / "home")}
    done = mounted("size=4m", disk, *OW, "up", environment=variables)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: Only 0.00 GiB are free on the disk of '{disk}/home'; the stack ")
    assert "`OW_HOME`" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == f"{disk}:\n"


def test_no_free_disk_for_a_file(environment: dict[str, str], tmp_path: Path, ledger_url: str) -> None:
    """An upload that does not fit is one error; neither a part of it nor a row is left."""
    disk = tmp_path / "disk"
    source = tmp_path / "data.bin"
    source.write_bytes(os.urandom(3 << 20))
    variables = {**environment, "OW_FILE_STORE": str(disk), "OW_DATABASE_URL": ledger_url}
    done = mounted("size=1m", disk, sys.executable, "-c", UPLOAD, str(source), environment=variables)
    answer, *left = done.stdout.splitlines()
    assert answer.startswith(f"Cannot write '{disk}/")
    assert "no space is left" in answer
    assert answer.endswith("|0")
    assert not [line for line in left if "file-" in line or "partial" in line]


@pytest.mark.parametrize("variable", ["OW_PREFECT_PORT", "OW_SIMULATOR_PORT"])
def test_a_port_in_use(environment: dict[str, str], variable: str) -> None:
    """`ow up` names the port, the variable and the process, and starts nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        message = error_of("up", environment={**environment, variable: str(port)})
    assert f"Port {port} ({variable}) is in use by process {os.getpid()}" in message
    assert message.endswith(f"set {variable} to a free port.\n")
    folders = Folders(Path(environment["OW_HOME"]))
    assert not folders.addresses.exists()
    assert not folders.postgres.exists()
    assert list(folders.run.iterdir()) == []
    assert not [pid for pid in psutil.pids() if home_of(pid) == str(folders.home)]


def home_of(pid: int) -> str | None:
    try:
        return psutil.Process(pid).environ().get(HOME_VARIABLE)
    except (psutil.Error, OSError):
        return None


@pytest.mark.parametrize("port", ["abc", "0", "65536"])
def test_a_port_that_is_none(environment: dict[str, str], port: str) -> None:
    """The variable and its value are named."""
    message = error_of("up", environment={**environment, "OW_PREFECT_PORT": port})
    assert "OW_PREFECT_PORT=" in message
    assert port in message
    assert message.count("\n") == 1


# Jobs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["logs", "show", "events", "fetch", "cancel", "restart"])
def test_an_unknown_job(environment: dict[str, str], ledger_url: str, command: str) -> None:
    """Exit code 1 and the id; `ow fetch` makes no folder."""
    message = error_of(command, "nope", environment={**environment, "OW_DATABASE_URL": ledger_url})
    assert message.startswith("Error: No job 'nope' in this organization")
    assert message.count("\n") == 1
    assert not Path("nope").exists()


def test_changes_that_the_state_forbids(environment: dict[str, str], ledger_url: str, job_id: str) -> None:
    """A job that has ended cannot be canceled: the state is named and stays."""
    variables = {**environment, "OW_DATABASE_URL": ledger_url}
    assert run(*OW, "cancel", job_id, environment=variables).stdout == f"{job_id}: canceled\n"
    message = error_of("cancel", job_id, environment=variables)
    assert message.startswith(f"Error: Job '{job_id}' is canceled and cannot be canceled; only a pending")
    [job] = json.loads(run(*OW, "ls", "--json", environment=variables).stdout)
    assert job["status"] == "canceled"


def test_ctrl_c_while_following_a_log(
    environment: dict[str, str], ledger_url: str, ledger: Callers, job_id: str
) -> None:
    """`ow logs -f` ends with 130 and says nothing; the job goes on."""
    start_run(ledger, job_id, log="first line\n")
    code, stderr = interrupt(
        *OW, "logs", "-f", job_id,
        environment={**environment, "OW_DATABASE_URL": ledger_url}, stream="stdout", after="first line",
    )  # fmt: skip
    assert code == 130
    assert "Traceback" not in stderr
    assert ledger.call("get_job", job_id=job_id)[0]["status"] == "in_progress"


def test_ctrl_c_while_waiting(
    environment: dict[str, str], ledger_url: str, ledger: Callers, job_id: str
) -> None:
    """`job.wait()` is a `KeyboardInterrupt` with a note; the job goes on."""
    code, stderr = interrupt(
        sys.executable, "-c", WAIT, job_id,
        environment={**environment, "OW_DATABASE_URL": ledger_url}, stream="stderr", after="pending",
    )  # fmt: skip
    assert code in (130, -signal.SIGINT)
    assert f"Stopped waiting; job {job_id} goes on. `job.cancel()` stops it." in stderr
    assert ledger.call("get_job", job_id=job_id)[0]["status"] == "pending"


def test_a_call_gives_up_when_it_is_told_to() -> None:
    """`patience_seconds` of one call shortens the ledger's own, and never lengthens it."""
    ledger = local_ledger("postgresql://nobody@127.0.0.1:1/none", LOCAL_ORGANIZATION_ID, patience_seconds=1)
    for given, expected in ((0.2, 0.2), (60, 1)):
        start = time.monotonic()
        with pytest.raises(LedgerUnavailable, match=f"in {expected} s .*Connection refused"):
            ledger.call("ping", patience_seconds=given)
        assert expected - 0.2 < time.monotonic() - start < expected + 2
    ledger.close()
