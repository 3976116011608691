"""Fine-tunes one model: `python -m openweights_prefect.jobs.fine_tuning.train` in a job folder.

Reads `params.json` (the validated `FineTuningParams`, plus `files`: file id -> path in the folder), trains
with TRL and PEFT, and leaves the result in `uploads/`. Only the packages of the job environment are needed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from openweights_prefect.errors import InvalidParameterError, OpenWeightsError
from openweights_prefect.jobs.fine_tuning.data import Examples, load_examples
from openweights_prefect.jobs.fine_tuning.events import Reporting
from openweights_prefect.runtime.inside import CurrentRun

if TYPE_CHECKING:
    from openweights_prefect.jobs.fine_tuning.params import FineTuningParams


def main() -> int:
    """Train in the current folder; 1 and a last line that begins with `error:` when the user can mend it."""
    _quiet()
    try:
        train(Path.cwd())
    except OpenWeightsError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 1
    return 0


def train(folder: Path) -> None:
    """Train what `params.json` of the folder says, going on from the last checkpoint that lies there."""
    params, files = read_params(folder / "params.json")
    transformers.set_seed(params.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    optimizer, notes = _what_works_here(params, device)

    model, tokenizer = load_model(params, device)
    training = _examples(params.training_file, files, params, tokenizer)
    test = _examples(params.test_file, files, params, tokenizer) if params.test_file else None
    if training.truncated or training.dropped:
        notes.append(
            f"{training.truncated} conversations were cut to max_seq_length={params.max_seq_length}, "
            f"{training.dropped} have nothing to train on and were left out"
        )
    for note in notes:
        print(f"note: {note}", flush=True)
    start = {
        "dataset_size": len(training.rows),
        "trained_tokens": training.trained_tokens,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": device,
        "optim": optimizer,
        "notes": notes,
    }

    trainer = SFTTrainer(
        model=model,
        args=_arguments(params, device, optimizer, evaluate=test is not None),
        train_dataset=_dataset(training),
        eval_dataset=_dataset(test) if test is not None else None,
        processing_class=tokenizer,
        callbacks=[Reporting(CurrentRun(), start=start)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    checkpoints = Path(params.output_dir)
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    )
    state = trainer.state
    evaluated = any(
        "eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history
    )
    if test is not None and not evaluated:
        trainer.evaluate()

    result = _save(model, tokenizer, params, folder / "uploads")
    print(f"saved {result.relative_to(folder)}", flush=True)


def read_params(path: Path) -> tuple[FineTuningParams, dict[str, str]]:
    """The parameters as they were validated by the client, and where each data file was mounted."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InvalidParameterError(f"Cannot read {str(path)!r} ({exc}). Start training as a job.") from exc
    files: dict[str, str] = values.pop("files", {})
    # The fields of `FineTuningParams` without pydantic, which a job environment need not have.
    return cast("FineTuningParams", SimpleNamespace(**values)), files


class Loaded(NamedTuple):
    """A model that is ready to train, and its tokenizer."""

    model: Any
    tokenizer: transformers.PreTrainedTokenizerBase


def load_model(params: FineTuningParams, device: str) -> Loaded:
    """Load the base model, wrapped in a LoRA adapter unless `is_peft` is false."""
    name, checkpoint = params.model, None
    if not Path(name).is_dir() and name.count("/") == 2:
        name, checkpoint = name.rsplit("/", 1)
    if Path(name, "adapter_config.json").is_file():
        raise InvalidParameterError(
            f"The model {name!r} is a LoRA adapter. Give the model that it was trained on."
        )
    source = {"subfolder": checkpoint} if checkpoint else {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **source)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **source)
    except OSError as exc:
        reason = str(exc).split("\n")[0]
        raise InvalidParameterError(f"The model {params.model!r} cannot be loaded: {reason}") from exc
    if not tokenizer.is_fast:
        raise InvalidParameterError(
            f"The model {params.model!r} has no fast tokenizer, which training needs."
        )
    if params.chat_template != "default":
        tokenizer.chat_template = params.chat_template
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if params.is_peft:
        try:
            model = get_peft_model(model, _lora(params))
        except ValueError as exc:  # The model has no layers of these names.
            reason = str(exc).split("\n")[0]
            raise InvalidParameterError(f"target_modules={params.target_modules!r}: {reason}") from exc
    return Loaded(model, tokenizer)


def _lora(params: FineTuningParams) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=params.r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        bias=params.lora_bias,
        use_rslora=params.use_rslora,
        target_modules=params.target_modules,
    )


def _what_works_here(params: FineTuningParams, device: str) -> tuple[str, list[str]]:
    """The optimizer to use, and a note for each wish that this machine cannot grant."""
    if params.load_in_4bit:
        raise InvalidParameterError(
            "load_in_4bit=True is not available yet. Leave it out to train in full precision."
        )
    optimizer, notes = params.optim, []
    if optimizer == "adamw_8bit" and (device == "cpu" or not transformers.utils.is_bitsandbytes_available()):
        optimizer = "adamw_torch"
        notes.append("optim='adamw_8bit' needs a GPU and bitsandbytes; 'adamw_torch' is used")
    if optimizer in ("adam", "adamw"):
        optimizer = "adamw_torch"
    if params.packing:
        notes.append("packing needs Flash Attention; conversations are padded instead, which trains the same")
    return optimizer, notes


def _arguments(params: FineTuningParams, device: str, optimizer: str, *, evaluate: bool) -> SFTConfig:
    strategy = (params.test_file_eval_strategy or "no") if evaluate else "no"
    return SFTConfig(
        output_dir=params.output_dir,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        gradient_checkpointing=device == "cuda",
        num_train_epochs=params.epochs,
        max_steps=params.max_steps or -1,
        per_device_train_batch_size=params.per_device_train_batch_size,
        per_device_eval_batch_size=params.eval_batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        learning_rate=float(params.learning_rate),
        lr_scheduler_type=params.lr_scheduler_type,
        warmup_steps=params.warmup_steps,
        weight_decay=params.weight_decay,
        optim=optimizer,
        seed=params.seed,
        logging_first_step=True,
        logging_steps=params.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=strategy,
        eval_steps=params.test_file_eval_steps,
        eval_on_start=evaluate,
        save_strategy="steps",
        save_steps=params.save_steps,
        save_total_limit=2,
        # The rows are tokenized, labelled and cut already.
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        report_to=[],
    )


def _examples(
    file_id: str,
    files: dict[str, str],
    params: FineTuningParams,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> Examples:
    path = Path(files.get(file_id, file_id))
    if not path.is_file():
        raise InvalidParameterError(
            f"The data file {file_id!r} is not in the job folder. Submit the job again."
        )
    return load_examples(
        path, tokenizer, max_length=params.max_seq_length, responses_only=params.train_on_responses_only
    )


def _dataset(examples: Examples) -> datasets.Dataset:
    return datasets.Dataset.from_list([row._asdict() for row in examples.rows])


def _save(
    model: Any, tokenizer: transformers.PreTrainedTokenizerBase, params: FineTuningParams, uploads: Path
) -> Path:
    """Write the result; a half-written one is never seen under its final name."""
    final = uploads / ("adapter" if params.is_peft else "model")
    if params.is_peft:
        # PEFT remembers where it loaded from; whoever loads the adapter needs the name that was asked for.
        model.peft_config["default"].base_model_name_or_path = params.model
    unfinished = Path(f"{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").unlink(missing_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    uploads.mkdir(exist_ok=True)
    return unfinished.rename(final)


def _quiet() -> None:
    """Progress bars and advice make a log unreadable."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    raise SystemExit(main())
