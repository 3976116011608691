"""The parameters of a job as arguments of the trainers of TRL and Transformers."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import DPOConfig, SFTConfig
from trl.experimental.orpo import ORPOConfig
from trl.trainer.sft_trainer import FLASH_ATTENTION_VARIANTS

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.training.loading import compute_dtype

if TYPE_CHECKING:
    from openweights_prefect.jobs.fine_tuning.params import FineTuningParams

# Other processes wait that long for one that is slower.
_PATIENCE_SECONDS = 4 * 3600


class Choices(NamedTuple):
    """What was decided about the wishes that depend on the machine and the model."""

    optimizer: str
    packing: bool
    notes: list[str]


def choose(params: FineTuningParams, model: Any, device: str, *, kind: str) -> Choices:
    """Decide, with a note for each wish that is not granted; raises for what would train something else."""
    optimizer, notes = params.optim, []
    if params.loss == "dpo" and params.is_peft and params.lora_bias != "none":
        raise InvalidParameterError(
            f"lora_bias={params.lora_bias!r} cannot be used with loss='dpo': the biases of the reference "
            "model would be trained along. Use lora_bias='none'."
        )
    if optimizer == "adamw_8bit" and (device == "cpu" or not transformers.utils.is_bitsandbytes_available()):
        notes.append("optim='adamw_8bit' needs a GPU and bitsandbytes; 'adamw_torch' is used")
        optimizer = "adamw_torch"
    if optimizer in ("adam", "adamw"):
        optimizer = "adamw_torch"
    if params.dtype == "float16" and device == "cpu":
        notes.append("dtype='float16' needs a GPU; float32 is used")
    if params.lora_dropout and params.loss in ("dpo", "orpo"):
        notes.append(f"lora_dropout={params.lora_dropout} is not used: loss={params.loss!r} has no dropout")
    packing = False
    if kind == "fine_tuning" and params.loss == "sft" and params.packing:
        packing = keeps_documents_apart(model, device)
        if not packing:
            notes.append(
                "packing needs Flash Attention; conversations are padded instead, which trains the same"
            )
    return Choices(optimizer, packing, notes)


def keeps_documents_apart(model: Any, device: str) -> bool:
    """Whether attention in a row of several documents stays within each."""
    implementation = str(model.config._attn_implementation).split("@")[0].split(":")[0]
    return device == "cuda" and implementation in FLASH_ATTENTION_VARIANTS


def trainer_arguments(
    params: FineTuningParams,
    model: Any,
    device: str,
    choices: Choices,
    *,
    kind: str,
    evaluate: bool,
) -> transformers.TrainingArguments:
    """The arguments of the trainer of this kind of job and loss."""
    common = _common(params, model, device, choices)
    if kind == "weighted_sft":
        return transformers.TrainingArguments(
            **common, eval_strategy="no", remove_unused_columns=False, label_names=["weights"]
        )
    if evaluate:
        common["eval_strategy"] = params.test_file_eval_strategy or "no"
        common["eval_steps"] = params.test_file_eval_steps
    if params.loss == "dpo":
        return DPOConfig(
            **common,
            beta=params.beta,
            # The pairs are cut already.
            max_length=None,
            # Of an adapter that is trained further, and of a whole model, the reference is what it was at
            # first: it is asked once, before training, instead of being kept beside the model.
            precompute_ref_log_probs=not is_fresh_adapter(model),
        )
    if params.loss == "orpo":
        return ORPOConfig(
            **common, beta=params.beta, max_length=params.max_seq_length, remove_unused_columns=False
        )
    return SFTConfig(
        **common,
        loss_type="nll" if _adapts_head(model) else "chunked_nll",
        # The rows are tokenized, labelled and cut already.
        max_length=params.max_seq_length if choices.packing else None,
        packing=choices.packing,
        eval_packing=False,
        dataset_kwargs=None if choices.packing else {"skip_prepare_dataset": True},
    )


def is_fresh_adapter(model: Any) -> bool:
    """Whether the model is an adapter that changes nothing yet, so that without it the model is the base."""
    factors = [value for name, value in model.named_parameters() if ".lora_B." in name]
    return bool(factors) and not any(value.any() for value in factors)


def _common(params: FineTuningParams, model: Any, device: str, choices: Choices) -> dict[str, Any]:
    computed = compute_dtype(params, device)
    checkpointed = bool(getattr(model, "is_gradient_checkpointing", False))  # by Unsloth
    return {
        "output_dir": params.output_dir,
        "use_cpu": device == "cpu",
        "bf16": computed == torch.bfloat16,
        "fp16": computed == torch.float16,
        "gradient_checkpointing": device == "cuda" and not checkpointed,
        "num_train_epochs": params.epochs,
        "max_steps": params.max_steps or -1,
        "per_device_train_batch_size": params.per_device_train_batch_size,
        "per_device_eval_batch_size": params.eval_batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation_steps,
        "learning_rate": float(params.learning_rate),
        "lr_scheduler_type": params.lr_scheduler_type,
        "warmup_steps": params.warmup_steps,
        "weight_decay": params.weight_decay,
        # The same in one pass over the weights, as Transformers has it by itself.
        "optim": "adamw_torch_fused" if choices.optimizer == "adamw_torch" else choices.optimizer,
        "seed": params.seed,
        "full_determinism": params.deterministic,
        "logging_first_step": True,
        "logging_steps": params.logging_steps,
        "logging_nan_inf_filter": False,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "save_steps": params.save_steps,
        "save_total_limit": None,  # `Checkpoints` deletes, which knows what is still being stored
        "dataloader_pin_memory": device == "cuda",
        "ddp_timeout": _PATIENCE_SECONDS,
        "disable_tqdm": True,
        "report_to": ["wandb"] if uses_wandb() else [],
    }


def uses_wandb() -> bool:
    """Whether a key of Weights & Biases is among the job's secrets, and its package is here."""
    return bool(os.environ.get("WANDB_API_KEY")) and importlib.util.find_spec("wandb") is not None


def _adapts_head(model: Any) -> bool:
    """Whether the output layer has an adapter, which the loss in chunks would pass by."""
    return isinstance(model.get_output_embeddings(), BaseTunerLayer)
