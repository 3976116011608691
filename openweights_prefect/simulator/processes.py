"""Containers as local process groups: start them, and leave nothing of them behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import resource
import signal
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INSTANCE_VARIABLE = "RUNPOD_SIM_INSTANCE"
"""Marks every process of this simulator's pods; inherited, unlike a process group."""
POD_VARIABLE = "RUNPOD_POD_ID"

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_NOWHERE = "http://127.0.0.1:1"
"""A proxy that nobody answers at."""
_MOST_ROUNDS = 50


@dataclass(frozen=True)
class Limits:
    """What the machine keeps from a container."""

    network: bool = True
    file_bytes: int | None = None
    """The largest file that it can write."""


class Sweeper:
    """Ends what containers have left; those that end at the same time share one look at the processes."""

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._round: asyncio.Task[None] | None = None

    async def sweep(self, pod_id: str) -> None:
        """Return when no process of the pod is left that was there before the call."""
        waiting = self._waiting.get(pod_id)
        if waiting is None:
            waiting = self._waiting[pod_id] = asyncio.get_running_loop().create_future()
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self._work())
        await asyncio.shield(waiting)

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, {}
            await asyncio.to_thread(sweep, self.instance, batch.keys())
            for waiting in batch.values():
                waiting.set_result(None)


class Container:
    """One started container: its process group, whose leader this process has not reaped yet or has."""

    def __init__(self, process: asyncio.subprocess.Process, *, sweeper: Sweeper, pod_id: str) -> None:
        self._process = process
        self._sweeper = sweeper
        self._pod_id = pod_id
        self.pid = process.pid

    async def wait(self) -> int:
        """The exit code of the container; everything else of it is killed before this returns."""
        code = await self._process.wait()
        await self._sweeper.sweep(self._pod_id)
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

    def freeze(self) -> None:
        """SIGSTOP to everything of the container."""
        for process in [*self._descendants(), *self._leader()]:
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def thaw(self) -> None:
        """Undo `freeze`."""
        for process in [*self._leader(), *self._descendants()]:
            with contextlib.suppress(psutil.Error):
                process.resume()

    def send(self, number: signal.Signals) -> None:
        """A signal to the first process of the container alone."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    def send_group(self, number: signal.Signals) -> None:
        """A signal to the container's process group."""
        self._signal(number)

    def limit_files(self, file_bytes: int) -> None:
        """Let no file of the running processes grow beyond this; only Linux can do it from outside."""
        if sys.platform != "linux":
            return
        for process in [*self._leader(), *self._descendants()]:
            with contextlib.suppress(psutil.Error, OSError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    def _leader(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [psutil.Process(self.pid)] if self._process.returncode is None else []
        return []

    async def _end(self, descendants: list[psutil.Process]) -> None:
        descendants += self._descendants()
        self._signal(signal.SIGKILL)
        _kill(descendants)
        await self._process.wait()
        await self._sweeper.sweep(self._pod_id)

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
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    folder: Path,
    log: Path,
    sweeper: Sweeper,
    pod_id: str,
    limits: Limits,
) -> Container:
    """Start a container in a session of its own; raises OSError when the command cannot be executed."""
    marked = {**env, INSTANCE_VARIABLE: sweeper.instance, POD_VARIABLE: pod_id}
    if not limits.network:
        # For systems that cannot take the network away.
        marked |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), _NOWHERE)
        marked |= {"NO_PROXY": "", "no_proxy": ""}
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=folder,
            env=marked,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=functools.partial(_confine, os.getpid(), limits),
        )
    return Container(process, sweeper=sweeper, pod_id=pod_id)


def sweep(instance: str, pods: Collection[str] | None = None) -> int:
    """Kill every process of these pods, or of all pods, of a simulator; returns how many there were.

    Repeated until none is found, because a process may fork while it is being looked for.
    """
    killed = 0
    for _ in range(_MOST_ROUNDS):
        found = list(_marked(instance, pods))
        if not found:
            return killed
        killed += len(found)
        _kill(found)
        psutil.wait_procs(found, timeout=1)
    return killed


def _marked(instance: str, pods: Collection[str] | None) -> Iterator[psutil.Process]:
    mark = f"{INSTANCE_VARIABLE}={instance}".encode()
    # Not `process_iter`: it remembers processes whose id may have gone to another one since.
    for pid in psutil.pids():
        if sys.platform == "linux" and not _may_carry(pid, mark):
            continue
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            same = environment.get(INSTANCE_VARIABLE) == instance
            if same and (pods is None or environment.get(POD_VARIABLE) in pods):
                yield process


def _may_carry(pid: int, mark: bytes) -> bool:
    """A quick look that spares most processes the slow one."""
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        # psutil compares the start time: an id that was given to another process is left alone.
        with contextlib.suppress(psutil.Error):
            process.kill()


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _confine(parent: int, limits: Limits) -> None:
    """Runs in the child before exec: it dies when the simulator does, however that dies."""
    if limits.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
    if _libc is None:
        return
    if not limits.network:
        # A network of its own, with nothing in it; where this is not allowed, the dead proxy must do.
        _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    # After `unshare`, which would undo it.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
