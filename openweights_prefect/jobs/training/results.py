"""What training leaves behind: an adapter or a whole model, written at once, read back, and kept."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError, safe_open

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.runtime.inside import CurrentRun, RunFiles
from openweights_prefect.types.paths import safe_relative_path

if TYPE_CHECKING:
    from openweights_prefect.jobs.training.params import TrainingParams

ADAPTER = "adapter"
MODEL = "model"
MERGED = "merged"

_SHARD_SIZE = "5GB"
KEPT = "result"  # tag of the event that lists a stored result
_ADAPTER_CONFIG = "adapter_config.json"
_INDEX = "model.safetensors.index.json"
_QUANTIZED = ("Linear4bit", "Linear8bitLt")  # of bitsandbytes, which a machine without a GPU need not have


class BrokenResultError(OpenWeightsError):
    """The trained weights are not fit to be handed out."""


def save_result(model: Any, tokenizer: Any, params: TrainingParams, uploads: Path) -> Path:
    """Write `uploads/adapter` or, for a full fine-tune, `uploads/model`; nothing half-written is seen there.

    Raises `BrokenResultError` when a weight is not finite or what is on disk is not what was trained.
    """
    if not isinstance(model, PeftModel):
        return _write(model, tokenizer, uploads / MODEL)
    base = _base_name(params)
    for config in model.peft_config.values():
        # PEFT remembers where it loaded from; whoever loads the adapter needs the name that was asked for.
        config.base_model_name_or_path, config.revision = base, None
    return _write(model, tokenizer, uploads / ADAPTER)


def save_merged(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Merge the adapter into its base and write the whole model to `folder`; `model` is used up."""
    return _write(merge(model), tokenizer, folder)


def merge(model: Any) -> Any:
    """The base model with the adapter added, in the base's own dtype; uses up `model`.

    Sums are taken in float32 and rounded once. A quantized base is dequantized first, on the CPU: the sum is
    then the function that was trained, which the unquantized original with the adapter would not be.
    """
    base = model.get_base_model()
    tied = bool(base.config.get_text_config().tie_word_embeddings)
    if tied:
        _untie_adapted(base)
    for layer in [each for each in base.modules() if isinstance(each, BaseTunerLayer)]:
        _merge_layer(layer, _dtype(base))
    merged = model.unload()
    if any(type(each).__name__ in _QUANTIZED for each in merged.modules()) or _is_quantized(merged):
        _dequantize(merged)
    inputs, outputs = merged.get_input_embeddings(), merged.get_output_embeddings()
    if tied and outputs is not None and inputs.weight.data_ptr() != outputs.weight.data_ptr():
        # Loading would tie them again and lose what one of them learned.
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    return merged


