"""The dead-man: a process of its own that ends the pod when nobody else did, a while after the deadline."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from openweights_prefect.pod import processes
from openweights_prefect.pod.deadline import Deadline
from openweights_prefect.pod.processes import Process
from openweights_prefect.pod.termination import ask_for_termination

GRACE_SECONDS = 60.0
_LOOK_SECONDS = 5.0
_AGAIN_SECONDS = 60.0
_PR_SET_NAME = 15
_OWN_VARIABLES = ("OW_POD_ID", "RUNPOD_POD_ID")


def start(deadline: Deadline, environment: Mapping[str, str], *, grace_seconds: float = GRACE_SECONDS) -> int:
    """Fork it and return its process id. To be called while this process has one thread.

    It outlives this process, in a session of its own, and ends with the container.
    """
    agent = os.getpid()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_NAME, b"ow-deadman", 0, 0, 0)
        _watch(deadline, environment, agent=agent, grace_seconds=grace_seconds)
    finally:
        os._exit(1)


def _watch(
    deadline: Deadline, environment: Mapping[str, str], *, agent: int, grace_seconds: float
) -> NoReturn:
    while (left := deadline.seconds_left() + grace_seconds) > 0:
        time.sleep(min(left, _LOOK_SECONDS))
    print("The deadline of this pod has passed, and it still runs: everything is killed.", flush=True)
    marks = [f"{name}={environment[name]}" for name in _OWN_VARIABLES if environment.get(name)]
    while True:
        ask_for_termination(environment)
        _kill_all(marks, agent)
        time.sleep(_AGAIN_SECONDS)


def _kill_all(marks: list[str], agent: int) -> None:
    """The agent last: where it is the container's first process, this one ends with it."""
    everything = [each for each in processes.all_processes() if each.pid != os.getpid()]
    ours = processes.marked(everything, *marks)
    if any(each.pid == 1 for each in ours):
        ours = everything  # the container is ours alone
    processes.kill(each for each in ours if each.pid not in (1, agent))
    processes.kill(each for each in ours if each.pid == agent and _is_parent(each))


def _is_parent(process: Process) -> bool:
    """The id of an agent that died may be another process's by now."""
    return process.pid == os.getppid()
