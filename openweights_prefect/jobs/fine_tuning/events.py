"""What training tells the outside: events, checkpoint files and log lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.runtime.inside import CurrentRun


# mypy sees no transformers in the control environment.
class Reporting(TrainerCallback):  # type: ignore[misc]
    """Logs each step and evaluation once, the first and the last included, and stores checkpoints."""

    def __init__(self, run: CurrentRun, *, start: dict[str, Any]) -> None:
        self._run = run
        self._start = start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell how much there is to do, before the first step."""
        steps = {"step": state.global_step, "total": state.max_steps}
        self._run.log({"tag": "start", **steps, **self._start, "progress": _progress(state)})
        print(f"training {state.max_steps} steps on {self._start['dataset_size']} conversations", flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Make the trainer log the last step too, and keep it from saving what becomes the result anyway."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = state.global_step % args.save_steps == 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Log a training step; evaluations and the trainer's closing summary are not steps."""
        if logs is None or "loss" not in logs:
            return
        data: dict[str, Any] = {
            key: logs[key] for key in ("loss", "learning_rate", "grad_norm", "epoch") if key in logs
        }
        self._run.log({**data, "step": state.global_step, "tag": "train", "progress": _progress(state)})
        print(f"step {state.global_step}/{state.max_steps} loss {logs['loss']:.4f}", flush=True)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Log the figures of an evaluation."""
        metrics = metrics or {}
        self._run.log({**metrics, "step": state.global_step, "tag": "eval", "progress": _progress(state)})
        print(
            f"step {state.global_step}/{state.max_steps} eval_loss {metrics.get('eval_loss', 0.0):.4f}",
            flush=True,
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Store the checkpoint now: a pod that is lost later loses only what came after."""
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        try:
            for path in sorted(
                path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"
            ):
                self._run.upload(path, name=f"checkpoints/{path.relative_to(folder.parent).as_posix()}")
        except (OpenWeightsError, OSError) as exc:
            print(f"warning: {folder.name} was not stored: {exc}", flush=True)
            return
        print(f"step {state.global_step}/{state.max_steps} stored {folder.name}", flush=True)


def _progress(state: TrainerState) -> float:
    return round(state.global_step / state.max_steps, 4) if state.max_steps else 0.0
