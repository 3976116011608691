"""The pod's deadline: absolute, moved only by the ledger's word, kept where it outlives the agent."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.pod.deadline import Deadline


def test_it_is_what_the_pod_was_created_with(tmp_path: Path) -> None:
    """A restart of the container does not move it."""
    for _ in range(2):
        deadline = Deadline.of_pod(tmp_path, {"OW_DEADLINE_AT": str(int(time.time()) - 30)})
        assert -32 < deadline.seconds_left() <= -29
    assert Deadline.of_pod(tmp_path, {}).seconds_left() == math.inf


def test_the_newest_word_of_the_ledger_counts(tmp_path: Path) -> None:
    """Later or earlier, and for a process that was not there when it was heard."""
    environment = {"OW_DEADLINE_AT": str(int(time.time()) + 100)}
    agent, other = Deadline.of_pod(tmp_path, environment), Deadline.of_pod(tmp_path, environment)
    for seconds in (5000.0, 20.0):
        agent.heard(seconds)
        assert other.seconds_left() == pytest.approx(seconds, abs=2)


def test_a_damaged_file_is_no_word(tmp_path: Path) -> None:
    """What the pod was created with holds then."""
    deadline = Deadline.of_pod(tmp_path, {"OW_DEADLINE_AT": str(int(time.time()) + 100)})
    for content in ("", "nan", "inf", "soon"):
        (tmp_path / "deadline").write_text(content)
        assert deadline.seconds_left() == pytest.approx(100, abs=2)


def test_only_a_change_is_written(tmp_path: Path) -> None:
    """Heard with every heartbeat, it is written when it is another one."""
    deadline = Deadline.of_pod(tmp_path, {})
    deadline.heard(500)
    before = (tmp_path / "deadline").stat().st_mtime_ns
    deadline.heard(500.4)
    assert (tmp_path / "deadline").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["deadline"]


def test_a_deadline_that_is_no_time(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="OW_DEADLINE_AT='tomorrow'"):
        Deadline.of_pod(tmp_path, {"OW_DEADLINE_AT": "tomorrow"})
