"""The loader for GPUs: Unsloth's faster model, wrapped in a LoRA adapter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from openweights_prefect.jobs.training.params import TrainingParams

_CHECKPOINTING = "unsloth"


def prepare() -> bool:
    """Import Unsloth where it can be used; before anything of Transformers, TRL or PEFT, which it patches.

    It needs a GPU. In a job of several processes each of them goes without.
    """
    if not torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return False
    if importlib.util.find_spec("unsloth") is None:
        return False
    # The losses read logits, which Unsloth leaves out by default.
    os.environ.setdefault("UNSLOTH_RETURN_LOGITS", "1")
    importlib.import_module("unsloth")
    return True


def is_prepared() -> bool:
    """Whether this process has Unsloth."""
    return "unsloth" in sys.modules


def load(
    params: TrainingParams, name: str, *, dtype: Any, adapted: bool, target_modules: list[str] | str | None
) -> tuple[Any, Any]:
    """Load a model, or an adapter with its base (`adapted`), ready to train the adapter; and a tokenizer."""
    fast_model = importlib.import_module("unsloth").FastModel
    model, processor = fast_model.from_pretrained(
        model_name=name,
        max_seq_length=params.max_seq_length,
        dtype=dtype,
        load_in_4bit=params.load_in_4bit,
        device_map={"": torch.cuda.current_device()},
        trust_remote_code=False,
        use_gradient_checkpointing=_CHECKPOINTING,
        # Otherwise it may take another repository that it holds for the same model.
        use_exact_model_name=True,
        random_state=params.seed,
    )
    # Of a model that also sees, the processor holds the tokenizer.
    tokenizer = getattr(processor, "tokenizer", processor)
    if adapted:
        return model, tokenizer
    model = fast_model.get_peft_model(
        model,
        r=params.r,
        target_modules=target_modules,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        bias=params.lora_bias,
        use_rslora=params.use_rslora,
        use_gradient_checkpointing=_CHECKPOINTING,
        random_state=params.seed,
    )
    return model, tokenizer
