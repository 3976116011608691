"""A run ends with everything that it started, however far that went, and nothing else does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HOST = Path(__file__).with_name("run_host.py")
NOTE = "echo $! >> pids"
# In its group, in a session of its own, orphaned, and orphaned without the run's mark.
ESCAPES = f"""
sleep 600 & {NOTE}
setsid sleep 600 & {NOTE}
setsid sh -c 'sleep 600 & {NOTE}'
env -i PATH="$PATH" setsid sh -c 'sleep 600 & {NOTE}'
"""

End = Callable[..., dict[str, Any]]


@pytest.fixture
def end(tmp_path: Path) -> Iterator[End]:
    """Run a command under a host that ends it after `grace`, and say how that went."""

    def run(command: str, *, grace: str = "") -> dict[str, Any]:
        argv = [sys.executable, str(HOST), str(tmp_path), grace, command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return seen

    yield run
    for pid in (tmp_path / "pids").read_text().split():  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def test_nothing_outlives_the_entrypoint(end: End) -> None:
    """What it left running is killed at once, in whatever session, without a mark, without a parent."""
    seen = end(f"{ESCAPES} touch ready; exit 3")
    assert seen["code"] == 3
    assert (seen["count"], seen["left"], seen["zombies"]) == (4, [], [])
    assert seen["bystanders"]
    assert seen["seconds"] < 2
    assert seen["intent"] is None


def test_cancel_ends_those_that_ignore_it(end: End) -> None:
    """SIGTERM, the grace, SIGKILL; later orders neither change the intent nor give more time."""
    seen = end(f"trap '' TERM; {ESCAPES} touch ready; while true; do sleep 1; done", grace="0.5")
    assert seen["code"] == -signal.SIGKILL
    assert (seen["count"], seen["left"], seen["zombies"]) == (4, [], [])
    assert 0.4 < seen["seconds"] < 3
    assert seen["intent"] == ["canceled", "by the test"]
    assert seen["bystanders"]


def test_an_obedient_one_ends_at_once(end: End) -> None:
    """Whoever follows SIGTERM is not waited for."""
    seen = end(f"sleep 600 & {NOTE}; touch ready; wait", grace="30")
    assert seen["code"] == -signal.SIGTERM
    assert seen["left"] == []
    assert seen["seconds"] < 2


def test_a_program_behind_a_shell_has_the_grace(end: End, tmp_path: Path) -> None:
    """The shell dies of SIGTERM at once; what it waited for may still write its checkpoint."""
    program = (
        "import signal, sys, time, pathlib\n"
        "def save(*_):\n"
        "    time.sleep(1); pathlib.Path('checkpoint').write_text('whole'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('ready').touch()\n"
        "while True: time.sleep(1)\n"
    )
    (tmp_path / "train.py").write_text(program)
    seen = end(f"echo $$ >> pids; {sys.executable} train.py; echo afterwards", grace="20")
    assert seen["code"] == -signal.SIGTERM
    assert (tmp_path / "checkpoint").read_text() == "whole"
    assert 0.9 < seen["seconds"] < 10