def verify(folder: Path) -> int:
    """Read every weight of a saved model back; returns how many numbers there are.

    Raises `BrokenResultError` for a truncated or missing file and for a number that is not finite.
    """
    count, found = 0, {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no mapping
                    tensor = tensors.get_tensor(name)
                    _require_finite(name, tensor)
                    count += tensor.numel()
                    found[name] = path.name
        except (SafetensorError, OSError) as exc:
            raise BrokenResultError(
                f"{path.name!r} cannot be read back: {exc}. Is the disk full? Submit the job again."
            ) from exc
    if not found:
        raise BrokenResultError(f"No weights were written to {folder.name!r}. Submit the job again.")
    index = folder / _INDEX
    if index.exists() and json.loads(index.read_text(encoding="utf-8"))["weight_map"] != found:
        raise BrokenResultError(
            f"The shards in {folder.name!r} are not those of {_INDEX}. Submit the job again."
        )
    return count


def keep_result(run: CurrentRun, result: Path) -> None:
    """Store the result's files now, so that nothing that happens to this run later can lose them.

    They are events of the run, which `job.download()` fetches however it ends; `restore_result` finds them.
    """
    files = {}
    for path in sorted(each for each in result.rglob("*") if each.is_file()):
        name = f"{result.name}/{path.relative_to(result).as_posix()}"
        files[name] = run.upload(path, name=name)
    run.log({"tag": KEPT, "files": files})
    run.flush()


def restore_result(events: Sequence[Mapping[str, Any]], files: RunFiles, uploads: Path) -> Path | None:
    """Bring back what an earlier run of the same job kept, verified; None when there is nothing to bring."""
    kept = [event["data"]["files"] for event in events if event["data"].get("tag") == KEPT]
    if not kept:
        return None
    name = next(iter(kept[-1])).split("/")[0]
    unfinished = uploads.parent / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    for path, file_id in kept[-1].items():
        target = unfinished / safe_relative_path(path).relative_to(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.content(file_id))
    verify(unfinished)
    return _move(unfinished, uploads / name)


def _write(model: Any, tokenizer: Any, final: Path) -> Path:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _require_finite(name, parameter.detach())
    unfinished = final.parent.parent / f"{final.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if isinstance(model, PeftModel):
            # By itself PEFT asks the hub for the base's vocabulary; ours is never resized.
            model.save_pretrained(unfinished, save_embedding_layers=False)
        else:
            model.save_pretrained(unfinished, max_shard_size=_SHARD_SIZE)
        tokenizer.save_pretrained(unfinished)
    except (OSError, SafetensorError) as exc:
        raise BrokenResultError(f"The result cannot be written: {exc}. Is the disk full?") from exc
    (unfinished / "README.md").unlink(missing_ok=True)  # PEFT's own is an empty form
    written, wanted = verify(unfinished), _numbers(model)
    if written < wanted:
        raise BrokenResultError(
            f"{written} numbers were written to {final.name!r} of the {wanted} that the model has. "
            "This model cannot be saved by these versions of Transformers and PEFT."
        )
    return _move(unfinished, final)


def _move(unfinished: Path, final: Path) -> Path:
    shutil.rmtree(final, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    return unfinished.rename(final)


def _base_name(params: TrainingParams) -> str:
    """The model that was asked for; that of the adapter which training went on with, if it was one."""
    config = Path(params.model, _ADAPTER_CONFIG)
    if not config.is_file():
        return params.model
    return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])


def _numbers(model: Any) -> int:
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return sum(each.numel() for each in state.values())
    return sum(each.numel() for each in model.parameters())  # tied weights are counted once


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if (
        tensor.is_floating_point()
        and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()
    ):
        raise BrokenResultError(
            f"The weight {name!r} is not finite: training diverged. Lower `learning_rate`, "
            "or look for the first `nan` in the events of the run."
        )


def _dtype(model: Any) -> torch.dtype:
    dtype = model.config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16


def _untie_adapted(base: Any) -> None:
    """An adapter on one of two layers that share their weight must not change the other one."""
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    layers = [each for each in (inputs, outputs) if isinstance(each, BaseTunerLayer)]
    if layers and isinstance(layers[0], BaseTunerLayer):
        weight = layers[0].get_base_layer().weight
        layers[0].get_base_layer().weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)


def _merge_layer(layer: Any, dtype: torch.dtype) -> None:
    base = layer.get_base_layer()
    if type(base).__name__ in _QUANTIZED:
        dense = _dense(base, torch.float32)
        for adapter in layer.active_adapters:
            dense.weight.data += layer.get_delta_weight(adapter).to(dense.weight)
        layer.base_layer = dense.to(dtype)
        return
    own = {name: parameter.dtype for name, parameter in base.named_parameters(recurse=False)}
    base.to(torch.float32)
    layer.merge(safe_merge=True)
    for name, kept in own.items():
        parameter = getattr(base, name)
        parameter.data = parameter.data.to(kept)


def _is_quantized(model: Any) -> bool:
    return "quantization_config" in model.config.to_dict()


def _dequantize(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if type(module).__name__ in _QUANTIZED:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _dense(module, _dtype(model)))
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.to("cpu")


def _dense(layer: Any, dtype: torch.dtype) -> torch.nn.Linear:
    """The same layer without quantization, on the CPU: the whole model need not fit on the GPU."""
    weight = dequantize_module_weight(layer).detach().to("cpu", dtype)
    dense = torch.nn.Linear(
        weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=dtype, device="meta"
    )
    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = torch.nn.Parameter(layer.bias.detach().to("cpu", dtype), requires_grad=False)
    return dense
