"""Events of a training: each step and each evaluation once, whatever happens to the run or to the logging."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from openweights_prefect.jobs.training.gpu_statistics import GpuStatistics
from openweights_prefect.jobs.training.reporting import Reporting, Telemetry, earlier_events, is_due
from openweights_prefect.runtime import wire
from openweights_prefect.runtime.inside import CurrentRun
from openweights_prefect.runtime.spool import settle
from tests.training.recording import Lesson, Recording, recording

START = {"dataset_size": 16, "notes": []}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Recording]:
    with recording(monkeypatch, tmp_path) as made:
        yield made


def reporting(run: Recording, **values: Any) -> Reporting:
    return Reporting(Telemetry(run.run, **values), start=START)


def steps(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events]


@pytest.mark.parametrize(
    ("logging_steps", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (50, [1, 7])]
)
def test_each_step_is_logged_once_and_in_time(
    run: Recording, tmp_path: Path, logging_steps: int, expected: list[int]
) -> None:
    """The first and the last included; with the figures of that step."""
    losses = Lesson(tmp_path / "out", logging_steps=logging_steps).train([reporting(run)])
    events = run.events(tag="train")
    assert steps(events) == expected
    assert [event["loss"] for event in events] == losses
    assert events[-1]["progress"] == 1.0
    assert {"loss", "learning_rate", "grad_norm", "epoch", "step", "tag", "progress"} <= events[0].keys()


def test_the_start_says_how_much_there_is_to_do(run: Recording, tmp_path: Path) -> None:
    Lesson(tmp_path / "out").train([reporting(run)])
    assert run.events()[0] == {**START, "tag": "start", "step": 0, "total": 7, "progress": 0.0}
    assert len(run.events(tag="start")) == 1


def test_each_evaluation_is_logged_once(run: Recording, tmp_path: Path) -> None:
    """With its step and epoch, before the first step and after the last one."""
    lesson = Lesson(tmp_path / "out", eval_strategy="steps", eval_steps=3, eval_on_start=True)
    lesson.train([reporting(run)], eval_dataset=Lesson.rows[:4])
    events = run.events(tag="eval")
    assert steps(events) == [0, 3, 6, 7]
    assert [event["epoch"] for event in events] == [0, 3 / 8, 6 / 8, 7 / 8]
    assert all(math.isfinite(event["eval_loss"]) for event in events)


def test_test_sets_with_names_have_an_event_each(run: Recording, tmp_path: Path) -> None:
    lesson = Lesson(tmp_path / "out", steps=2, eval_strategy="steps", eval_steps=2)
    lesson.train([reporting(run)], eval_dataset={"good_ones": Lesson.rows[:2], "bad": Lesson.rows[2:4]})
    events = run.events(tag="eval")
    assert [(event["step"], event["dataset"]) for event in events] == [(2, "good_ones"), (2, "bad")]
    assert ["eval_good_ones_loss" in event for event in events] == [True, False]


class Dies(TrainerCallback):  # type: ignore[misc]
    """Ends the process of training, as a lost pod does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("logging_steps", "dies_after"), [(1, 4), (1, 6), (3, 6), (4, 5)])
def test_a_resumed_run_goes_on_with_the_curve(
    run: Recording, tmp_path: Path, logging_steps: int, dies_after: int
) -> None:
    """No step is missing and none is told twice, though some are trained again; the losses are the same."""
    settings: dict[str, Any] = {"logging_steps": logging_steps, "save_strategy": "steps", "save_steps": 4}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}
    whole = Lesson(tmp_path / "whole", **settings)
    whole.train([reporting(run)], eval_dataset=Lesson.rows[:2])
    uninterrupted = [event for event in run.events() if event["tag"] != "start"]
    mark = len(run.events())

    with pytest.raises(KeyboardInterrupt):
        Lesson(tmp_path / "out", **settings).train(
            [reporting(run), Dies(dies_after)], eval_dataset=Lesson.rows[:2]
        )
    run.agent.earlier = run.events()[mark:]
    Lesson(tmp_path / "out", **settings).train(
        [reporting(run, earlier=earlier_events(run.run))],
        eval_dataset=Lesson.rows[:2],
        resume=str(tmp_path / "out" / "checkpoint-4"),
    )
    told = [event for event in run.events()[mark:] if event["tag"] != "start"]
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert [{k: v for k, v in event.items() if k not in timing} for event in told] == [
        {k: v for k, v in event.items() if k not in timing} for event in uninterrupted
    ]
    assert run.events(tag="start")[-1]["step"] == 4


