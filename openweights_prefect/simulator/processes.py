"""Containers as local process groups: start them, and leave nothing of them behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

INSTANCE_VARIABLE = "RUNPOD_SIM_INSTANCE"
"""Marks every process of this simulator's pods; inherited, unlike a process group."""
POD_VARIABLE = "RUNPOD_POD_ID"

_PR_SET_PDEATHSIG = 1
_MOST_ROUNDS = 50


class Container:
    """One started container: its process group, whose leader this process has not reaped yet or has."""

    def __init__(self, process: asyncio.subprocess.Process, *, instance: str, pod_id: str) -> None:
        self._process = process
        self._marks = {INSTANCE_VARIABLE: instance, POD_VARIABLE: pod_id}
        self.pid = process.pid

    async def wait(self) -> int:
        """The exit code of the container; everything else of it is killed before this returns."""
        code = await self._process.wait()
        await asyncio.to_thread(sweep, self._marks)
        return code

    async def stop(self, grace_seconds: float) -> None:
        """SIGTERM to the group, SIGKILL after the grace, then a sweep."""
        descendants = self._descendants()
        if self._signal(signal.SIGTERM):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_seconds)
        await self._end(descendants)

    async def kill(self) -> None:
        """SIGKILL to everything of the container at once."""
        await self._end(self._descendants())

    def crash(self) -> None:
        """SIGKILL, and no more: `wait` sweeps, before the pod's next container may start."""
        descendants = self._descendants()
        self._signal(signal.SIGKILL)
        _kill(descendants)

    async def _end(self, descendants: list[psutil.Process]) -> None:
        descendants += self._descendants()
        self._signal(signal.SIGKILL)
        _kill(descendants)
        await self._process.wait()
        await asyncio.to_thread(sweep, self._marks)

    def _signal(self, number: signal.Signals) -> bool:
        # An unreaped leader keeps its id, and the group's, from being given to somebody else.
        if self._process.returncode is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
        return True

    def _descendants(self) -> list[psutil.Process]:
        """Children that may have cleared their environment are known by their parents while those live."""
        if self._process.returncode is not None:
            return []
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).children(recursive=True)
        return []


async def start_container(
    argv: Sequence[str], *, env: Mapping[str, str], folder: Path, log: Path, instance: str, pod_id: str
) -> Container:
    """Start a container in a session of its own; raises OSError when the command cannot be executed."""
    marked = {**env, INSTANCE_VARIABLE: instance, POD_VARIABLE: pod_id}
    die = functools.partial(_die_with, os.getpid()) if sys.platform == "linux" else None
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=folder,
            env=marked,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die,
        )
    return Container(process, instance=instance, pod_id=pod_id)


def sweep(marks: Mapping[str, str]) -> int:
    """Kill every process whose environment carries all these marks; returns how many there were.

    Repeated until none is found, because a process may fork while it is being looked for.
    """
    killed = 0
    for _ in range(_MOST_ROUNDS):
        found = list(_marked(marks))
        if not found:
            return killed
        killed += len(found)
        _kill(found)
        psutil.wait_procs(found, timeout=1)
    return killed


def _marked(marks: Mapping[str, str]) -> Iterator[psutil.Process]:
    # Not `process_iter`: it remembers processes whose id may have gone to another one since.
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if all(environment.get(name) == value for name, value in marks.items()):
                yield process


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        # psutil compares the start time: an id that was given to another process is left alone.
        with contextlib.suppress(psutil.Error):
            process.kill()


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with(parent: int) -> None:
    """Runs in the child before exec: it dies when the simulator does, however that dies."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
