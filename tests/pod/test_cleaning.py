"""Between two runs: GPU memory, disk, old folders; and what decides that a pod takes no more work."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from openweights_prefect.pod import cleaning
from openweights_prefect.pod.collaborators import Verdict
from openweights_prefect.pod.deadline import Deadline
from openweights_prefect.pod.gpu_check import GpuNeeds
from openweights_prefect.pod.machine import LocalMachine

# Ends a process that carries a run's mark, in a host that may adopt what that leaves.
HOST = """
import asyncio, os, subprocess, sys
from openweights_prefect.pod import cleaning, processes
processes.adopt_orphans()
mark = {**os.environ, "OPENWEIGHTS_RUN_ID": sys.argv[1]}
left = subprocess.Popen(["sleep", "600"], env=mark, start_new_session=True)
print(left.pid, flush=True)
asyncio.run(cleaning.end_leftovers(sys.argv[1]))
"""


class Cards:
    """An `nvidia-smi` whose used memory the test sets."""

    def __init__(self, folder: Path) -> None:
        self._used = folder / "used"
        self.use(100)
        program = folder / "nvidia-smi"
        program.write_text(
            f'#!/bin/sh\ncase "$1" in *ecc*) echo "0, $(cat {folder}/ecc 2>/dev/null || echo 0)";;'
            f' *) echo "0, NVIDIA A40, 46068, $(cat {self._used})";; esac\n'
        )
        program.chmod(0o755)
        self.ecc = folder / "ecc"

    def use(self, megabytes: int) -> None:
        self._used.write_text(str(megabytes))


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cards:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(cleaning, "_GPU_LOOK_SECONDS", 0.05)
    return Cards(tmp_path)


@pytest.fixture
def machine(tmp_path: Path) -> LocalMachine:
    return LocalMachine(
        root=tmp_path,
        deadline=Deadline.of_pod(tmp_path, {}),
        gpus=GpuNeeds(1, 48),
        gpu_check="inventory",
        job_python="",
        shutdown_file=tmp_path / "shutdown.txt",
        # Of this process, which serves other tests, too.
        spared=[child.pid for child in psutil.Process().children()],
    )


def clean(machine: LocalMachine, *, suspected: bool = False) -> Verdict | None:
    return asyncio.run(machine.clean(uuid4(), suspected=suspected))


def test_leftover_processes_are_killed() -> None:
    """By the mark that they inherited."""
    run_id = str(uuid4())
    done = subprocess.run(
        [sys.executable, "-c", HOST, run_id], capture_output=True, text=True, timeout=30, check=True
    )
    assert not psutil.pid_exists(int(done.stdout))
    assert f"Run {run_id} had left 1 processes" in done.stderr


def test_folders_of_an_earlier_start_are_deleted(tmp_path: Path) -> None:
    """A restarted agent begins with an empty folder; a first one has none."""
    (tmp_path / "runs" / "old" / "work").mkdir(parents=True)
    for _ in range(2):
        cleaning.remove_old_runs(tmp_path / "runs")
        assert not (tmp_path / "runs").exists()


def test_a_clean_machine_goes_on(cards: Cards, machine: LocalMachine) -> None:
    """The memory that was in use before any run does not count."""
    cards.use(900)
    assert asyncio.run(machine.check()) is None
    assert clean(machine) is None


def test_memory_that_is_freed_a_moment_later(cards: Cards, machine: LocalMachine) -> None:
    """The driver takes its time, and is given it."""
    assert asyncio.run(machine.check()) is None
    cards.use(40_000)

    async def free_meanwhile() -> Verdict | None:
        asyncio.get_running_loop().call_later(0.5, cards.use, 100)
        return await machine.clean(uuid4(), suspected=False)

    started = time.monotonic()
    assert asyncio.run(free_meanwhile()) is None
    assert time.monotonic() - started < 5


def test_memory_that_stays(cards: Cards, machine: LocalMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod takes no more work; the machine is at fault only if its check fails, too."""
    monkeypatch.setattr(cleaning.why_gpu_memory_stays, "__kwdefaults__", {"seconds": 0.2})
    assert asyncio.run(machine.check()) is None
    cards.use(40_000)
    assert clean(machine) == Verdict("40000 MB of GPU 0 stayed in use after a run")
    cards.ecc.write_text("3")
    assert clean(machine) == Verdict("GPU 0 (NVIDIA A40) had 3 uncorrected memory errors", unusable=True)


def test_a_suspected_card_is_looked_at_again(cards: Cards, machine: LocalMachine) -> None:
    """After an error that a broken card may have made, and only then."""
    assert asyncio.run(machine.check()) is None
    cards.ecc.write_text("3")
    assert clean(machine) is None
    verdict = clean(machine, suspected=True)
    assert verdict is not None
    assert verdict.unusable


def test_a_full_disk_ends_the_work(tmp_path: Path, cards: Cards, machine: LocalMachine) -> None:
    """Below the floor nothing is begun."""
    assert cleaning.why_disk_is_full(tmp_path) is None
    assert "GB of disk are free" in (cleaning.why_disk_is_full(tmp_path, floor_bytes=1 << 60) or "")


def test_the_file_that_ends_a_pod(tmp_path: Path, machine: LocalMachine) -> None:
    """It counts when it appears; one that was there before the agent does not."""
    file = tmp_path / "shutdown.txt"
    assert not machine.wants_to_end()
    file.touch()
    assert machine.wants_to_end()
    again = LocalMachine(
        root=tmp_path,
        deadline=Deadline.of_pod(tmp_path, {}),
        gpus=GpuNeeds(0, None),
        gpu_check="off",
        job_python="",
        shutdown_file=file,
    )
    assert not again.wants_to_end()
    os.utime(file, ns=(1, 1))
    assert again.wants_to_end()
