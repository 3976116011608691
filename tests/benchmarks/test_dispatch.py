"""The dispatch benchmark judges each number of pods by itself, and says which ones it could not start."""

from __future__ import annotations

from pathlib import Path

import dispatch
import pytest
from figures import Figure
from scratch import temporary_folder

from openweights_prefect import StackError

FITS, BREAKS, TOO_MANY = 1, 8, 10**9


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of pods for which a stack was started; each has the same figures."""
    started: list[int] = []

    def measure_stack(sizes: dispatch.Sizes, slots: int, *_: object) -> dict[str, Figure]:
        started.append(slots)
        if slots == BREAKS:
            raise StackError("too many pods")
        return {"first_line_p50_seconds": 0.4, "first_line_ratio": 15.0, "jobs_per_minute_ratio": 4.9}

    monkeypatch.setattr(dispatch, "measure_stack", measure_stack)
    monkeypatch.setattr(dispatch, "time_imports", lambda *_: {})
    return started


def test_pods_that_do_not_fit_into_memory_are_named(stacks: list[int], tmp_path: Path) -> None:
    """The others are measured all the same."""
    figures = dispatch.measure(dispatch.QUICK, [FITS, TOO_MANY], tmp_path, {})
    assert stacks == [FITS]
    assert figures["first_line_ratio_1_pod"] == 15.0
    assert "MB of memory are needed" in str(figures[f"not_run_{TOO_MANY}_pods"])


def test_a_stack_that_fails_leaves_the_figures_of_the_others(stacks: list[int], tmp_path: Path) -> None:
    """The failure is among them, and a goal is missed."""
    figures = dispatch.measure(dispatch.QUICK, [FITS, BREAKS], tmp_path, {})
    assert stacks == [FITS, BREAKS]
    assert figures["failure_8_pods"] == "too many pods"
    assert [goal for goal in dispatch.GOALS if goal.figure == "failed" and not goal.is_met(figures)]


def test_the_goals_hold_for_each_number_of_pods(stacks: list[int], tmp_path: Path) -> None:
    """A figure that misses its limit with so many pods is not made good by another number's."""
    figures = dispatch.measure(dispatch.QUICK, [1, 2], tmp_path, {})
    figures["jobs_per_minute_ratio_2_pods"] = 5.0
    verdicts = {
        limit.figure: limit.is_met(figures) for limit in dispatch.limits_of(dispatch.GOALS_PER_SLOTS, [1, 2])
    }
    assert len(verdicts) == 6
    assert [name for name, met in verdicts.items() if not met] == ["jobs_per_minute_ratio_1_pod"]


def test_a_temporary_folder_is_gone_afterwards(tmp_path: Path) -> None:
    """It lies where it was told to."""
    with temporary_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
        (folder / "file").touch()
    assert not folder.exists()
