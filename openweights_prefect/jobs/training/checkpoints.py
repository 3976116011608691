"""When training is saved, what is kept of it on the pod, and how a run that is told to end saves first."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from openweights_prefect.jobs.training.checkpoint_store import CheckpointStore, Saved, least_eval_loss

GRACE_VARIABLE = "OW_CHECKPOINT_GRACE_SECONDS"
_GRACE_SECONDS = 25.0
_TOKENS = "_total_train_tokens"  # of TRL's trainers for SFT and DPO
_TOLD_TO_END = 128 + signal.SIGTERM
_WRITING_ERRORS = (OSError, RuntimeError, SafetensorError)  # a full disk, as PyTorch and safetensors tell it


class ToldToEnd(SystemExit):
    """SIGTERM came while the model was trained, and what there was is saved."""

    def __init__(self) -> None:
        super().__init__(int(_TOLD_TO_END))


class Resumable:
    """Mixed into a trainer, before it: what it takes that a resumed run equals an uninterrupted one."""

    args: Any
    control: Any
    state: Any
    last_grad_norm: Any = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's, which trains one step too many when it goes on after the last one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
        else:
            self.control.should_training_stop = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's; a full disk does not end the training."""
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        except _WRITING_ERRORS as exc:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(Path(self.args.output_dir, name), ignore_errors=True)
            with contextlib.suppress(OSError):
                print(f"warning: {name} could not be written, training goes on ({exc})", flush=True)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.last_grad_norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        return self.last_grad_norm

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; training goes on with the random numbers that it would have had without it."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]


def _figures(trainer: Any) -> dict[str, list[Any]]:
    """What TRL's trainers gather for the next line of the log."""
    for name in ("_metrics", "_stored_metrics"):
        if hasattr(trainer, name):
            figures: dict[str, list[Any]] = getattr(trainer, name)["train"]
            return figures
    return {}


class _Moment(NamedTuple):
    """What the forward passes of the next step change, as it was when a step was done."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    loss: torch.Tensor
    tokens: int
    counts: dict[str, int]
    """How many values of each of TRL's figures waited to be averaged."""

    @classmethod
    def of(cls, trainer: Any) -> _Moment:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        counts = {name: len(values) for name, values in _figures(trainer).items()}
        tokens = getattr(trainer, _TOKENS, 0)
        return cls(torch.get_rng_state(), cuda, trainer._tr_loss.clone(), tokens, counts)

    def bring_back(self, trainer: Any) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        trainer._tr_loss.copy_(self.loss)
        figures = _figures(trainer)
        for name in list(figures):
            del figures[name][self.counts.get(name, 0) :]
            if not figures[name]:
                del figures[name]
        if "num_tokens" in figures:
            figures["num_tokens"] = [self.tokens]


