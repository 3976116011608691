"""One training: from the job folder to the result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import datasets
import torch
import transformers

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.training import collation, launch, unsloth_loading
from openweights_prefect.jobs.training.arguments import choose, trainer_arguments, uses_wandb
from openweights_prefect.jobs.training.checkpoint_store import CheckpointStore, Restored, restore
from openweights_prefect.jobs.training.checkpoints import Checkpoints
from openweights_prefect.jobs.training.data_report import read_rows
from openweights_prefect.jobs.training.examples import Example
from openweights_prefect.jobs.training.gpu_statistics import GpuStatistics
from openweights_prefect.jobs.training.loading import Loaded, load_model, load_result
from openweights_prefect.jobs.training.logprob_callback import logprob_callbacks
from openweights_prefect.jobs.training.preferences import Pair, Pairs
from openweights_prefect.jobs.training.publishing import Publisher
from openweights_prefect.jobs.training.reporting import Every, Reporting, Telemetry, earlier_events, is_due
from openweights_prefect.jobs.training.sampling import sampling_callbacks
from openweights_prefect.jobs.training.trainers import (
    OddsRatioTrainer,
    PreferenceTrainer,
    SupervisedTrainer,
    WeightedTrainer,
)
from openweights_prefect.runtime.inside import CurrentRun, RunFiles

if TYPE_CHECKING:
    from openweights_prefect.jobs.fine_tuning.params import FineTuningParams

WEIGHTED = "weighted_sft"

_TRAINERS = {
    "sft": SupervisedTrainer,
    "dpo": PreferenceTrainer,
    "orpo": OddsRatioTrainer,
}


class Data(NamedTuple):
    """What is trained or evaluated on."""

    rows: list[Example] | list[Pair]
    dataset: datasets.Dataset
    trained_tokens: int
    notes: list[str]
    figures: dict[str, int]


def train(folder: Path, kind: str) -> None:
    """Train what `params.json` of the folder says, and leave the result in its `uploads`."""
    quiet()
    params, files = read_params(folder / "params.json")
    try:
        _train(folder, kind, params, files)
    except torch.OutOfMemoryError as exc:
        raise out_of_memory(params) from exc


def read_params(path: Path) -> tuple[FineTuningParams, dict[str, str]]:
    """The parameters as they were validated by the client, and where each data file was mounted."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InvalidParameterError(f"Cannot read {str(path)!r} ({exc}). Start training as a job.") from exc
    files: dict[str, str] = values.pop("files", {})
    # The fields of the parameters without pydantic, which a job environment need not have.
    return cast("FineTuningParams", SimpleNamespace(**values)), files


def load_data(
    file_id: str,
    files: Mapping[str, str],
    params: FineTuningParams,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    kind: str,
) -> Data:
    """Read a data file for the loss of the job."""
    path = Path(files.get(file_id, file_id))
    if not path.is_file():
        raise InvalidParameterError(
            f"The data file {file_id!r} is not in the job folder. Submit the job again."
        )
    data = read_rows(path, params, tokenizer, kind=kind)
    figures = {"truncated": data.truncated, "dropped": data.dropped}
    if isinstance(data, Pairs):
        trained = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in data.rows)
        return Data(data.rows, collation.paired(data.rows), trained, data.notes, figures)
    rows = collation.weighted(data.rows) if kind == WEIGHTED else collation.labelled(data.rows)
    figures["eos_trained"] = data.eos_trained
    return Data(data.rows, rows, data.trained_tokens, data.notes, figures)


def trainer_class(params: FineTuningParams, kind: str) -> Any:
    """The trainer for this kind of job and loss."""
    return WeightedTrainer if kind == WEIGHTED else _TRAINERS[params.loss]


def out_of_memory(params: FineTuningParams) -> InvalidParameterError:
    """The error for a GPU that is too small for these parameters."""
    return InvalidParameterError(
        "The GPU has too little memory for this training. Lower per_device_train_batch_size="
        f"{params.per_device_train_batch_size} (and raise gradient_accumulation_steps as much, which trains "
        f"the same) or max_seq_length={params.max_seq_length}, or "
        + ("" if params.load_in_4bit else "set load_in_4bit=True, or ")
        + "ask for more with requires_vram_gb."
    )


