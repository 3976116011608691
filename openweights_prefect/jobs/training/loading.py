"""Loads a model that is ready to train, and its tokenizer: with Unsloth where that works, else with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.training import unsloth_loading
from openweights_prefect.jobs.training.sources import Source, cannot_load, find, load_tokenizer

if TYPE_CHECKING:
    from openweights_prefect.jobs.training.params import ModelParams, TrainingParams


class Loaded(NamedTuple):
    """A model that is ready to train, and its tokenizer."""

    model: Any
    tokenizer: transformers.PreTrainedTokenizerBase


def load_model(params: TrainingParams, device: str) -> Loaded:
    """Load what `params.model` names, wrapped in a LoRA adapter unless `is_peft` is false.

    When it is an adapter itself, training goes on with that one; without `is_peft` it is merged first.
    """
    source, base = find(params)
    tokenizer = load_tokenizer(params, source, base)
    dtype = weights_dtype(params, device)
    if params.is_peft and not source.subfolder and unsloth_loading.is_prepared():
        targets: list[str] | str | None = params.target_modules
        if targets is None and base is None:
            targets = _usual_targets(transformers.AutoConfig.from_pretrained(source.name, **source.options))
        model, _ = unsloth_loading.load(
            params, source.name, dtype=dtype, adapted=base is not None, target_modules=targets
        )
        return Loaded(model, tokenizer)

    model = load_base(params, base or source, dtype=dtype, device=device)
    if base is not None:
        model = PeftModel.from_pretrained(
            model, source.name, is_trainable=params.is_peft, subfolder=source.subfolder or None
        )
        model = model if params.is_peft else model.merge_and_unload()
    elif params.is_peft:
        model = _adapted(model, params)
    return Loaded(model, tokenizer)


def load_result(params: TrainingParams, device: str, folder: Path) -> Loaded:
    """Load what an earlier run of the job left in `folder`, to work on it further without training."""
    source, base = find(params)
    place = (base or source) if params.is_peft else Source(str(folder))
    model = load_base(params, place, dtype=weights_dtype(params, device), device=device)
    if params.is_peft:
        model = PeftModel.from_pretrained(model, folder)
    return Loaded(model, load_tokenizer(params, Source(str(folder)), None))


def load_base(params: ModelParams, source: Source, *, dtype: Any, device: str) -> Any:
    """Load the weights, quantized to 4 bits if that was asked for, straight onto the device."""
    options = source.options
    if device == "cuda":
        options["device_map"] = {"": torch.cuda.current_device()}
        if transformers.utils.is_flash_attn_2_available():
            options["attn_implementation"] = "flash_attention_2"
    if params.load_in_4bit:
        options["quantization_config"] = four_bit(device, dtype)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(source.name, dtype=dtype, **options)
    except (OSError, ValueError, ImportError) as exc:
        raise cannot_load(params.model, exc) from exc


def four_bit(device: str, dtype: Any) -> transformers.BitsAndBytesConfig:
    """NF4 with double quantization, as QLoRA has it."""
    if device != "cuda" or not transformers.utils.is_bitsandbytes_available():
        raise InvalidParameterError(
            "load_in_4bit=True needs an NVIDIA GPU and bitsandbytes, and this machine lacks one of them. "
            "Leave it out to train in full precision."
        )
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def compute_dtype(params: ModelParams, device: str) -> Any:
    """What is computed in: bfloat16 where the GPU has it, else float16; float32 on a CPU."""
    if params.dtype != "auto":
        # There is no training in float16 without a GPU's loss scaling.
        usable = device == "cuda" or params.dtype != "float16"
        return getattr(torch, params.dtype) if usable else torch.float32
    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def weights_dtype(params: TrainingParams, device: str) -> Any:
    """What the base is held in: as computed in, but float32 where all weights are trained.

    Small steps would be lost in a 16-bit weight; who asks for bfloat16 by name gets it all the same.
    """
    computed = compute_dtype(params, device)
    if params.is_peft or params.dtype == "bfloat16":
        return computed
    return torch.float32


def _adapted(model: Any, params: TrainingParams) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=params.r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        bias=params.lora_bias,
        use_rslora=params.use_rslora,
        target_modules=params.target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as exc:  # The model has no layers of these names.
        reason = str(exc).split("\n")[0]
        raise InvalidParameterError(f"target_modules={params.target_modules!r}: {reason}") from exc


def _usual_targets(config: Any) -> list[str] | str:
    """What PEFT takes when nothing is said; Unsloth would take every layer."""
    targets: list[str] | str = USUAL_TARGETS.get(config.model_type, "all-linear")
    return targets