# mypy sees no transformers in the control environment.
class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Decides after each step whether it is saved, has it stored, and keeps few of them on the disk.

    Comes before `Reporting`. A step that ends an epoch is saved once, after the epoch's evaluation. With
    `keep_best`, a step with the lowest `eval_loss` of the job so far is saved, too. `earlier` is the data of
    the events of the job's earlier runs.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        keep: int,
        every_minutes: float | None = None,
        keep_best: bool = False,
        earlier: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._store = store
        self._keep = keep
        self._every_seconds = math.inf if every_minutes is None else 60 * every_minutes
        self._keep_best = keep_best
        self._least = least_eval_loss(earlier)
        self._best: Path | None = None
        self._trainer: Any = None
        self._moment: _Moment | None = None
        self._rate: float | None = None
        self._told_at: float | None = None
        self._saved_at = 0.0
        self._saved_step = 0
        self._evaluated: tuple[int, float] | None = None
        self._ends_epoch = self._is_due = self._owes_evaluation = False

    @contextlib.contextmanager
    def heeding(self, trainer: Any) -> Iterator[None]:
        """While this trainer trains, SIGTERM saves a checkpoint and raises `ToldToEnd` when it is stored.

        It waits for that as long as the pod says, or until a second SIGTERM. Of several processes, each
        ends its step first.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Only the main thread hears of signals.")
        self._trainer = trainer
        before = signal.signal(signal.SIGTERM, self._tell)
        try:
            yield
        except ToldToEnd:
            with contextlib.suppress(OSError):
                print(f"told to end: training stops after step {trainer.state.global_step}", flush=True)
            self._save_last_step()
            self.close(self._seconds_left())
            if trainer.args.world_size > 1:  # The launcher ends all as soon as one has ended.
                torch.distributed.barrier()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            self._trainer = None

    def close(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the checkpoints are stored or given up; False when that took too long."""
        return self._store.wait(timeout_seconds)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin to count the minutes, and go on counting the tokens, which TRL would begin anew."""
        self._saved_at, self._saved_step = time.monotonic(), state.global_step
        counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        if counted and hasattr(self._trainer, _TOKENS):
            setattr(self._trainer, _TOKENS, int(counted[-1]))

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Remember the learning rate of the step."""
        self._rate = optimizer.param_groups[0]["lr"]

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Give up the unfinished step when told to end: it may take longer than there is time."""
        if self._is_told_alone(args):
            raise ToldToEnd

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Give up the evaluation when told to end."""
        if self._is_told_alone(args):
            self._owes_evaluation = True
            raise ToldToEnd

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Decide; a step that is saved is logged, so that a resumed run averages over the same steps."""
        told, is_time = self._agreed(args)
        self._ends_epoch = control.should_training_stop or float(state.epoch).is_integer()
        self._is_due = is_time or state.global_step % state.save_steps == 0
        if args.gradient_accumulation_steps > 1 and self._trainer is not None:
            self._moment = _Moment.of(self._trainer)
        if told:
            by_epoch = self._ends_epoch and args.eval_strategy == "epoch"
            self._owes_evaluation = control.should_evaluate or by_epoch
            raise ToldToEnd
        control.should_save = self._is_due and not self._ends_epoch
        control.should_log |= self._will_be_saved(control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Take note of the loss, and have the step saved if none was better."""
        loss = (metrics or {}).get("eval_loss")
        if loss is None:
            return
        self._evaluated = (state.global_step, loss)
        if self._keep_best and state.global_step > self._saved_step and self._is_least(loss):
            self._is_due |= self._ends_epoch
            control.should_save = not self._ends_epoch

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save what was put off; the trainer would save and evaluate the last step of an epoch twice."""
        if args.eval_strategy != "epoch":
            control.should_evaluate = False
        control.should_save = self._is_due and self._ends_epoch
        control.should_log |= self._will_be_saved(control)
        self._ends_epoch = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Hand the checkpoint over to be stored, and delete what is no longer kept here."""
        self._saved_at, self._saved_step, self._is_due = time.monotonic(), state.global_step, False
        if args.world_size > 1:  # Each process writes a file of its own.
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and (folder / "trainer_state.json").is_file():
            self._store.add(self._described(folder, args, state))
            self._delete_old(Path(args.output_dir))
        if self._is_told_alone(args):
            raise ToldToEnd

    def _described(self, folder: Path, args: TrainingArguments, state: TrainerState) -> Saved:
        step = state.global_step
        about: dict[str, Any] = {"epoch": state.epoch, "processes": args.world_size}
        is_best = False
        if self._evaluated is not None and self._evaluated[0] == step:
            about["eval_loss"] = loss = self._evaluated[1]
            is_best = self._keep_best and self._is_least(loss)
            if is_best:
                self._least, self._best = loss, folder
        if self._owes_evaluation:
            about["owes_evaluation"] = True
        return Saved(folder, step, about, is_best)

    def _delete_old(self, output: Path) -> None:
        steps = (name for path in output.glob("checkpoint-*") if (name := path.name[11:]).isdecimal())
        for step in sorted(map(int, steps))[: -self._keep]:
            folder = output / f"checkpoint-{step}"
            if folder != self._best and not self._store.needs(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _will_be_saved(self, control: TrainerControl) -> bool:
        return self._is_due or (self._keep_best and bool(control.should_evaluate))

    def _is_least(self, loss: float) -> bool:
        return math.isfinite(loss) and (self._least is None or loss < self._least)

    def _agreed(self, args: TrainingArguments) -> tuple[bool, bool]:
        """Whether to end, and whether the minutes are over: the same in all processes."""
        told, is_time = self._told_at is not None, time.monotonic() - self._saved_at >= self._every_seconds
        if args.world_size == 1:
            return told, is_time
        flags = torch.tensor([told, is_time], dtype=torch.int32, device=args.device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        told, is_time = (bool(flag) for flag in flags.tolist())
        return told, is_time

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if self._told_at is None:
            self._told_at = time.monotonic()
        if self._trainer.args.world_size == 1:  # Launchers pass a signal on more than once.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _is_told_alone(self, args: TrainingArguments) -> bool:
        """Several processes may only end together, which they agree on after each step."""
        return self._told_at is not None and args.world_size == 1

    def _save_last_step(self) -> None:
        """Save the last whole step as it was when it was done, unless it is saved."""
        trainer = self._trainer
        if trainer.state.global_step == self._saved_step:
            return
        if self._moment is not None:
            self._moment.bring_back(trainer)
        trainer.control.should_log = trainer.control.should_save = True
        trainer.control.should_evaluate = False
        with contextlib.suppress(ToldToEnd):
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss,
                trainer.last_grad_norm,
                trainer.model,
                None,
                trainer.state.epoch,
                None,
                time.time(),
                learning_rate=self._rate,
            )

    def _seconds_left(self) -> float:
        """The pod ends what takes longer than its grace; without a pod, it would take for ever."""
        grace = float(os.environ.get(GRACE_VARIABLE) or _GRACE_SECONDS)
        told_at = time.monotonic() if self._told_at is None else self._told_at
        return max(0.0, told_at + grace - time.monotonic())
