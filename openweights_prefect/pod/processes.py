"""Processes of this pod, known by what they inherit and whose children they are, never by name."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from openweights_prefect.runtime.wire import RUN_VARIABLE

_PROC = Path("/proc")
_PR_SET_CHILD_SUBREAPER = 36
_MOST_ROUNDS = 100
_ROUND_SECONDS = 0.02


class Process(NamedTuple):
    """One process at one moment; its id may belong to another one later, but not with the same start."""

    pid: int
    parent: int
    group: int
    session: int
    started: int
    zombie: bool


def adopt_orphans() -> None:
    """Become the parent of every process below this one that loses its own; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def all_processes() -> list[Process]:
    """What runs here, zombies too; nothing where there is no /proc."""
    if not _PROC.is_dir():
        return []
    found = (_look(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdecimal())
    return [process for process in found if process is not None]


def marked(processes: Iterable[Process], *marks: str) -> list[Process]:
    """Those whose environment, as it was when they were executed, has one of these `NAME=value`."""
    wanted = [mark.encode() for mark in marks]
    return [process for process in processes if any(mark in _environment(process.pid) for mark in wanted)]


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL to each that is still the same one."""
    for process in processes:
        if _is_same(process):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)


class RunProcesses:
    """What the entrypoint of one run started, wherever it went: its group and session, what carries the run's
    mark, what descends from them, and orphans that this process had to adopt.

    `spared` are children of this process in sessions of their own that belong to no run.
    """

    def __init__(self, run_id: object, *, spared: Collection[int] = ()) -> None:
        self.leader: int | None = None
        self._mark = f"{RUN_VARIABLE}={run_id}"
        self._spared = spared

    def terminate(self) -> None:
        """SIGTERM to the entrypoint's group."""
        self._signal_group(signal.SIGTERM)

    def kill_now(self) -> None:
        """SIGKILL to everything that is found at one look; returns at once."""
        self._signal_group(signal.SIGKILL)
        kill(self.left())

    def sweep(self) -> int:
        """SIGKILL until a look finds nothing, for a bounded time; returns how many there were.

        Repeated, because a process may fork while it is looked for, and becomes an orphan by another's end.
        """
        killed: set[Process] = set()
        for _ in range(_MOST_ROUNDS):
            self._signal_group(signal.SIGKILL)
            if not (found := self.left()):
                break
            kill(found)
            killed.update(found)
            time.sleep(_ROUND_SECONDS)
        self._reap()
        return len(killed)

    def sweep_marked(self) -> None:
        """SIGKILL to what carries the mark: all that is certain once another run has begun."""
        kill(self._live(marked(all_processes(), self._mark)))

    def left(self) -> list[Process]:
        """What is alive of the run."""
        everything = all_processes()
        roots = {process.pid for process in marked(everything, self._mark)}
        roots |= {process.pid for process in everything if self._is_adopted(process)}
        if self.leader is not None:
            roots |= {each.pid for each in everything if self.leader in (each.pid, each.group, each.session)}
        return self._live(_with_descendants(everything, roots))

    def _is_adopted(self, process: Process) -> bool:
        """What this process starts itself is in its own session."""
        strange = process.session != os.getsid(0) and process.pid not in self._spared
        return process.parent == os.getpid() and strange

    def _live(self, processes: Iterable[Process]) -> list[Process]:
        return [
            each for each in processes if not each.zombie and each.pid not in (os.getpid(), *self._spared)
        ]

    def _reap(self) -> None:
        for process in all_processes():
            if process.zombie and self._is_adopted(process):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)

    def _signal_group(self, number: signal.Signals) -> None:
        if self.leader is None:
            return
        try:
            os.killpg(self.leader, number)
        except (ProcessLookupError, PermissionError):
            self.leader = None


def _with_descendants(everything: Iterable[Process], roots: Iterable[int]) -> list[Process]:
    children: dict[int, list[int]] = {}
    by_id = {process.pid: process for process in everything}
    for process in by_id.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: dict[int, Process] = {}
    waiting = [*roots]
    while waiting:
        pid = waiting.pop()
        if pid in by_id and pid not in found:
            found[pid] = by_id[pid]
            waiting += children.get(pid, [])
    return [*found.values()]


def _look(pid: int) -> Process | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The command's name stands in parentheses and may hold anything.
    fields = stat[stat.rindex(b")") + 2 :].split()
    parent, group, session = (int(field) for field in fields[1:4])
    return Process(pid, parent, group, session, started=int(fields[19]), zombie=fields[0] in (b"Z", b"X"))


def _is_same(process: Process) -> bool:
    now = _look(process.pid)
    return now is not None and now.started == process.started


def _environment(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []
