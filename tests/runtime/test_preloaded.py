"""A forked job is what a fresh process of it would be, without its imports; and nothing stays of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import openweights_prefect
from openweights_prefect.runtime import forking
from openweights_prefect.runtime.forking import Forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere jobs are never forked")

RUN_ID = "0190c0de-0000-7000-8000-000000000001"
TOKEN = "sesame"
PROGRAM = "openweights_prefect.pretend.program"

PLAN = f"""
import threading, time
ENVIRONMENT = {{"WHILE_IMPORTING": "1"}}
MODULES = ("{PROGRAM}",)
LATE = ("HF_TOKEN",)
why = None
def preload():
    from openweights_prefect.pretend import library
    if library.THREAD:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
def why_not_fork():
    from openweights_prefect.pretend import library
    return library.WHY
"""
LIBRARY = """
import os, random, tempfile
IMPORTED_IN, IMPORTED_WITH = os.getpid(), os.environ.get("WHILE_IMPORTING")
TEMPORARY = tempfile.gettempdir()
THREAD, WHY = "THREAD" in os.environ, os.environ.get("WHY")
CHANGED = []
"""
ACTS = """
import atexit, json, os, random, signal, subprocess, sys, tempfile, time
from openweights_prefect.pretend import library

def seen():
    ours = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
    handlers = [str(signal.getsignal(number)) for number in ours]
    return {
        "arguments": sys.argv, "path": sys.path, "folder": os.getcwd(), "name": __name__,
        "environment": dict(os.environ), "temporary": tempfile.gettempdir(), "handlers": handlers,
        "blocked": [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "leads": os.getpid() == os.getsid(0) == os.getpgid(0),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }

def main(act, number="0"):
    if act == "look":
        more = {"imported_in": library.IMPORTED_IN, "imported_with": library.IMPORTED_WITH,
                "changed": library.CHANGED, "random": random.random()}
        json.dump({"seen": seen(), **more}, open("seen.json", "w"))
        library.CHANGED.append(1)
        os.environ["LEFT"] = "1"
        random.seed(0)
    elif act == "talk":
        atexit.register(print, "the end")
        print("out"); print("err", file=sys.stderr)
    elif act == "raise":
        raise ValueError("of the program")
    elif act == "signal":
        os.kill(os.getpid(), int(number))
    elif act == "wait":
        child = subprocess.Popen(["sleep", "600"])
        open("pids.new", "w").write(f"{os.getpid()} {child.pid}")
        os.rename("pids.new", "pids")
        time.sleep(600)
    return int(number)

if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
"""

Start = Callable[..., "Preloaded"]


class Preloaded:
    """A preloaded process with a pretended library, and a place for jobs."""

    def __init__(self, folder: Path, sockets: Path, **variables: str) -> None:
        self.folder = folder
        self.library = folder / "lib"
        package = self.library / "openweights_prefect"
        (package / "pretend").mkdir(parents=True)
        for name in ("__init__.py", "errors.py", "runtime", "types"):
            (package / name).symlink_to(Path(openweights_prefect.__file__).parent / name)
        for name, text in {"__init__": "", "plan": PLAN, "library": LIBRARY, "program": ACTS}.items():
            (package / "pretend" / f"{name}.py").write_text(text)
        self.base = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONUNBUFFERED": "1", **variables}
        self.socket = sockets / "preloaded.sock"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "openweights_prefect.runtime.preloaded", str(self.socket)),
                *(hashlib.sha256(TOKEN.encode()).hexdigest(), "openweights_prefect.pretend.plan"),
            ],
            env={**self.base, "PYTHONPATH": str(self.library), "OPENWEIGHTS_RUN_ID": forking.UNMARKED},
            cwd=folder,
            stdin=subprocess.DEVNULL,
        )
        _until(self.socket.exists)
        os.environ[forking.SOCKET_VARIABLE] = str(self.socket)
        os.environ[forking.TOKEN_VARIABLE] = TOKEN

    def environment(self, work: Path, **more: str) -> dict[str, str]:
        """A job's, as the entrypoint gets it."""
        temporary = work / "tmp"
        temporary.mkdir(exist_ok=True)
        named = {"OPENWEIGHTS_RUN_ID": RUN_ID, "N_GPUS": "0", "TMPDIR": str(temporary)}
        return {**self.base, "PYTHONPATH": str(self.library), **named, **more}

    def fork(self, act: str, *, module: str = PROGRAM, **more: str) -> Forked | None:
        return forking.fork(
            f"python -m {module} {act}", folder=self.work, environment=self.environment(self.work, **more)
        )

    def run(self, act: str, **more: str) -> int:
        forked = self.fork(act, **more)
        assert forked is not None
        return asyncio.run(forked.wait())

    @property
    def work(self) -> Path:
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        return work

    def look(self, **more: str) -> Any:
        assert self.run("look", **more) == 0
        return json.loads((self.work / "seen.json").read_text())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv(forking.SOCKET_VARIABLE, "")
    monkeypatch.setenv(forking.TOKEN_VARIABLE, "")
    sockets = Path(tempfile.mkdtemp(prefix="ow-test-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, sockets)

        def begin(**variables: str) -> Preloaded:
            preloaded = Preloaded(tmp_path, sockets, **variables)
            stack.callback(preloaded.close)
            return preloaded

        yield begin


@pytest.fixture
def preloaded(start: Start) -> Preloaded:
    return start()


def test_a_fork_is_like_a_fresh_process(preloaded: Preloaded) -> None:
    """Arguments, paths, folder, environment, signals, session, descriptors: all but the imports."""
    forked = preloaded.look(HF_TOKEN="hf_secret")
    environment = preloaded.environment(preloaded.work, HF_TOKEN="hf_secret")
    command = [sys.executable, "-m", PROGRAM, "look"]
    subprocess.run(
        command,
        cwd=preloaded.work,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
    )
    fresh = json.loads((preloaded.work / "seen.json").read_text())
    assert forked["seen"] == fresh["seen"]
    assert (forked["imported_in"], forked["imported_with"]) == (preloaded.process.pid, "1")
    assert fresh["imported_in"] != preloaded.process.pid


def test_no_fork_sees_another(preloaded: Preloaded) -> None:
    """What a job changes in its libraries and its environment, and where its random numbers begin."""
    first, second = preloaded.look(), preloaded.look()
    assert (first["changed"], second["changed"]) == ([], [])
    assert "LEFT" not in second["seen"]["environment"]
    assert first["random"] != second["random"]


def test_output_and_exit_code_come_back(preloaded: Preloaded, capfd: pytest.CaptureFixture[str]) -> None:
    """What is done at exit is done, too."""
    assert preloaded.run("talk 3") == 3
    assert capfd.readouterr() == ("out\nthe end\n", "err\n")
    assert preloaded.run("raise") == 1
    assert "ValueError: of the program" in capfd.readouterr().err
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        assert preloaded.run(f"signal {number:d}") == -number


def test_a_fork_carries_the_mark_of_its_run(preloaded: Preloaded) -> None:
    """As a fresh process does, for whoever looks for what a run has left."""
    forked = preloaded.fork("wait")
    assert forked is not None
    mark = f"OPENWEIGHTS_RUN_ID={RUN_ID}".encode()
    assert mark in Path(f"/proc/{forked.pid}/environ").read_bytes().split(b"\0")
    assert mark not in Path(f"/proc/{preloaded.process.pid}/environ").read_bytes().split(b"\0")


def test_a_fork_ends_with_whoever_waits_for_it(preloaded: Preloaded) -> None:
    """With its group; the next one is forked as ever."""

    async def cancel() -> list[int]:
        forked = preloaded.fork("wait")
        assert forked is not None
        waiting = asyncio.create_task(forked.wait())
        await asyncio.to_thread(_until, (preloaded.work / "pids").exists)
        waiting.cancel()
        await asyncio.wait([waiting])
        return [int(pid) for pid in (preloaded.work / "pids").read_text().split()]

    for pid in asyncio.run(cancel()):
        _until(lambda pid=pid: _is_gone(pid))
    assert preloaded.run("talk 0") == 0


def test_a_fork_ends_with_the_preloaded_process(preloaded: Preloaded) -> None:
    """Which is no other end for whoever waits than one by SIGKILL."""
    forked = preloaded.fork("wait")
    assert forked is not None
    preloaded.close()
    assert asyncio.run(forked.wait()) == -signal.SIGKILL
    _until(lambda: _is_gone(forked.pid))
    assert preloaded.fork("talk") is None


def test_signals_to_its_group_do_not_end_the_preloaded_process(preloaded: Preloaded) -> None:
    """Its agent decides, who gets them, too."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        preloaded.process.send_signal(number)
    assert preloaded.run("talk 0") == 0


@pytest.mark.parametrize(
    ("act", "more"),
    [
        ("look", {"OF_THE_JOB": "1"}),
        ("look", {"HOME": "/elsewhere"}),
        ("look", {"module": "openweights_prefect.pretend.library"}),
        ("look", {"module": "json.tool"}),
        ("look; true", {}),
    ],
)
def test_what_is_not_forked(preloaded: Preloaded, act: str, more: dict[str, str]) -> None:
    """Variables that a library may have read already, programs that are not in the plan, other commands."""
    assert preloaded.fork(act, **more) is None


def test_only_who_knows_the_token_is_served(preloaded: Preloaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """And others of the same user only."""
    assert preloaded.socket.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(forking.TOKEN_VARIABLE, "open")
    assert preloaded.fork("look") is None
    assert not (preloaded.work / "seen.json").exists()


@pytest.mark.parametrize("variable", ["THREAD", "WHY"])
def test_an_unsafe_fork_is_refused(start: Start, variable: str, capfd: pytest.CaptureFixture[str]) -> None:
    """When a library started a thread, or the plan says so, for instance of a GPU."""
    assert start(**{variable: "because"}).fork("look") is None
    expected = "a library has started a thread" if variable == "THREAD" else "because"
    assert expected in capfd.readouterr().err


def test_a_preloaded_process_that_hangs_is_not_waited_for(
    preloaded: Preloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job then starts otherwise, and only once."""
    preloaded.process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(forking, "ANSWER_SECONDS", 0.2)
        assert preloaded.fork("look") is None
    preloaded.process.send_signal(signal.SIGCONT)
    assert preloaded.run("talk 0") == 0
    assert not (preloaded.work / "seen.json").exists()


def test_no_secret_reaches_the_preloaded_process(preloaded: Preloaded) -> None:
    """Only its children read orders: a job cannot find what an earlier one was told."""
    secret = f"hf_{'x' * 40}{os.getpid()}"
    preloaded.look(HF_TOKEN=secret)
    memory = _memory(preloaded.process.pid)
    assert hashlib.sha256(TOKEN.encode()).hexdigest().encode() in memory
    assert secret.encode() not in memory
    assert RUN_ID.encode() not in memory


def _memory(pid: int) -> bytes:
    """What a process can write to."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            addresses, rights = line.split()[:2]
            if rights.startswith("rw"):
                begin, end = (int(address, 16) for address in addresses.split("-"))
                memory.seek(begin)
                found.append(memory.read(end - begin))
    return b"".join(found)


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
