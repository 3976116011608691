"""Checkpoints where they outlive the pod: stored while training goes on, brought back by a later run."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.runtime.inside import CurrentRun, RunFiles
from openweights_prefect.types.paths import safe_relative_path

TAG = "checkpoint"
_STATE = "trainer_state.json"
# PEFT's empty form, and a pickle that nobody reads.
_LEFT_OUT = ("README.md", "training_args.bin")


class BrokenCheckpointError(OpenWeightsError):
    """What was brought back is not the checkpoint that was stored."""


class Saved(NamedTuple):
    """A checkpoint in a local folder."""

    folder: Path
    step: int
    about: dict[str, Any]
    """What its event says of it, under `checkpoint`."""
    is_best: bool
    """It has the lowest `eval_loss` so far, and is wanted for that."""


class Restored(NamedTuple):
    """A checkpoint that training goes on from."""

    path: Path
    step: int
    owes_evaluation: bool
    """Its run was told to end before it could evaluate this step."""


class CheckpointStore:
    """Stores checkpoints one at a time in the background; it never raises, and warns once.

    The event that makes a checkpoint complete is logged when all its files are stored and `flush` has
    returned: what was told of the steps before is then told for good. Files that are stored stay there,
    also when newer checkpoints follow.
    """

    def __init__(self, run: CurrentRun, *, flush: Callable[[], None], say: Callable[[str], None]) -> None:
        self._run = run
        self._flush = flush
        self._say = say
        self._warned = False
        self._changed = threading.Condition()
        self._waiting: list[Saved] = []
        self._active: Saved | None = None
        # A daemon: whoever is told to end cannot wait for the network.
        self._thread = threading.Thread(target=self._work, name="ow-checkpoints", daemon=True)

    def add(self, saved: Saved) -> None:
        """Store this checkpoint next, in place of one that waits and is not the best; returns at once."""
        with self._changed:
            for each in [each for each in self._waiting if not each.is_best or saved.is_best]:
                self._waiting.remove(each)
                self._say(f"{each.folder.name} was not stored: a newer one was there before its turn")
            self._waiting.append(saved)
            if not self._thread.is_alive():
                self._thread.start()
            self._changed.notify_all()

    def needs(self, folder: Path) -> bool:
        """Whether the folder is being stored, or waits for that."""
        with self._changed:
            return any(each.folder == folder for each in (*self._waiting, self._active) if each is not None)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until all is stored or given up; False when that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._active is None, timeout_seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                self._active = saved = self._waiting.pop(0)
            try:
                self._store(saved)
            except Exception as exc:  # Training is worth more; the next checkpoint is tried again.
                self._warn(saved, exc)
            with self._changed:
                self._active = None
                self._changed.notify_all()

    def _store(self, saved: Saved) -> None:
        files, sizes = {}, {}
        for path in sorted(each for each in saved.folder.rglob("*") if each.is_file()):
            if path.name in _LEFT_OUT:
                continue
            name = path.relative_to(saved.folder).as_posix()
            sizes[name] = path.stat().st_size
            stored = RunFiles().upload(path, name=f"checkpoints/{saved.folder.name}/{name}")
            files[name] = str(stored["id"])
        self._flush()
        for name, file_id in files.items():
            self._run.list_file(f"checkpoints/{saved.folder.name}/{name}", file_id)
        complete = {"tag": TAG, "step": saved.step, "files": files, "bytes": sizes}
        # Beside the step no figures: they are those of another event, and would be drawn twice.
        self._run.log({**complete, "checkpoint": saved.about})
        self._say(f"stored {saved.folder.name}")

    def _warn(self, saved: Saved, exc: Exception) -> None:
        if not self._warned:
            self._warned = True
            self._say(f"warning: {saved.folder.name} could not be stored, training goes on ({exc})")


def restore(
    earlier: Iterable[Mapping[str, Any]],
    files: RunFiles,
    folder: Path,
    *,
    processes: int,
    warn: Callable[[Mapping[str, Any]], None],
) -> Restored | None:
    """The newest checkpoint among the job's earlier events that is whole, brought into `folder`.

    None when there is none. One that is broken, or was made by another number of processes, whose steps are
    others, is left out with a note and a warning event.
    """
    complete = {event["step"]: event for event in earlier if event.get("tag") == TAG}
    for step in sorted(complete, reverse=True):
        event = complete[step]
        about = event.get("checkpoint") or {}
        try:
            if about.get("processes", processes) != processes:
                raise BrokenCheckpointError(
                    f"it was made by {about['processes']} processes and there are {processes}"
                )
            path = _bring(event, files, folder)
        except (OpenWeightsError, OSError, ValueError, TypeError, KeyError) as exc:
            print(f"note: checkpoint-{step} is not used: {exc}", flush=True)
            warn({"tag": "warning", "kind": "checkpoint_not_used", "step": step, "error": str(exc)[:500]})
            continue
        return Restored(path, step, bool(about.get("owes_evaluation")))
    return None


def least_eval_loss(earlier: Iterable[Mapping[str, Any]]) -> float | None:
    """The lowest `eval_loss` of the job's stored checkpoints."""
    about = [event.get("checkpoint") or {} for event in earlier if event.get("tag") == TAG]
    losses = [each["eval_loss"] for each in about if isinstance(each.get("eval_loss"), (int, float))]
    return min(losses, default=None)


def _bring(event: Mapping[str, Any], files: RunFiles, folder: Path) -> Path:
    step = int(event["step"])
    final = folder / f"checkpoint-{step}"
    try:
        _check(final, event)  # Another process of this run has brought it already.
    except (BrokenCheckpointError, OSError, ValueError, KeyError):
        unfinished = folder / f"unfinished-{step}"
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, file_id in event["files"].items():
            files.download(file_id, unfinished / safe_relative_path(name))
        _check(unfinished, event)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    return final


def _check(folder: Path, event: Mapping[str, Any]) -> None:
    """That all files are there; what is in them, the agent has compared with their ids."""
    for name, size in event["bytes"].items():
        found = (folder / safe_relative_path(name)).stat().st_size
        if found != size:
            raise BrokenCheckpointError(f"{name!r} has {found} bytes, not {size}")
    step = json.loads((folder / _STATE).read_text(encoding="utf-8"))["global_step"]
    if step != event["step"]:
        raise BrokenCheckpointError(f"its {_STATE} is that of step {step}")
