"""What training tells the outside: each training step and each evaluation, once."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.runtime.inside import CurrentRun, RunEvents

Every = int | Literal["log"]


class Telemetry:
    """Where callbacks leave their events: it never raises and never waits, and warns once if one is lost.

    `earlier` is the data of the events of the job's earlier runs: what these told is not told again.
    """

    def __init__(self, run: CurrentRun, *, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._run = run
        self._told = {_identity(data) for data in earlier}
        self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ow-telemetry")
        self._warned = False

    def log(self, data: Mapping[str, Any]) -> None:
        """Log an event."""
        try:
            self._run.log(data)
        except Exception as exc:  # Telemetry never breaks the work: say so once, go on.
            self.warn(exc)

    def log_once(self, data: Mapping[str, Any]) -> bool:
        """Log an event unless this job logged one of its kind for this step before."""
        if self.is_told(data):
            return False
        self._told.add(_identity(data))
        self.log(data)
        return True

    def is_told(self, data: Mapping[str, Any]) -> bool:
        """Whether this job logged an event of the same type, tag, dataset, temperature and step."""
        return _identity(data) in self._told

    def log_file(
        self,
        data: Mapping[str, Any],
        text: Iterable[str],
        *,
        name: str,
        purpose: str,
        before: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Write a file now and upload it in the background; then log the events `before`, and `data` with it.

        `name` is how the file's name ends. An event whose file cannot be stored is logged without it.
        """
        self._told.add(_identity(data))
        try:
            path = _written(text, name)
        except OSError as exc:
            self.warn(exc)
            path = None
            for _ in text:  # Writing it may be what fills `before`.
                pass
        work = (dict(data), path, purpose, [dict(event) for event in before])
        try:
            self._uploads.submit(self._log_with_file, *work)
        except RuntimeError:  # Closed already: then it may take its time.
            self._log_with_file(*work)

    def failed(self, kind: str, dataset: str, step: int, exc: Exception) -> None:
        """Tell that something beside training failed."""
        reason = f"{type(exc).__name__}: {exc}"[:500]
        self.say(f"warning: step {step}: {kind} of {dataset!r} failed, training goes on ({reason})")
        warning = {"tag": "warning", "kind": f"{kind}_failed", "dataset": dataset, "step": step}
        self.log({**warning, "error": reason})

    def say(self, text: str) -> None:
        """Print a line; the log may lie on a full disk."""
        with contextlib.suppress(OSError, ValueError):
            print(text, flush=True)

    def warn(self, exc: BaseException) -> None:
        """Print what could not be told, the first time."""
        if not self._warned:
            self._warned = True
            self.say(f"warning: some events or their files could not be stored; training goes on ({exc})")

    def flush(self) -> None:
        """Return when the files so far were stored or given up: whatever is logged next comes after them.

        For what says that a resumed run need not tell these steps again; not for the training thread.
        """
        with contextlib.suppress(RuntimeError):  # Closed: there is nothing to wait for.
            self._uploads.submit(int).result()

    def close(self) -> None:
        """Return when every file was stored or given up; the interpreter's end waits for them, too."""
        self._uploads.shutdown(wait=True)

    def _log_with_file(
        self, data: dict[str, Any], path: Path | None, purpose: str, before: list[dict[str, Any]]
    ) -> None:
        for event in before:
            self.log(event)
        if path is None:
            self.log(data)
            return
        try:
            self._run.log(data, file=path, purpose=purpose)
        except Exception as exc:  # As in `log`; the figures are worth something without the file.
            self.warn(exc)
            self.log(data)
        finally:
            _remove(path)


def earlier_events(run: CurrentRun) -> list[dict[str, Any]]:
    """The data of all events that this job logged before; none, with a warning, when they cannot be read."""
    try:
        return [dict(event["data"]) for event in RunEvents(run.job_id).list()]
    except (OpenWeightsError, OSError, ValueError) as exc:
        print(f"warning: earlier events cannot be read, some may be logged twice ({exc})", flush=True)
        return []


def is_due(step: int, every: Every, *, last: int) -> bool:
    """Whether something that happens `every` so many steps happens after `step`; at 0 and `last` it does.

    `"log"` is ten times in each power of ten: 1, 2, ... 9, 10, 20, ... 90, 100, 200, ...
    """
    if step in (0, last):
        return True
    every = 10 ** (len(str(step)) - 1) if every == "log" else every
    return step % every == 0


def progress(state: TrainerState) -> float:
    """The share of the steps that is done."""
    return round(state.global_step / state.max_steps, 4) if state.max_steps > 0 else 0.0


# mypy sees no transformers in the control environment.
class Reporting(TrainerCallback):  # type: ignore[misc]
    """Logs the start, each training step and each evaluation once, the first and the last included.

    It comes after the callback that decides on checkpoints: a step that is saved is logged, so that a
    resumed run's next loss averages over the same steps as an uninterrupted run's.
    """

    def __init__(self, telemetry: Telemetry, *, start: Mapping[str, Any]) -> None:
        self._telemetry = telemetry
        self._start = start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell how much there is to do, before the first step."""
        if not state.is_world_process_zero:
            return
        steps = {"step": state.global_step, "total": state.max_steps, "progress": progress(state)}
        self._telemetry.log({"tag": "start", **self._start, **steps})
        self._telemetry.say(
            f"training {state.max_steps} steps on {self._start.get('dataset_size', '?')} examples"
            + (f", going on after step {state.global_step}" if state.global_step else "")
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have the trainer log the step that is the last one, or is saved."""
        if control.should_save or control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Log a training step; evaluations and the trainer's closing summary are not steps."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        step = {"step": state.global_step, "tag": "train", "progress": progress(state)}
        if self._telemetry.log_once({**logs, **step}):
            self._telemetry.say(f"step {state.global_step}/{state.max_steps} loss {shown(logs['loss'])}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Log the figures of an evaluation; of several test sets each has its own event and its name."""
        if not state.is_world_process_zero or not metrics:
            return
        name = _test_set(metrics)
        data = {**metrics, "epoch": state.epoch, "step": state.global_step, "tag": "eval"}
        if name:
            data["dataset"] = name
        if self._telemetry.log_once({**data, "progress": progress(state)}):
            key = f"eval_{name}_loss" if name else "eval_loss"
            loss = shown(metrics.get(key))
            self._telemetry.say(f"step {state.global_step}/{state.max_steps} {key} {loss}")


def file_stem(name: str) -> str:
    """A name that a user gave, as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name)[:60]


def shown(value: Any) -> str:
    """A figure as a log line shows it."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else str(value)


def _test_set(metrics: Mapping[str, Any]) -> str:
    """The name of the test set: every evaluation has an `eval_runtime` or `eval_{name}_runtime`."""
    for key in metrics:
        if key.startswith("eval_") and key.endswith("_runtime"):
            return key.removeprefix("eval").removesuffix("_runtime").removeprefix("_")
    return ""


def _written(text: Iterable[str], name: str) -> Path:
    with tempfile.NamedTemporaryFile("w", suffix=f"-{name}", encoding="utf-8", delete=False) as file:
        path = Path(file.name)
        try:
            file.writelines(text)
        except BaseException:
            _remove(path)
            raise
    return path


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _identity(data: Mapping[str, Any]) -> tuple[str, ...]:
    values = (data.get(name) for name in ("type", "tag", "dataset", "temperature", "step"))
    return tuple(f"{value:.9g}" if isinstance(value, (int, float)) else str(value) for value in values)
