from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from openweights_prefect.errors import ConfigurationError, StackError
from openweights_prefect.ledger import embedded
from openweights_prefect.settings import Settings
from openweights_prefect.stack import addresses, health, ports, processes, services
from openweights_prefect.stack.down import down
from openweights_prefect.stack.environment import common_environment
from openweights_prefect.stack.locking import exclusive
from openweights_prefect.stack.service import HOME_VARIABLE, Folders, Service, ServiceProcess
from openweights_prefect.stack.state import status
from openweights_prefect.stack.up import up

SERVER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
ALWAYS: Callable[[ServiceProcess], bool] = lambda process: True  # noqa: E731


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Folders]:
    folders = Folders(tmp_path / "home")
    for folder in (folders.home, folders.logs, folders.run):
        folder.mkdir()
    yield folders
    processes.sweep({HOME_VARIABLE: str(folders.home)}, patience_seconds=1)


@pytest.fixture
def home() -> Iterator[Path]:
    """A home that any account can walk to: PostgreSQL of root runs as another one."""
    parent = Path(tempfile.mkdtemp(prefix="ow-test-stack-"))
    parent.chmod(0o755)
    yield parent / "home"
    processes.sweep({HOME_VARIABLE: str(parent / "home")}, patience_seconds=1)
    embedded.remove(parent / "home" / "postgres")
    shutil.rmtree(parent)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(text: str, *arguments: str, healthy: Callable[[ServiceProcess], bool] = ALWAYS) -> Service:
    argv = (sys.executable, "-c", text, *arguments)
    return Service("stand-in", "stand-in", argv, "nowhere", healthy, start_seconds=20, stop_seconds=5)


def web_service() -> Service:
    port = free_port()
    return program(SERVER, str(port), healthy=lambda _: health.answers(f"http://127.0.0.1:{port}/"))


def launch(service: Service, folders: Folders) -> ServiceProcess:
    common = {HOME_VARIABLE: str(folders.home), "PATH": os.defpath}
    return processes.launch(service, folders, common)


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_launched_service_is_found_until_it_is_stopped(folders: Folders) -> None:
    """A later process finds a running service by its record; stopping twice is no error."""
    service = web_service()
    process = launch(service, folders)
    processes.await_healthy(service, process, folders)
    assert processes.find(service, folders) == process
    assert processes.stop(service, folders)
    assert not is_alive(process.pid)
    assert processes.find(service, folders) is None
    assert not processes.stop(service, folders)


def test_a_service_is_detached(folders: Folders) -> None:
    """A service has a session of its own, so that closing the terminal does not end it."""
    process = launch(web_service(), folders)
    assert os.getsid(process.pid) == process.pid != os.getsid(0)


def test_a_reused_pid_is_never_touched(folders: Folders) -> None:
    """A record that names a process started at another time is ignored: that process is somebody else's."""
    service = web_service()
    stranger = launch(service, folders)
    record = {**dataclasses.asdict(stranger), "started_at": stranger.started_at - 100}
    service.record(folders).write_text(json.dumps(record))
    assert processes.find(service, folders) is None
    assert not processes.stop(service, folders)
    assert is_alive(stranger.pid)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}'])
def test_a_broken_record_counts_as_none(folders: Folders, text: str) -> None:
    """A record that cannot be read means that nothing is known to run."""
    service = web_service()
    service.record(folders).write_text(text)
    assert processes.find(service, folders) is None


def test_a_stubborn_service_is_killed_with_its_children(folders: Folders) -> None:
    """A service that ignores SIGTERM is killed after its grace, and so is everything that it started."""
    service = dataclasses.replace(program(STUBBORN), stop_seconds=0.2)
    process = launch(service, folders)
    log = service.log(folders)
    eventually(lambda: log.read_text().endswith("\n"))
    child = int(log.read_text())
    assert processes.stop(service, folders)
    assert not is_alive(process.pid)
    assert not is_alive(child)


def test_a_service_that_ends_at_once_shows_its_log(folders: Folders) -> None:
    """A failing start is a StackError with the end of the log and what to do."""
    service = program("import sys; sys.exit('no flux capacitor')", healthy=lambda _: False)
    process = launch(service, folders)
    with pytest.raises(StackError, match=r"(?s)stand-in ended while it was starting.*`ow up`.*flux"):
        processes.await_healthy(service, process, folders)


def test_a_service_that_never_answers_times_out(folders: Folders) -> None:
    """Waiting for a service has an end."""
    service = dataclasses.replace(program(STUBBORN, healthy=lambda _: False), start_seconds=0.3)
    with pytest.raises(StackError, match="did not answer within"):
        processes.await_healthy(service, launch(service, folders), folders)


def test_a_launch_ends_what_an_earlier_one_left(folders: Folders) -> None:
    """When the record of a running service is lost, a new one does not run beside it."""
    service = web_service()
    lost = launch(service, folders)
    service.record(folders).unlink()
    process = launch(service, folders)
    processes.await_healthy(service, process, folders)
    assert not is_alive(lost.pid)


def test_a_long_log_is_moved_aside_at_the_next_start(folders: Folders) -> None:
    """Logs do not grow for ever."""
    service = program("print('new')")
    service.log(folders).write_bytes(b"old" * processes.LONGEST_LOG_BYTES)
    launch(service, folders)
    eventually(lambda: service.log(folders).read_text() == "new\n")
    assert (folders.logs / "stand-in.log.1").stat().st_size > processes.LONGEST_LOG_BYTES