def quiet() -> None:
    """Progress bars and advice make a log unreadable."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


# mypy sees no transformers in the control environment.
class EvaluateWhenDue(transformers.TrainerCallback):  # type: ignore[misc]
    """Evaluates every so many steps, also at steps that have ever longer distances."""

    def __init__(self, every: Every) -> None:
        self._every = every

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **_: Any,
    ) -> None:
        """Ask for an evaluation."""
        control.should_evaluate |= is_due(state.global_step, self._every, last=state.max_steps)


def _train(folder: Path, kind: str, params: FineTuningParams, files: Mapping[str, str]) -> None:
    device = _device()
    if params.deterministic:
        transformers.enable_full_determinism(params.seed)
    transformers.set_seed(params.seed)
    run = CurrentRun()
    if uses_wandb():
        _name_for_wandb(params, run)
    earlier = earlier_events(run)
    publisher = Publisher(params, run, folder / "uploads")
    if publisher.is_kept(earlier):
        if launch.rank() == 0:
            publisher.restore(earlier)
            publisher.push(*load_result(params, device, publisher.result), history=earlier)
        return

    if launch.rank() == 0:
        publisher.check()
    telemetry = Telemetry(run, earlier=earlier)
    checkpoints = Checkpoints(
        CheckpointStore(run, flush=telemetry.flush, say=telemetry.say),
        keep=params.save_total_limit,
        every_minutes=params.save_minutes,
        keep_best=params.keep_best,
        earlier=earlier,
    )
    loaded = load_model(params, device)
    trainer = _trainer(kind, params, files, loaded, device, telemetry, checkpoints)
    checkpoint = _checkpoint(params, trainer, earlier, telemetry)
    trainer.args.eval_on_start = trainer.eval_dataset is not None and (
        checkpoint is None or checkpoint.owes_evaluation
    )
    with checkpoints.heeding(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        if trainer.eval_dataset is not None and not _is_evaluated(trainer.state):
            trainer.evaluate()
    telemetry.close()
    if launch.rank() > 0:
        return
    history = trainer.state.log_history
    publisher.save(*loaded, history=history)
    checkpoints.close()
    trainer.accelerator.free_memory()
    if params.push:
        publisher.push(*loaded, history=history)


def _trainer(
    kind: str,
    params: FineTuningParams,
    files: Mapping[str, str],
    loaded: Loaded,
    device: str,
    telemetry: Telemetry,
    checkpoints: Checkpoints,
) -> Any:
    model, tokenizer = loaded
    choices = choose(params, model, device, kind=kind)
    training = load_data(params.training_file, files, params, tokenizer, kind=kind)
    test = load_data(params.test_file, files, params, tokenizer, kind=kind) if params.test_file else None
    notes = [
        *choices.notes,
        *training.notes,
        *(f"test file: {note}" for note in (test.notes if test else [])),
    ]
    for note in notes:
        print(f"note: {note}", flush=True)
    start = {
        "dataset_size": len(training.rows),
        "trained_tokens": training.trained_tokens,
        **training.figures,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "loader": "unsloth" if unsloth_loading.is_prepared() else "peft",
        "optim": choices.optimizer,
        "packing": choices.packing,
        "notes": notes,
    }
    callbacks = [
        *([EvaluateWhenDue(params.eval_every_n_steps)] if test is not None and kind == WEIGHTED else []),
        checkpoints,
        Reporting(telemetry, start=start),
        GpuStatistics(telemetry),
        *logprob_callbacks(params, files, tokenizer, telemetry),
        *sampling_callbacks(params, files, tokenizer, telemetry),
    ]
    trainer = trainer_class(params, kind)(
        model=model,
        args=trainer_arguments(params, model, device, choices, kind=kind, evaluate=test is not None),
        train_dataset=training.dataset,
        eval_dataset=test.dataset if test is not None else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        check=collation.MaskCheck(training.rows),
        warn=telemetry.log,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _checkpoint(
    params: FineTuningParams, trainer: Any, earlier: Sequence[Mapping[str, Any]], telemetry: Telemetry
) -> Restored | None:
    if not params.resume:
        return None
    with trainer.args.main_process_first():  # the others find what the first one brought
        processes = trainer.args.world_size
        return restore(earlier, RunFiles(), Path(params.output_dir), processes=processes, warn=telemetry.log)


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(launch.local_rank())
    return "cuda"


def _name_for_wandb(params: FineTuningParams, run: CurrentRun) -> None:
    """One run there for each job, which a resumed run goes on with."""
    os.environ.setdefault("WANDB_PROJECT", params.wandb_project or "openweights")
    os.environ.update(WANDB_NAME=run.job_id, WANDB_RUN_ID=run.job_id, WANDB_RESUME="allow")


def _is_evaluated(state: transformers.TrainerState) -> bool:
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
