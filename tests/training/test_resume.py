"""A run that was lost and goes on elsewhere ends with the weights of one that was not."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from openweights_prefect.jobs.training import job
from openweights_prefect.jobs.training.checkpoints import Checkpoints, ToldToEnd
from openweights_prefect.jobs.training.publishing import Publisher
from openweights_prefect.jobs.training.trainers import Guarded
from openweights_prefect.runtime.inside import RunFiles
from tests.training.recording import Recording, recording
from tests.training.tiny import REPOSITORY, chats, preferences, small_params, weighted, write

SEEDS = 20
_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class PodLost(Exception):
    """Stands for the end of the process."""


def lose() -> None:
    """As by SIGKILL: nothing is saved any more."""
    raise PodLost


def tell() -> None:
    """As the agent does before the end."""
    os.kill(os.getpid(), signal.SIGTERM)


class Course:
    """Runs of one job, each as on a pod of its own, with the events of those before."""

    def __init__(self, folder: Path, told: Recording, patch: pytest.MonkeyPatch, kind: str) -> None:
        self.folder, self.told, self.kind, self._patch = folder, told, kind, patch
        patch.setattr(RunFiles, "download", lambda _, *names: self._download(*names))

    def run(
        self, params: Any, *, ends_in: int | None = None, how: Callable[[], None] = lose
    ) -> list[torch.Tensor]:
        """Train as a job does, perhaps up to a forward pass; the trained weights."""
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
        torch.manual_seed(random.randrange(2**32))  # what a process begins with must not matter
        self.told.agent.earlier = self.told.events()
        trainers: list[Any] = []
        passes = itertools.count(1)
        heeding = Checkpoints.heeding

        def noticed(checkpoints: Checkpoints, trainer: Any) -> Any:
            trainers.append(trainer)
            return heeding(checkpoints, trainer)

        def mortal(step: Any) -> Any:
            def call(trainer: Any, *args: Any, **kwargs: Any) -> Any:
                if next(passes) == ends_in:
                    how()
                return step(trainer, *args, **kwargs)

            return call

        with self._patch.context() as patch:
            for name in ("training_step", "prediction_step"):
                patch.setattr(Guarded, name, mortal(getattr(Guarded, name)))
            patch.setattr(Checkpoints, "heeding", noticed)
            patch.setattr(Publisher, "save", lambda *_, **__: None)
            patch.setattr(job, "read_params", lambda _: (params, {}))
            try:
                job.train(self.folder, self.kind)
            finally:
                for callback in trainers[0].callback_handler.callbacks:
                    if isinstance(callback, Checkpoints):
                        callback.close()
        model = trainers[0].model
        return [each.detach().clone() for each in model.parameters() if each.requires_grad]

    def forget(self) -> None:
        """Begin with the next job."""
        (self.folder / "events.jsonl").unlink(missing_ok=True)

    def curve(self) -> list[dict[str, Any]]:
        """What was told of steps and evaluations, without the times that they took."""
        return [
            {key: value for key, value in event.items() if key not in _TIMES}
            for event in self.told.events()
            if event.get("tag") in ("train", "eval")
        ]

    def starts(self) -> list[int]:
        """The steps after which the runs began."""
        return [event["step"] for event in self.told.events(tag="start")]

    def _download(self, file_id: str, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.told.agent.files[file_id])
        return target


@pytest.fixture
def told(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    with recording(monkeypatch, workdir) as run:
        yield run
    torch.use_deterministic_algorithms(False)


def small(**values: Any) -> Any:
    """Two epochs of seven batches: three steps each, the last of which is shorter."""
    defaults = {"epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    params = small_params(**{**defaults, "deterministic": True, **values})
    params.push = False
    return params


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def summary(curve: list[dict[str, Any]]) -> Any:
    """What does not depend on which steps are logged together: a step that is saved is logged, too."""
    steps = [event for event in curve if event["tag"] == "train"]
    before = [0, *(event["step"] for event in steps)]
    total = sum(event["loss"] * (event["step"] - last) for event, last in zip(steps, before, strict=False))
    evaluations = [event for event in curve if event["tag"] == "eval"]
    return before[-1], steps[-1].get("num_tokens"), pytest.approx(total), evaluations


JOBS: dict[str, tuple[str, Callable[[int], list[dict[str, Any]]], dict[str, Any], int]] = {
    "sft": ("fine_tuning", chats, {"lora_dropout": 0.2}, SEEDS),
    "sft with evaluations": (
        "fine_tuning",
        chats,
        {"lora_dropout": 0.2, "test_file": "test.jsonl", "logging_steps": 2, "keep_best": True},
        5,
    ),
    "whole model, up to a step within an epoch": (
        "fine_tuning",
        chats,
        {"is_peft": False, "learning_rate": 1e-3, "max_steps": 5, "optim": "adamw"},
        3,
    ),
    "weighted": ("weighted_sft", weighted, {"lora_dropout": 0.2, "test_file": "test.jsonl"}, 3),
    "dpo": ("fine_tuning", preferences, {"loss": "dpo"}, 3),
    "orpo": ("fine_tuning", preferences, {"loss": "orpo"}, 3),
}


@pytest.mark.parametrize("name", JOBS)
def test_ended_at_any_time_the_result_is_the_same(
    workdir: Path, told: Recording, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Bit for bit, with dropout, accumulation and an order that is drawn for each epoch; so is the curve."""
    kind, rows, values, seeds = JOBS[name]
    write(workdir / "data.jsonl", rows(14))
    write(workdir / "test.jsonl", rows(3))
    course = Course(workdir, told, monkeypatch, kind)
    whole = course.run(small(**values))
    curve = course.curve()
    went_on = 0
    for seed in range(seeds):
        course.forget()
        draw = random.Random(seed)
        params = small(**values, save_steps=draw.choice([1, 2, 3]))
        for _ in range(draw.randint(1, 2)):
            with contextlib.suppress(PodLost, ToldToEnd):  # the second time there may be less to do
                course.run(params, ends_in=draw.randint(1, 14), how=draw.choice([lose, tell]))
        assert same(whole, course.run(params)), seed
        assert summary(course.curve()) == summary(curve), seed
        if values.get("logging_steps", 1) == 1:
            assert course.curve() == curve, seed
        went_on += any(course.starts())
    assert went_on > seeds // 2


def test_a_process_that_is_told_to_end_saves_first(workdir: Path, told: Recording) -> None:
    """Its exit code is that of SIGTERM, its last step is stored, and nothing of it hangs."""
    write(workdir / "data.jsonl", chats(14))
    params = vars(small(epochs=1000, deterministic=False)) | {"files": {}}
    (workdir / "params.json").write_text(json.dumps(params), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "openweights_prefect.jobs.training.train"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.terminate()
                break
        rest = process.stdout.read()
    finally:
        process.kill()
    assert process.wait() == 143, rest
    [checkpoint] = told.events(tag="checkpoint")
    assert checkpoint["step"] == told.events(tag="train")[-1]["step"] >= 3
    assert f"stored checkpoint-{checkpoint['step']}" in rest.splitlines()
