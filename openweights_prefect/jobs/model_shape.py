"""What decides about the size of a language model, from its configuration or the size in its name."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

# "8B", "0.5b", "270M", "8x7B"; not the "2.5" of a version, the "A3B" of active experts or the "4b" of "4bit".
_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})x)?(\d{1,4}(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
_JOB_ID = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{12}(-[\w.-]+)?")

_HEADER_LIMIT = 100_000_000
_FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
_UNGATED = {"gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "falcon", "bloom", "starcoder2", "mpt"}
_TIED = {"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gpt2", "cohere", "cohere2"}
_BIASED = {"qwen2", "qwen2_moe"}
# Their attention has no kernel that avoids the matrix of scores, unless Flash Attention is there.
_EAGER = {"gemma2", "gpt_oss"}
# The experts of these are not called as `target_modules` call them.
_UNADAPTED_EXPERTS = {"mixtral", "gpt_oss", "phimoe", "dbrx"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides about the size of a language model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    """Width of the dense feed-forward, or of one expert."""
    vocabulary: int
    tied: bool = False
    gated: bool = True
    experts: int = 0
    experts_per_token: int = 0
    dense_layers: int = 0
    """Those without experts, in a model with experts."""
    dense_intermediate: int = 0
    biases: bool = False
    other: int = 0
    """Parameters beside the language model, such as those of an image encoder."""
    eager_attention: bool = False
    adapted_experts: bool = True
    counted: int | None = None
    """Parameters as the files of the weights say, or the name does."""
    longest: int | None = None
    """Positions that the model was made for."""
    quantized: bool = False
    """Whether its files hold weights in 4 bits."""
    source: Literal["config", "name"] = "config"

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.counted or self._embeddings + self.layers * self._attention + self._forward + self.other

    @property
    def active_parameters(self) -> int:
        """Those that each token passes through: of the experts only the chosen ones."""
        if not self.experts:
            return self.parameters
        idle = (self.experts - self.experts_per_token) * self._matrices * self.hidden * self.intermediate
        return max(self.parameters - (self.layers - self.dense_layers) * idle, self.parameters // 100)

    @property
    def embedding_parameters(self) -> int:
        """Those that stay in 16 bits when a model is quantized."""
        return self._embeddings

    def linear(self, name: str) -> int:
        """Inputs and outputs of the layers of this name, in all of them: what one rank of LoRA adds."""
        query, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        width = {"q_proj": query, "o_proj": query, "k_proj": keys, "v_proj": keys}.get(name)
        if width is not None:
            return self.layers * (self.hidden + width)
        if name in ("lm_head", "embed_tokens"):
            return self.hidden + self.vocabulary
        if name not in ("gate_proj", "up_proj", "down_proj"):
            return 0
        dense = self.dense_layers if self.experts else self.layers
        total = dense * (self.hidden + (self.dense_intermediate or self.intermediate))
        if self.experts and self.adapted_experts:
            total += (self.layers - dense) * self.experts * (self.hidden + 2 * self.intermediate)
        return total

    @property
    def _matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def _embeddings(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def _attention(self) -> int:
        query, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return 2 * self.hidden * (query + keys) + (query + 2 * keys if self.biases else 0) + 2 * self.hidden

    @property
    def _forward(self) -> int:
        dense = self.dense_layers if self.experts else self.layers
        width = self.dense_intermediate or self.intermediate
        sparse = self.experts * (self._matrices * self.intermediate + 1)
        return self.hidden * (dense * self._matrices * width + (self.layers - dense) * sparse)


def shape_from_config(config: Mapping[str, Any], *, parameters: int | None = None) -> Shape | None:
    """Read a `config.json` of Transformers; None when it does not describe a language model as known here.

    `parameters` are those that the files of the weights hold, if that is known.
    """
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, Mapping) else dict(config)
    kind = str(values.get("model_type", ""))
    hidden, layers = _number(values, "hidden_size", "n_embd"), _number(values, "num_hidden_layers", "n_layer")
    heads = _number(values, "num_attention_heads", "n_head") or (8 if kind.startswith("gemma3") else 0)
    vocabulary = _number(values, "vocab_size") or (262_208 if kind.startswith("gemma3") else 0)
    if not (hidden and layers and heads and vocabulary):
        return None
    experts = _number(values, "num_experts", "num_local_experts", "n_routed_experts")
    wide = _number(values, "intermediate_size", "n_inner") or 4 * hidden
    narrow = (_number(values, "moe_intermediate_size") or wide) if experts else wide
    shared = _number(values, "n_shared_experts") if experts else 0
    default_kv = 4 if kind.startswith("gemma3") else heads
    default_head = 256 if kind.startswith("gemma") else hidden // heads
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_number(values, "num_key_value_heads") or default_kv,
        head_size=_number(values, "head_dim") or default_head,
        intermediate=narrow,
        vocabulary=vocabulary,
        tied=bool(values.get("tie_word_embeddings", kind in _TIED)),
        gated=kind not in _UNGATED,
        experts=experts + shared,
        experts_per_token=(_number(values, "num_experts_per_tok") or 2) + shared if experts else 0,
        dense_layers=_number(values, "first_k_dense_replace") if experts else 0,
        dense_intermediate=wide if experts and _number(values, "first_k_dense_replace") else 0,
        biases=kind in _BIASED or bool(values.get("attention_bias")),
        other=_image_encoder(config.get("vision_config")),
        eager_attention=kind in _EAGER,
        adapted_experts=kind not in _UNADAPTED_EXPERTS,
        counted=parameters,
        longest=_number(values, "max_position_embeddings", "n_positions") or None,
        quantized=_is_quantized(config.get("quantization_config")),
    )


def shape_from_name(model: str) -> Shape | None:
    """The usual shape of a model whose name tells its size; None when it does not."""
    billions = billions_in(model)
    if billions is None:
        return None
    usual = min(_USUAL, key=lambda shape: abs(math.log(shape.parameters / (billions * 1e9))))
    return replace(usual, counted=round(billions * 1e9), source="name")


def billions_in(model: str) -> float | None:
    """Billions of parameters by the name of a model: the largest size in it, experts counted in full."""
    path = PurePosixPath(model)
    name = path.parent.name if path.name.startswith("checkpoint-") else path.name
    if _JOB_ID.fullmatch(name):
        return None
    sizes = [
        float(size) * int(experts or 1) * (1 if unit in "bB" else 0.001)
        for experts, size, unit in _SIZE.findall(name)
    ]
    return max(sizes, default=None) or None


def shape_of_folder(folder: Path) -> Shape | None:
    """The shape of a model on this machine; None when its configuration says too little."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    return shape_from_config(config, parameters=parameters_in(folder))


