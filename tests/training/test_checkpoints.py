"""Checkpoints: when they are made, how they leave the pod and come back, and what is kept of them."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.jobs.training.checkpoint_store import CheckpointStore, Restored, Saved, restore
from openweights_prefect.jobs.training.checkpoints import GRACE_VARIABLE, Checkpoints, Resumable, ToldToEnd
from openweights_prefect.jobs.training.reporting import Reporting, Telemetry
from openweights_prefect.runtime.inside import RunFiles
from tests.training.recording import Lesson, Recording, recording


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    with recording(monkeypatch, tmp_path) as run:
        yield run


class Plain(Resumable, transformers.Trainer):  # type: ignore[misc]
    """The trainer of Transformers as ours are."""


def make_store(told: Recording) -> CheckpointStore:
    return CheckpointStore(told.run, flush=lambda: told.run.log({"tag": "flushed"}), say=print)


def make_trainer(folder: Path, *callbacks: transformers.TrainerCallback, **arguments: Any) -> Any:
    """16 rows, 2 a step: an epoch has 8 steps."""
    settings = {"save_strategy": "steps", "save_steps": 3, "steps": 8, "use_cpu": True}
    lesson = Lesson(folder, **{**settings, **arguments})
    made = Plain(
        model=lesson.model,
        args=lesson.arguments,
        train_dataset=Lesson.rows,
        eval_dataset=Lesson.rows[:2],
        callbacks=list(callbacks),
        data_collator=lambda rows: {
            name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")
        },
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def checkpoint(folder: Path, step: int, text: str = "weights") -> Saved:
    """A folder like one that a trainer wrote."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
    (path / "model.safetensors").write_text(text, encoding="utf-8")
    (path / "README.md").write_text("empty", encoding="utf-8")
    return Saved(path, step, {"epoch": 0.5, "processes": 1}, False)