def test_earlier_events_that_cannot_be_read_are_none(
    run: Recording, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "/nowhere/agent")
    assert earlier_events(run.run) == []
    assert "earlier events cannot be read" in capsys.readouterr().out


def state(step: int = 1, **values: Any) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, epoch=0.1, **values)


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])


def test_what_preference_losses_log_is_kept(run: Recording, tmp_path: Path) -> None:
    logs = {"loss": 0.6, "rewards/chosen": 0.1, "rewards/accuracies": 1.0, "logps/rejected": -9.0}
    reporting(run).on_log(arguments(tmp_path), state(), TrainerControl(), logs=logs)
    [event] = run.events()
    assert logs.items() <= event.items()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), None])
def test_figures_that_are_no_numbers_are_logged(run: Recording, tmp_path: Path, loss: Any) -> None:
    reporting(run).on_log(arguments(tmp_path), state(), TrainerControl(), logs={"loss": loss})
    assert steps(run.events(tag="train")) == [1]


def test_only_the_first_process_tells(run: Recording, tmp_path: Path) -> None:
    callback, other = reporting(run), state(is_world_process_zero=False)
    args, control = arguments(tmp_path), TrainerControl()
    callback.on_train_begin(args, other, control)
    callback.on_log(args, other, control, logs={"loss": 1.0})
    callback.on_evaluate(args, other, control, metrics={"eval_loss": 1.0, "eval_runtime": 1.0})
    assert run.events() == []


def test_the_trainers_closing_summary_is_no_step(run: Recording, tmp_path: Path) -> None:
    callback = reporting(run)
    callback.on_log(arguments(tmp_path), state(), TrainerControl(), logs={"train_loss": 1.0})
    callback.on_log(arguments(tmp_path), state(), TrainerControl(), logs={"eval_loss": 1.0})
    assert run.events() == []


class Broken(CurrentRun):
    """A run whose events are refused for a while."""

    refusing = True

    def log(self, *args: Any, **values: Any) -> None:
        if self.refusing:
            raise OSError(28, "No space left on device")
        super().log(*args, **values)


def test_events_go_on_after_they_were_refused(run: Recording, capsys: pytest.CaptureFixture[str]) -> None:
    """One warning is printed, and nothing raised."""
    broken = Broken()
    telemetry = Telemetry(broken)
    telemetry.log({"step": 1})
    telemetry.log({"step": 2})
    telemetry.log_file({"step": 3}, ["text"], name="x.json", purpose="samples")
    telemetry.close()
    broken.refusing = False
    telemetry.log({"step": 4})
    assert steps(run.events()) == [4]
    assert capsys.readouterr().out.count("warning:") == 1