def parameters_in(folder: Path) -> int | None:
    """Parameters by the headers of the safetensors files; None when there are none, or packed weights."""
    try:
        headers = [_header(path) for path in sorted(folder.glob("*.safetensors"))]
        return parameters_of(headers)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        return None


def parameters_of(headers: list[dict[str, Any]]) -> int | None:
    """Parameters by the headers of all safetensors files of a model; None for packed weights."""
    tensors = [each for header in headers for name, each in header.items() if name != "__metadata__"]
    if any(each["dtype"] not in _FLOAT_TYPES for each in tensors):
        return None
    return sum(math.prod(each["shape"]) for each in tensors) or None


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _HEADER_LIMIT:
            raise ValueError(f"{str(path)!r} is no safetensors file")
        return dict(json.loads(file.read(length)))


def _number(values: Mapping[str, Any], *names: str) -> int:
    """The first of these that is a sensible number; 0 when none is."""
    for name in names:
        value = values.get(name)
        if type(value) is int and 0 < value < 1e9:
            return value
    return 0


def _is_quantized(config: Any) -> bool:
    """Weights that stay in 4 bits while training; others, such as MXFP4, are unpacked for it."""
    return isinstance(config, Mapping) and config.get("load_in_4bit") is True


def _image_encoder(config: Any) -> int:
    if not isinstance(config, Mapping):
        return 0
    hidden, wide = _number(config, "hidden_size"), _number(config, "intermediate_size")
    return _number(config, "num_hidden_layers") * (4 * hidden * hidden + 2 * hidden * wide)


def _usual(hidden: int, layers: int, heads: int, kv_heads: int, wide: int, *, tied: bool = False) -> Shape:
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=hidden // heads if hidden < 1024 else 128,
        intermediate=wide,
        vocabulary=49_152 if hidden < 800 else 151_936,
        tied=tied,
    )


# As dense models of these sizes are made; what a size in a name is completed with.
_USUAL = (
    _usual(576, 30, 9, 3, 1536, tied=True),
    _usual(896, 24, 14, 2, 4864, tied=True),
    _usual(1536, 28, 12, 2, 8960, tied=True),
    _usual(2560, 36, 32, 8, 9728, tied=True),
    _usual(4096, 36, 32, 8, 12288),
    _usual(5120, 48, 40, 8, 13824),
    _usual(5120, 64, 64, 8, 25600),
    _usual(8192, 80, 64, 8, 29568),
)
