"""Starts, finds and stops the process of a service; never touches a process that is not the recorded one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from openweights_prefect.errors import StackError
from openweights_prefect.stack.addresses import write_private
from openweights_prefect.stack.service import (
    HOME_VARIABLE,
    SERVICE_VARIABLE,
    Folders,
    Service,
    ServiceProcess,
)

LONGEST_LOG_BYTES = 10_000_000
_POLL_SECONDS = 0.1
_SWEEP_SECONDS = 10.0
_CLOCK_SECONDS = 2.0  # A start time is derived from the clock, which may be set meanwhile.
_TAIL_LINES = 15


def find(service: Service, folders: Folders) -> ServiceProcess | None:
    """The recorded process of the service, if it is alive; a record of another one is ignored."""
    try:
        document = json.loads(service.record(folders).read_text(encoding="utf-8"))
        recorded = ServiceProcess(**document)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return recorded if _process(recorded) is not None else None


def launch(service: Service, folders: Folders, common: Mapping[str, str]) -> ServiceProcess:
    """Start the service detached from this process; what was left of an earlier one is ended first."""
    sweep({HOME_VARIABLE: str(folders.home), SERVICE_VARIABLE: service.name})
    log = service.log(folders)
    _rotate(log)
    environment = {**common, **service.environment, SERVICE_VARIABLE: service.name}
    with log.open("ab") as output:
        child = subprocess.Popen(
            service.argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folders.run,
            env=environment,
            start_new_session=True,
        )
    process = ServiceProcess(child.pid, psutil.Process(child.pid).create_time(), service.digest)
    write_private(service.record(folders), json.dumps(dataclasses.asdict(process)))
    child.returncode = 0  # It outlives us on purpose, and `Popen` would warn about that.
    return process


def await_healthy(service: Service, process: ServiceProcess, folders: Folders) -> None:
    """Return when the service works.

    Raises `StackError` with the end of its log when it ends or takes too long.
    """
    deadline = time.monotonic() + service.start_seconds
    while not service.healthy(process):
        if _process(process) is None:
            raise _failure(service, folders, "ended while it was starting")
        if time.monotonic() > deadline:
            raise _failure(service, folders, f"did not answer within {service.start_seconds:.0f} s")
        time.sleep(_POLL_SECONDS)


def stop(service: Service, folders: Folders) -> bool:
    """End the service and everything that it started; False when it was not running. Idempotent."""
    recorded = find(service, folders)
    process = None if recorded is None else _process(recorded)
    if process is not None:
        family = list(_family(process))
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
        psutil.wait_procs([process], timeout=service.stop_seconds)
        _kill([process, *family])
    service.record(folders).unlink(missing_ok=True)
    return process is not None


def sweep(marks: Mapping[str, str], *, patience_seconds: float = _SWEEP_SECONDS) -> int:
    """End every process whose environment carries all these marks; returns how many there were."""
    found = list(_marked(marks))
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, stubborn = psutil.wait_procs(found, timeout=patience_seconds)
    _kill(stubborn)
    return len(found)


def tail(log: Path, lines: int = _TAIL_LINES) -> str:
    """The last lines of a log, indented."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - 20_000, 0))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])


def _process(recorded: ServiceProcess) -> psutil.Process | None:
    try:
        process = psutil.Process(recorded.pid)
        same = abs(process.create_time() - recorded.started_at) <= _CLOCK_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _family(leader: psutil.Process) -> Iterator[psutil.Process]:
    """Descendants and members of the process group; taken while the leader lives, so that no id is reused."""
    with contextlib.suppress(psutil.Error):
        yield from leader.children(recursive=True)
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if process.pid != leader.pid and os.getpgid(process.pid) == leader.pid:
                yield process


def _marked(marks: Mapping[str, str]) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if all(environment.get(name) == value for name, value in marks.items()):
                yield process


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # psutil compares the start time before it kills.
            process.kill()
    psutil.wait_procs(processes, timeout=_SWEEP_SECONDS)


def _rotate(log: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LONGEST_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
    log.touch(mode=0o600)


def _failure(service: Service, folders: Folders, what: str) -> StackError:
    log = service.log(folders)
    return StackError(
        f"The {service.title} {what}. Mend the cause and run `ow up` again. "
        f"The end of {str(log)!r}:\n{tail(log)}"
    )
