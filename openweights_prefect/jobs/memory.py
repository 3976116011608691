"""How much GPU memory a job needs, in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from openweights_prefect.jobs.model_shape import Shape, shape_from_name

Source = Literal["config", "name", "unknown"]

UNKNOWN_SIZE_VRAM_GB = 24
"""For a model of which nothing is known."""

_LEAST_VRAM_GB = 6
_GB = 1e9
_TYPED_WEIGHTS = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
_NF4 = 0.516
"""Bytes of a weight in 4 bits, its share of the quantization constants included."""
_USUAL_TARGETS = ("q_proj", "v_proj")
_CHUNK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is done with a model; the fields are those of the parameters of the jobs."""

    trains: bool = True
    loss: Literal["sft", "dpo", "orpo", "weighted"] = "sft"
    is_peft: bool = True
    load_in_4bit: bool = False
    dtype: str = "auto"
    r: int = 16
    target_modules: tuple[str, ...] | None = None
    optim: str = "adamw_8bit"
    length: int = 2048
    batch_size: int = 2
    sampled_tokens: int = 0
    """The most tokens of prompts and answers that are held at once while sampling."""

    @classmethod
    def of(cls, params: Any, *, kind: str = "fine_tuning", length: int | None = None) -> Workload:
        """Read it from the parameters of a job; `length` is that of its longest row, if that is known."""
        quantized = params.load_in_4bit or "4bit" in params.model.lower()
        if not hasattr(params, "training_file"):
            return cls(
                trains=False,
                load_in_4bit=quantized,
                dtype=params.dtype,
                length=length or params.max_seq_length or cls.length,
                batch_size=params.batch_size,
            )
        sampled = max(
            (each.batch_size * (each.max_tokens + 512) for each in params.sampling_callbacks or []), default=0
        )
        return cls(
            loss="weighted" if kind == "weighted_sft" else params.loss,
            is_peft=params.is_peft,
            load_in_4bit=quantized,
            dtype=params.dtype,
            r=params.r,
            target_modules=None if params.target_modules is None else tuple(params.target_modules),
            optim=params.optim,
            length=min(length or params.max_seq_length, params.max_seq_length),
            batch_size=params.per_device_train_batch_size,
            sampled_tokens=sampled,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """GPU memory in parts, in GB of 10^9 bytes.

    Activations and logits are there while a step is computed, the cache between steps while answers are
    sampled: the larger of the two counts.
    """

    weights_gb: float
    adapters_gb: float
    optimizer_gb: float
    gradients_gb: float
    activations_gb: float
    logits_gb: float
    kv_cache_gb: float
    overhead_gb: float
    source: Source
    parameters: int | None = None

    @property
    def total_gb(self) -> float:
        """The most that is held at once."""
        if self.source == "unknown":
            return UNKNOWN_SIZE_VRAM_GB
        held = self.weights_gb + self.adapters_gb + self.optimizer_gb + self.gradients_gb + self.overhead_gb
        return held + max(self.activations_gb + self.logits_gb, self.kv_cache_gb)

    @property
    def requires_vram_gb(self) -> int:
        """As a job asks for it."""
        return max(_LEAST_VRAM_GB, math.ceil(self.total_gb))


def requires_vram_gb(params: Any, *, kind: str = "fine_tuning", shape: Shape | None = None) -> int:
    """GPU memory for the parameters of a job, by the model's name without a shape; 24 when it has no size."""
    return estimate(shape or shape_from_name(params.model), Workload.of(params, kind=kind)).requires_vram_gb


def estimate(shape: Shape | None, work: Workload) -> MemoryEstimate:
    """Estimate what a job on a GPU holds; gradient checkpointing is on there."""
    if shape is None:
        nothing: dict[str, Any] = dict.fromkeys(_PARTS, 0.0)
        return MemoryEstimate(**nothing, source="unknown")
    adapters = _adapter_parameters(shape, work) if work.trains and work.is_peft else 0
    trained, width = (adapters, 4.0) if work.is_peft else (shape.parameters, _full_width(work))
    if not work.trains:
        trained = 0
    logits = _logits(shape, work)
    parts = {
        "weights_gb": _weights(shape, work),
        "adapters_gb": adapters * 4.0,
        "optimizer_gb": trained * _moments(work.optim, width),
        "gradients_gb": trained * width,
        "activations_gb": _activations(shape, work),
        "logits_gb": logits,
        "kv_cache_gb": 4.0 * work.sampled_tokens * shape.layers * shape.kv_heads * shape.head_size,
    }
    # CUDA itself, and what is lost to the allocator.
    parts["overhead_gb"] = 1.0 * _GB + 0.05 * (parts["weights_gb"] + parts["activations_gb"] + logits)
    in_gb: dict[str, Any] = {name: size / _GB for name, size in parts.items()}
    return MemoryEstimate(**in_gb, source=shape.source, parameters=shape.parameters)


_PARTS = tuple(name for name in MemoryEstimate.__annotations__ if name.endswith("_gb"))


def _weights(shape: Shape, work: Workload) -> float:
    if work.load_in_4bit or shape.quantized:
        wide = min(shape.embedding_parameters, shape.parameters)
        return 2.0 * wide + _NF4 * (shape.parameters - wide)
    if not work.trains or work.is_peft:
        return _TYPED_WEIGHTS.get(work.dtype, 2.0) * shape.parameters
    # Beside weights in float32, the step keeps copies of them in 16 bits.
    computed_in_16_bits = 2.0 if work.dtype in ("auto", "float16") else 0.0
    return (_full_width(work) + computed_in_16_bits) * shape.parameters


def _full_width(work: Workload) -> float:
    return 2.0 if work.dtype == "bfloat16" else 4.0


def _moments(optimizer: str, width: float) -> float:
    """Bytes that the optimizer keeps for a parameter."""
    return {"adamw_8bit": 2.0, "sgd": 0.0}.get(optimizer, 2 * width)


def _adapter_parameters(shape: Shape, work: Workload) -> int:
    names = _USUAL_TARGETS if work.target_modules is None else work.target_modules
    return work.r * sum(shape.linear(name) for name in names)


def _rows(work: Workload) -> int:
    return work.batch_size * (2 if work.loss in ("dpo", "orpo") else 1)


def _activations(shape: Shape, work: Workload) -> float:
    """The input of every layer, and all that one layer computes, which is computed again going backward."""
    tokens = _rows(work) * work.length
    width = 4.0 if work.dtype == "float32" else 2.0
    query, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    wide = max(shape.dense_intermediate, shape.intermediate * max(shape.experts_per_token, 1))
    layer = 8 * shape.hidden + 3 * query + 2 * keys + (4 if shape.gated else 3) * wide
    scores = 0.0
    if shape.eager_attention:
        scores = 8.0 * _rows(work) * shape.heads * float(work.length) ** 2
    if not work.trains:
        return tokens * width * layer + scores
    return tokens * width * (shape.layers * shape.hidden + 2 * layer) + scores


def _logits(shape: Shape, work: Workload) -> float:
    """Scores of the vocabulary; what SFT and measurements hold of them are pieces."""
    tokens = _rows(work) * work.length
    piece = 12.0 * min(tokens, _CHUNK_TOKENS) * shape.vocabulary
    if not work.trains:
        return piece
    if work.loss == "sft" and "lm_head" not in (work.target_modules or ()):
        return piece
    per_score = {"weighted": 8.0}.get(work.loss, 10.0)
    return max(piece, per_score * tokens * shape.vocabulary)