def test_a_port_in_use_is_passed_over(folders: Folders) -> None:
    """The next free port is taken; a port that the user insists on is an error that names it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert ports.choose(port, variable="OW_PREFECT_PORT", required=False) > port
        with pytest.raises(
            StackError, match=rf"Port {port} \(OW_PREFECT_PORT\) is in use by process {os.getpid()}"
        ):
            ports.choose(port, variable="OW_PREFECT_PORT", required=True)
    assert ports.choose(port, variable="OW_PREFECT_PORT", required=True) == port


def test_services_get_an_allow_list_of_the_environment(folders: Folders) -> None:
    """Credentials of the user's shell stay there; addresses come from `stack.json` only."""
    environment = {
        "PATH": "/bin",
        "AWS_SECRET_ACCESS_KEY": "x",
        "RUNPOD_API_KEY": "x",
        "PREFECT_API_KEY": "x",
        "OW_DATABASE_URL": "x",
        "OW_MAX_WORKERS": "3",
    }
    passed = common_environment(folders, environment)
    assert passed["PATH"] == "/bin"
    assert passed["OW_MAX_WORKERS"] == "3"
    assert passed["DO_NOT_TRACK"] == "1"
    assert "x" not in passed.values()


def test_a_stopped_stack_remembers_its_choices_but_no_address(folders: Folders) -> None:
    """After `ow down` the client says that nothing runs, and `ow up` takes the same ports and interpreter."""
    settings = Settings(home=folders.home, database_url="postgresql://x", job_python="/py", prefect_port=4444)
    addresses.write_addresses(folders, settings)
    assert stat.S_IMODE(folders.addresses.stat().st_mode) == 0o600
    addresses.forget_addresses(folders)
    after = Settings.load({"OW_HOME": str(folders.home)})
    assert (after.database_url, after.job_python, after.prefect_port) == ("", "/py", 4444)


def test_the_api_key_is_made_once_and_is_private(folders: Folders) -> None:
    """The key of the simulated RunPod survives restarts, and is on no command line."""
    key = addresses.ensure_api_key(folders)
    assert addresses.ensure_api_key(folders) == key
    assert stat.S_IMODE(folders.api_key.stat().st_mode) == 0o600
    planned = services.plan(Settings(home=folders.home), folders, prefect_database_url="", api_key=key)
    assert not any(key in argument for service in planned for argument in service.argv)


def test_one_process_at_a_time_changes_the_stack(folders: Folders) -> None:
    """A second `ow up` waits for the first, and says so."""
    lines: list[str] = []
    order: list[str] = []

    def second() -> None:
        with exclusive(folders, lines.append):
            order.append("second")

    with exclusive(folders, lines.append):
        thread = threading.Thread(target=second)
        thread.start()
        eventually(lambda: bool(lines))
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "waiting" in lines[0]


def start_environment(home: Path, **more: str) -> dict[str, str]:
    simulator, prefect = free_port(), free_port()
    environment = {"PATH": os.environ["PATH"], "OW_HOME": str(home)}
    return {**environment, "OW_SIMULATOR_PORT": str(simulator), "OW_PREFECT_PORT": str(prefect), **more}


def processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(HOME_VARIABLE) == str(home) and process.status() != "zombie":
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def test_a_required_port_in_use_starts_nothing(home: Path) -> None:
    """`OW_PREFECT_PORT` of somebody else: one error, no process, no address file."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment = start_environment(home, OW_PREFECT_PORT=str(listener.getsockname()[1]))
        with pytest.raises(StackError, match="OW_PREFECT_PORT"):
            up(environment=environment, progress=lambda _: None)
    assert processes_of(home) == []
    assert not Folders(home).addresses.exists()


def test_a_bad_interpreter_is_one_clear_error(home: Path) -> None:
    """A job interpreter that does not exist is found before anything starts."""
    environment = start_environment(home)
    with pytest.raises(ConfigurationError, match=r"'/no/python'.*--job-python"):
        up(environment=environment, job_python="/no/python", progress=lambda _: None)


def test_a_failing_step_stops_what_was_started(home: Path) -> None:
    """When the ledger cannot be prepared, PostgreSQL, the simulator and Prefect are stopped again."""
    environment = start_environment(home, OW_ORGANIZATION_ID="not a uuid")
    steps: list[str] = []
    with pytest.raises(StackError, match="OW_ORGANIZATION_ID"):
        up(environment=environment, progress=steps.append)
    assert "PostgreSQL started" in steps
    assert processes_of(home) == []
    assert not embedded.is_running(Folders(home).postgres)
    assert not Folders(home).addresses.exists()
    assert list(Folders(home).run.iterdir()) == []


def test_stopping_nothing_is_no_error(tmp_path: Path) -> None:
    """`ow down` without a stack does nothing, and makes no folder."""
    assert down(environment={"OW_HOME": str(tmp_path / "home")}, progress=lambda _: None) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.stack
def test_the_whole_stack_starts_once_repairs_itself_and_stops(home: Path) -> None:
    """Two at once give one stack; what died is started again; nothing is left and the choices stay."""
    environment = start_environment(home)
    threads = [
        threading.Thread(target=up, kwargs={"environment": environment, "progress": lambda _: None})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    try:
        settings = addresses.running_settings(environment)
        before = {service.name: service.pid for service in status(settings)}
        assert all(service.up for service in status(settings))
        killed = before["worker"]
        assert killed is not None
        psutil.Process(killed).kill()
        after = up(environment=environment, progress=lambda _: None)
        assert all(service.up for service in after)
        changed = {service.name for service in after if service.pid != before[service.name]}
        assert changed == {"worker"}
    finally:
        stopped = down(environment=environment, progress=lambda _: None)
    assert stopped == ["worker", "simulator", "prefect", "postgres"]
    assert processes_of(home) == []
    assert not embedded.is_running(Folders(home).postgres)
    assert Settings.load({"OW_HOME": str(home)}).prefect_port == int(environment["OW_PREFECT_PORT"])
