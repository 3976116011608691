"""The dead-man ends a pod that outlived its deadline, whatever became of its agent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from runpod_api import RunPodApi

from openweights_prefect.pod.deadline import Deadline

HOST = Path(__file__).with_name("deadman_host.py")


class Pod:
    """A pod whose first process has started its dead-man and two programs."""

    def __init__(self, folder: Path, runpod: RunPodApi, *, seconds: float, grace: float) -> None:
        self.folder = folder
        self.environment = {
            **runpod.environment(),
            "PATH": os.environ["PATH"],
            "OW_HOME": str(folder),
            "OW_POD_ID": f"pod-{uuid.uuid4().hex[:12]}",
            "OW_DEADLINE_AT": str(time.time() + seconds),
        }
        argv = [sys.executable, str(HOST), str(folder), str(grace)]
        self.host = subprocess.Popen(argv, env=self.environment, stdout=subprocess.PIPE, text=True)
        eventually((folder / "pids").exists, 20)
        pids = [int(pid) for pid in (folder / "pids").read_text().split()]
        self.agent, self.guard, *self.programs = (psutil.Process(pid) for pid in pids)

    def close(self) -> None:
        for process in (self.agent, self.guard, *self.programs):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.host.wait()
        assert self.host.stdout is not None
        self.host.stdout.close()


@pytest.fixture
def start(tmp_path: Path, runpod: RunPodApi) -> Iterator[Callable[..., Pod]]:
    pods: list[Pod] = []

    def begin(*, seconds: float, grace: float = 0) -> Pod:
        pods.append(Pod(tmp_path, runpod, seconds=seconds, grace=grace))
        return pods[-1]

    yield begin
    for pod in pods:
        pod.close()


def eventually(look: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_it_ends_the_pod(start: Callable[..., Pod], runpod: RunPodApi) -> None:
    """It asks RunPod, then kills the agent and everything that the agent started; others live on."""
    other = subprocess.Popen(["sleep", "600"])
    pod = start(seconds=0.5)
    eventually(lambda: all(map(is_gone, [pod.agent, *pod.programs])), 20)
    [call] = runpod.calls
    assert "k3m9x1p7q2w8z4" in call.body["query"]
    assert other.poll() is None
    other.kill()
    other.wait()


def test_it_outlives_the_agent(start: Callable[..., Pod], runpod: RunPodApi) -> None:
    """A group that is killed as a whole leaves it, too; the last deadline that is known holds."""
    pod = start(seconds=600)
    os.kill(pod.agent.pid, signal.SIGKILL)
    pod.host.wait()
    Deadline.of_pod(pod.folder, {}).heard(-1)
    eventually(lambda: all(map(is_gone, pod.programs)), 20)
    assert runpod.calls
    assert pod.guard.is_running()


def test_it_waits_as_long_as_the_ledger_says(start: Callable[..., Pod], runpod: RunPodApi) -> None:
    """A pod whose deadline was moved in time is left alone, and the grace is the agent's."""
    pod = start(seconds=3)
    Deadline.of_pod(pod.folder, pod.environment).heard(600)
    with pytest.raises(AssertionError):
        eventually(lambda: any(map(is_gone, [pod.agent, *pod.programs])), 5)
    assert runpod.calls == []


def test_the_container_ends_it(start: Callable[..., Pod]) -> None:
    """It may be told to end, and does, although its agent handles signals."""
    pod = start(seconds=600)
    pod.guard.terminate()
    eventually(lambda: is_gone(pod.guard), 5)