class Gate:
    """Uploads that wait until they may, and fail when they shall."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.started = threading.Event()
        self.fails = 0
        self._upload = RunFiles.upload
        patch.setattr(RunFiles, "upload", lambda files, *args, **kwargs: self._pass(files, *args, **kwargs))

    def _pass(self, files: RunFiles, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.started.set()
        assert self.open.wait(60)
        if self.fails:
            self.fails -= 1
            raise OpenWeightsError("The store is away.")
        return self._upload(files, *args, **kwargs)


# Stored ---------------------------------------------------------------------------------------------


def test_a_checkpoint_is_complete_by_its_last_event(told: Recording, tmp_path: Path) -> None:
    """First its files are stored and what was told before, then they are listed, then it is."""
    store = make_store(told)
    store.add(checkpoint(tmp_path, 3))
    assert store.wait(60)
    flushed, first, second, complete = told.events()
    assert flushed == {"tag": "flushed"}
    assert [first["path"], second["path"]] == [
        "checkpoints/checkpoint-3/model.safetensors",
        "checkpoints/checkpoint-3/trainer_state.json",
    ]
    assert complete == {
        "tag": "checkpoint",
        "step": 3,
        "files": {"model.safetensors": first["file"], "trainer_state.json": second["file"]},
        "bytes": {"model.safetensors": 7, "trainer_state.json": 18},
        "checkpoint": {"epoch": 0.5, "processes": 1},
    }
    assert told.agent.files[first["file"]] == b"weights"


def test_a_newer_one_takes_the_place_of_one_that_waits(
    told: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the one that is on its way, nor of the best."""
    gate, store = Gate(monkeypatch), make_store(told)
    store.add(checkpoint(tmp_path, 1))
    assert gate.started.wait(60)
    store.add(checkpoint(tmp_path, 2)._replace(is_best=True))
    for step in (3, 4):
        store.add(checkpoint(tmp_path, step))
    assert [store.needs(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        True,
    ]
    assert not store.wait(0.01)
    gate.open.set()
    assert store.wait(60)
    assert [event["step"] for event in told.events(tag="checkpoint")] == [1, 2, 4]
    assert not store.needs(tmp_path / "checkpoint-4")


def test_a_store_that_is_away_does_not_end_the_training(
    told: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning; of a checkpoint that is not whole nothing is listed, and the next ones are tried again."""
    gate, store = Gate(monkeypatch), make_store(told)
    gate.open.set()
    gate.fails = 2
    for step in (1, 2, 3):
        store.add(checkpoint(tmp_path, step))
        assert store.wait(60)
    assert [event["step"] for event in told.events(tag="checkpoint")] == [3]
    assert {event["path"].split("/")[1] for event in told.events() if "path" in event} == {"checkpoint-3"}
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "warning: checkpoint-1 could not be stored, training goes on (The store is away.)",
        "stored checkpoint-3",
    ]


# Brought back ---------------------------------------------------------------------------------------


@pytest.fixture
def stored(told: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """The checkpoints 3 and 6 of an earlier run."""
    store = make_store(told)
    for step in (3, 6):
        store.add(checkpoint(tmp_path / "before", step))
        assert store.wait(60)

    def download(_: RunFiles, file_id: str, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(told.agent.files[file_id])
        return target

    monkeypatch.setattr(RunFiles, "download", download)
    return told


def bring(stored: Recording, folder: Path, *, events: Any = None, processes: int = 1) -> Restored | None:
    return restore(
        stored.events() if events is None else events,
        RunFiles(),
        folder,
        processes=processes,
        warn=stored.run.log,
    )


def test_the_newest_is_brought_back(stored: Recording, tmp_path: Path) -> None:
    """As it was; a second time it is there already."""
    found = bring(stored, tmp_path / "out")
    assert found == Restored(tmp_path / "out" / "checkpoint-6", 6, False)
    assert sorted(path.name for path in found.path.iterdir()) == ["model.safetensors", "trainer_state.json"]
    assert (found.path / "model.safetensors").read_text(encoding="utf-8") == "weights"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-6"]
    stored.agent.files.clear()
    assert bring(stored, tmp_path / "out") == found


def test_nothing_is_brought_back_of_one_that_never_became_whole(stored: Recording, tmp_path: Path) -> None:
    events = [event for event in stored.events() if event.get("tag") != "checkpoint"]
    assert bring(stored, tmp_path / "out", events=events) is None


@pytest.mark.parametrize("damage", ["short", "gone", "other step", "no json", "other processes", "no files"])
def test_a_broken_one_is_left_out(
    stored: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """The one before is taken; it is said."""
    events = stored.events()
    newest = events[-1]
    weights, state = newest["files"].values()
    if damage == "short":
        stored.agent.files[weights] = b"weig"
    elif damage == "gone":
        del stored.agent.files[weights]
    elif damage == "other step":
        stored.agent.files[state] = b'{"global_step": 3}'
    elif damage == "no json":
        stored.agent.files[state] = b"x" * newest["bytes"]["trainer_state.json"]
    elif damage == "other processes":
        newest["checkpoint"]["processes"] = 2
    else:
        del newest["files"]
    found = bring(stored, tmp_path / "out", events=events)
    assert found is not None
    assert found.step == 3
    assert "note: checkpoint-6 is not used: " in capsys.readouterr().out
    [warning] = stored.events(tag="warning")
    assert (warning["kind"], warning["step"]) == ("checkpoint_not_used", 6)


# Made -----------------------------------------------------------------------------------------------


def test_steps_and_minutes_make_checkpoints_of_which_few_stay(told: Recording, tmp_path: Path) -> None:
    """All of them are stored; a step that is saved is logged; the last step only when it is its turn."""
    store = make_store(told)
    telemetry = Telemetry(told.run)
    made = Checkpoints(store, keep=2)
    make_trainer(tmp_path / "out", made, Reporting(telemetry, start={}), logging_steps=100).train()
    assert made.close(60)
    assert [event["step"] for event in told.events(tag="checkpoint")] == [3, 6]
    assert [event["step"] for event in told.events(tag="train")] == [1, 3, 6, 8]

    made = Checkpoints(store, keep=1, every_minutes=1e-9)
    make_trainer(tmp_path / "often", made, save_steps=1000).train()
    assert made.close(60)
    assert [path.name for path in (tmp_path / "often").iterdir()] == ["checkpoint-8"]


def test_the_best_is_made_and_kept(told: Recording, tmp_path: Path) -> None:
    """Each evaluation that is better than all before, in the job's other runs too, is saved, and once."""
    losses = iter([5.0, 3.0, 4.0, 3.5])

    class Judged(Plain):
        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = next(losses)
            return output

    before = [{"tag": "checkpoint", "step": 1, "checkpoint": {"eval_loss": 4.5}}]
    made = Checkpoints(make_store(told), keep=1, keep_best=True, earlier=before)
    trainer = make_trainer(tmp_path, made, eval_strategy="steps", eval_steps=2, save_steps=7)
    trainer.__class__ = Judged
    trainer.train()
    assert made.close(60)
    assert [
        (event["step"], event["checkpoint"].get("eval_loss")) for event in told.events(tag="checkpoint")
    ] == [
        (4, 3.0),
        (7, None),
    ]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-7"]


def test_the_end_of_an_epoch_is_saved_once_and_after_its_evaluation(told: Recording, tmp_path: Path) -> None:
    made = Checkpoints(make_store(told), keep=9)
    saved: list[int] = []
    trainer = make_trainer(tmp_path, made, save_steps=4, steps=16, eval_strategy="epoch")
    write = trainer._save_checkpoint

    def count(*args: Any) -> None:
        saved.append(trainer.state.global_step)
        write(*args)

    trainer._save_checkpoint = count
    trainer.train()
    assert made.close(60)
    assert saved == [4, 8, 12, 16]
    history = json.loads((tmp_path / "checkpoint-8/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [8]


def test_a_full_disk_does_not_end_the_training(
    told: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a checkpoint is removed, and none is told of."""
    made = Checkpoints(make_store(told), keep=2)
    trainer = make_trainer(tmp_path, made)

    def refuse(folder: str) -> None:
        raise OSError(28, "No space left on device")

    trainer._save_rng_state = refuse
    trainer.train()
    assert made.close(60)
    assert trainer.state.global_step == 8
    assert list(tmp_path.glob("checkpoint-*")) == []
    assert told.events(tag="checkpoint") == []
    assert "warning: checkpoint-3 could not be written, training goes on (" in capsys.readouterr().out


# Told to end ----------------------------------------------------------------------------------------


class Tells(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells the process to end in its fifth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            signal.raise_signal(signal.SIGTERM)


def test_told_to_end_it_saves_first(told: Recording, tmp_path: Path) -> None:
    """The step is finished, logged, saved and stored; the exit code is that of SIGTERM."""
    made = Checkpoints(make_store(told), keep=2)
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path, made, Reporting(Telemetry(told.run), start={}), Tells(), logging_steps=3)
    with pytest.raises(ToldToEnd) as ended, made.heeding(trainer):
        trainer.train()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert [event["step"] for event in told.events(tag="checkpoint")] == [3, 5]
    assert [event["step"] for event in told.events(tag="train")] == [1, 3, 5]


def test_a_slow_store_has_the_grace_of_the_pod(
    told: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the process ends, whatever is still on its way; a second SIGTERM would end it at once."""
    monkeypatch.setenv(GRACE_VARIABLE, "0.1")
    gate = Gate(monkeypatch)
    made = Checkpoints(make_store(told), keep=2)
    handlers = []

    class Listens(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, *_: Any, **__: Any) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))

    trainer = make_trainer(tmp_path, Listens(), made, Tells(), save_steps=100)
    with pytest.raises(ToldToEnd), made.heeding(trainer):
        trainer.train()
    assert handlers == [signal.SIG_DFL]
    assert told.events(tag="checkpoint") == []
    gate.open.set()
    assert made.close(60)