def test_training_goes_on_with_a_full_disk(
    run: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events are kept until there is room, files are given up."""
    losses = Lesson(tmp_path / "one").train([])
    spool = tmp_path / "events.jsonl"
    spool.symlink_to("/dev/full")
    telemetry = Telemetry(run.run)
    assert Lesson(tmp_path / "two").train([Reporting(telemetry, start=START)]) == losses
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    telemetry.log_file({"step": 3}, ["text"], name="x.json", purpose="samples")
    telemetry.close()
    spool.unlink()
    assert settle()
    assert [event["loss"] for event in run.events(tag="train")] == losses
    assert run.events()[-1] == {"step": 3}


def test_an_event_whose_file_is_lost_is_logged_without_it(
    run: Recording, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "/nowhere/agent")
    telemetry = Telemetry(run.run)
    telemetry.log_file({"step": 3}, ["text"], name="x.json", purpose="samples", before=[{"a": 1}])
    telemetry.close()
    assert run.events() == [{"a": 1}, {"step": 3}]
    assert "warning:" in capsys.readouterr().out


def test_files_are_stored_in_order_and_removed_here(
    run: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    telemetry = Telemetry(run.run)
    for step in range(5):
        telemetry.log_file({"step": step}, [f"text {step}"], name="x.json", purpose="samples")
    telemetry.close()
    assert [run.file(event) for event in run.events()] == [f"text {step}" for step in range(5)]
    assert all(event["file"].startswith("samples:") for event in run.events())
    telemetry.log_file({"step": 5}, ["late"], name="x.json", purpose="samples")
    assert run.file(run.events()[-1]) == "late"
    assert list(folder.iterdir()) == []


def test_what_is_logged_after_a_flush_comes_after_the_files(run: Recording) -> None:
    """Also once it is closed."""
    telemetry = Telemetry(run.run)
    for step in range(5):
        telemetry.log_file({"step": step}, ["text"], name="x.json", purpose="samples")
    telemetry.flush()
    telemetry.log({"step": 5})
    assert steps(run.events()) == [0, 1, 2, 3, 4, 5]
    telemetry.close()
    telemetry.flush()


def test_a_step_costs_little(run: Recording, tmp_path: Path) -> None:
    """Logging a step takes less than a millisecond, in the best of some tries on a busy machine."""
    callback, args, control = reporting(run), arguments(tmp_path), TrainerControl()
    states = [state(step) for step in range(1, 501)]
    taken = []
    for made in states:
        begin = time.perf_counter()
        callback.on_step_end(args, made, control)
        callback.on_log(args, made, control, logs={"loss": 1.0, "learning_rate": 1e-4, "grad_norm": 1.0})
        taken.append(time.perf_counter() - begin)
    assert len(run.events(tag="train")) == 500
    print(f"{statistics.median(taken) * 1e6:.0f} microseconds a step")
    assert min(statistics.fmean(taken[start : start + 50]) for start in range(0, 500, 50)) < 0.001


def test_when_something_is_due() -> None:
    """The contract's `log`: ten times in each power of ten."""
    due = [step for step in range(1, 1300) if is_due(step, "log", last=1234)]
    assert due == [
        *range(1, 10),
        *range(10, 100, 10),
        *range(100, 1000, 100),
        *(1000, 1234),
    ]
    assert [step for step in range(11) if is_due(step, 4, last=10)] == [0, 4, 8, 10]


def test_there_are_no_gpu_statistics_without_a_gpu(run: Recording, tmp_path: Path) -> None:
    Lesson(tmp_path / "out", steps=2).train([GpuStatistics(Telemetry(run.run))])
    assert run.events() == []


def test_gpu_statistics_come_every_ten_steps(run: Recording, tmp_path: Path) -> None:
    callback = GpuStatistics(Telemetry(run.run), read=lambda: {"gpu_name": "A100"})
    for step in range(1, 31):
        callback.on_step_end(arguments(tmp_path), state(step), TrainerControl())
    assert run.events()[0] == {"gpu_name": "A100", "step": 1, "tag": "gpu"}
    assert steps(run.events(tag="gpu")) == [1, 10, 20, 30]


def test_a_gpu_that_does_not_answer_is_not_asked_again(
    run: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def read() -> dict[str, Any]:
        asked.append(1)
        raise RuntimeError("NVML: unknown error")

    callback = GpuStatistics(Telemetry(run.run), read=read)
    for step in range(1, 31):
        callback.on_step_end(arguments(tmp_path), state(step), TrainerControl())
    assert (len(asked), run.events()) == (1, [])
    assert capsys.readouterr().out.count("warning:") == 1
