"""GPU memory: published models have their published sizes, and estimates follow what is held."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.jobs.fine_tuning.params import FineTuningParams
from openweights_prefect.jobs.logprob.params import LogprobParams
from openweights_prefect.jobs.memory import Workload, estimate, requires_vram_gb
from openweights_prefect.jobs.model_shape import Shape, shape_from_config, shape_from_name, shape_of_folder

FILE = "conversations:file-0123456789ab"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(
    kind: str, hidden: int, wide: int, layers: int, heads: int, kv: int, vocabulary: int, **further: Any
) -> dict[str, Any]:
    """What a `config.json` says."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32_768,
        **further,
    }


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
EXPERTS_128 = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
EXPERTS_8 = {"num_local_experts": 8, "num_experts_per_tok": 2}
EXPERTS_32 = {"num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 64, "attention_bias": True}
VISION = {"vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}}
# What the pages of these models say, and what their configurations leave to defaults.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M": (config("llama", 576, 1536, 30, 9, 3, 49_152, **TIED), 134_515_008),
    "Qwen2.5-0.5B": (config("qwen2", 896, 4864, 24, 14, 2, 151_936, **TIED), 494_032_768),
    "Qwen2.5-1.5B": (config("qwen2", 1536, 8960, 28, 12, 2, 151_936, **TIED), 1_543_714_304),
    "Qwen2.5-3B": (config("qwen2", 2048, 11_008, 36, 16, 2, 151_936, **TIED), 3_085_938_688),
    "Qwen2.5-7B": (config("qwen2", 3584, 18_944, 28, 28, 4, 152_064, **UNTIED), 7_615_616_512),
    "Qwen2.5-14B": (config("qwen2", 5120, 13_824, 48, 40, 8, 152_064, **UNTIED), 14_770_033_664),
    "Qwen2.5-32B": (config("qwen2", 5120, 27_648, 64, 40, 8, 152_064, **UNTIED), 32_763_876_352),
    "Qwen2.5-72B": (config("qwen2", 8192, 29_568, 80, 64, 8, 152_064, **UNTIED), 72_706_203_648),
    "Qwen3-4B": (config("qwen3", 2560, 9728, 36, 32, 8, 151_936, head_dim=128, **TIED), 4_022_468_096),
    "Qwen3-8B": (config("qwen3", 4096, 12_288, 36, 32, 8, 151_936, head_dim=128, **UNTIED), 8_190_735_360),
    "Qwen3-32B": (config("qwen3", 5120, 25_600, 64, 64, 8, 151_936, head_dim=128, **UNTIED), 32_762_123_264),
    "Qwen3-30B-A3B": (
        config("qwen3_moe", 2048, 6144, 48, 32, 4, 151_936, head_dim=128, **EXPERTS_128, **UNTIED),
        30_532_122_624,
    ),
    "Llama-3.1-8B": (config("llama", 4096, 14_336, 32, 32, 8, 128_256, **UNTIED), 8_030_261_248),
    "Llama-3.1-70B": (config("llama", 8192, 28_672, 80, 64, 8, 128_256, **UNTIED), 70_553_706_496),
    "gemma-2-2b": (config("gemma2", 2304, 9216, 26, 8, 4, 256_000, head_dim=256), 2_614_341_888),
    "gemma-2-9b": (config("gemma2", 3584, 14_336, 42, 16, 8, 256_000, head_dim=256), 9_241_705_984),
    "gemma-2-27b": (config("gemma2", 4608, 36_864, 46, 32, 16, 256_000, head_dim=128), 27_227_128_320),
    "gemma-3-1b": (config("gemma3_text", 1152, 6912, 26, 4, 1, 262_144, head_dim=256), 999_885_952),
    "gemma-3-4b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "hidden_size": 2560,
                "intermediate_size": 10_240,
                "num_hidden_layers": 34,
            },
            **VISION,
        },
        4_300_079_472,
    ),
    "Mistral-7B": (config("mistral", 4096, 14_336, 32, 32, 8, 32_000, **UNTIED), 7_241_732_096),
    "Mixtral-8x7B": (
        config("mixtral", 4096, 14_336, 32, 32, 8, 32_000, **EXPERTS_8, **UNTIED),
        46_702_792_704,
    ),
    "gpt-oss-20b": (
        config("gpt_oss", 2880, 2880, 24, 64, 8, 201_088, **EXPERTS_32, **UNTIED),
        20_914_757_184,
    ),
}


def shape(name: str) -> Shape:
    found = shape_from_config(PUBLISHED[name][0])
    assert found is not None
    return found


def work(**values: Any) -> Workload:
    return Workload(**{"target_modules": SEVEN, **values})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name: str) -> None:
    """Counted from the configuration alone: grouped queries, tied embeddings, experts, an image encoder."""
    assert shape(name).parameters == pytest.approx(PUBLISHED[name][1], rel=0.02)


def test_of_the_experts_only_the_chosen_are_active() -> None:
    """Which decides about time, not about memory."""
    assert shape("Qwen3-30B-A3B").active_parameters == pytest.approx(3.3e9, rel=0.05)
    assert shape("Mixtral-8x7B").active_parameters == pytest.approx(12.9e9, rel=0.05)
    assert shape("Qwen3-8B").active_parameters == shape("Qwen3-8B").parameters


@pytest.mark.parametrize(("name", "expected"), [("Qwen3-8B", 43_646_976), ("Llama-3.1-8B", 41_943_040)])
def test_adapters_have_the_size_that_peft_prints(name: str, expected: int) -> None:
    """Rank 16 on all seven linear layers."""
    assert estimate(shape(name), work()).adapters_gb == pytest.approx(4 * expected / 1e9)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", [1, 8, 16, 64, 256]),
        ("length", [128, 1024, 2048, 8192, 65_536]),
        ("batch_size", [1, 2, 3, 8, 64]),
        ("sampled_tokens", [0, 1000, 100_000]),
        ("optim", ["sgd", "adamw_8bit", "adamw_torch"]),
        ("load_in_4bit", [True, False]),
        ("is_peft", [True, False]),
        ("loss", ["sft", "weighted", "dpo"]),
    ],
)
def test_more_never_needs_less(name: str, field: str, values: list[Any]) -> None:
    totals = [estimate(shape(name), work(**{field: value})).total_gb for value in values]
    assert totals == sorted(totals)


def test_the_parts_of_an_estimate() -> None:
    """LoRA on 8 billion weights in 16 bits: they dominate; in 4 bits they do not."""
    whole = estimate(shape("Llama-3.1-8B"), work())
    assert whole.source == "config"
    assert whole.weights_gb == pytest.approx(16.06, abs=0.01)
    assert whole.total_gb == pytest.approx(
        sum(getattr(whole, name) for name in vars(whole) if name.endswith("_gb")) - whole.kv_cache_gb
    )
    assert 20 < whole.total_gb < 26
    assert 9 < estimate(shape("Llama-3.1-8B"), work(load_in_4bit=True)).total_gb < 14
    full = estimate(shape("Llama-3.1-8B"), work(is_peft=False, optim="adamw_torch", dtype="bfloat16"))
    assert full.gradients_gb == pytest.approx(16.06, abs=0.01)
    assert full.optimizer_gb == pytest.approx(32.12, abs=0.01)


def test_preferences_hold_all_scores_of_twice_the_rows() -> None:
    """SFT takes them in pieces."""
    sft, dpo = (estimate(shape("Qwen3-8B"), work(loss=loss)) for loss in ("sft", "dpo"))
    assert dpo.activations_gb == pytest.approx(2 * sft.activations_gb)
    assert dpo.logits_gb > 5 * sft.logits_gb
    assert estimate(shape("Qwen3-8B"), work(target_modules=("lm_head",))).logits_gb > sft.logits_gb


def test_sampling_counts_where_it_holds_more_than_a_step() -> None:
    """Its cache is not there at the same time as the activations."""
    none, some, much = (
        estimate(shape("Qwen3-8B"), work(sampled_tokens=tokens)) for tokens in (0, 1000, 500_000)
    )
    assert none.total_gb == some.total_gb < much.total_gb
    # 36 layers, 8 heads of 128, keys and values in 16 bits.
    assert some.kv_cache_gb == pytest.approx(1000 * 2 * 36 * 8 * 128 * 2 / 1e9)


def make(**values: Any) -> FineTuningParams:
    return FineTuningParams(**{"model": "org/m-8B", "training_file": FILE, "loss": "sft", **values})


@pytest.mark.parametrize(
    ("model", "least", "most"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 7, 12),
        ("Qwen/Qwen3.5-0.8B", 6, 8),
        ("google/gemma-3-270m-it", 6, 6),
        ("meta-llama/Llama-3.1-8B-Instruct/checkpoint-10", 20, 32),
        ("me/Llama-3.1-8B-ftjob-0123456789ab", 20, 32),
        ("mistralai/Mixtral-8x7B-v0.1", 120, 160),
        ("Qwen/Qwen3-30B-A3B", 70, 90),
        ("unsloth/Llama-3.1-70B-bnb-4bit", 48, 70),
        ("./smollm2", 24, 24),
        ("microsoft/phi-4", 24, 24),
        ("7b-lab/unnamed", 24, 24),
        ("org/nothing-0B", 24, 24),
        ("ftjob-12345678901b", 24, 24),
        ("ftjob-0123456789ab-7b", 24, 24),
    ],
)
def test_memory_is_estimated_from_the_size_in_the_name(model: str, least: int, most: int) -> None:
    """Versions, active experts, quantization widths and job ids are not sizes; unknown is 24 GB."""
    assert least <= requires_vram_gb(make(model=model)) <= most


def test_full_training_needs_more_memory_and_quantization_less() -> None:
    """The estimate follows what is kept on the GPU."""
    adapter, full, small = (
        requires_vram_gb(make(**values)) for values in ({}, {"is_peft": False}, {"load_in_4bit": True})
    )
    assert small < adapter < full
    assert requires_vram_gb(LogprobParams(model="a/b-8B", dataset=FILE, batch_size=2)) <= adapter


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_name_tells_nearly_what_the_configuration_tells(name: str) -> None:
    """Experts that are smaller than their name says, aside."""
    named = shape_from_name(f"org/{name}")
    assert named is not None
    assert named.source == "name"
    exact, guessed = (estimate(each, work()).total_gb for each in (shape(name), named))
    assert guessed == pytest.approx(exact, rel=0.35, abs=1.5)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "",
        '{"hidden_size": "x"}',
        '{"hidden_size": 1e99, "num_hidden_layers": true}',
        "[" * 100_000,
    ],
)
def test_a_configuration_that_says_nothing(tmp_path: Path, text: str) -> None:
    """Is no error, but no shape."""
    (tmp_path / "config.json").write_text(text)
    assert shape_of_folder(tmp_path) is None
    nothing = estimate(None, work())
    assert (nothing.source, nothing.weights_gb, nothing.parameters) == ("unknown", 0, None)
    assert nothing.requires_vram_gb == 24


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    header = {name: {"dtype": dtype, "shape": size} for name, (dtype, size) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def test_the_headers_of_the_weights_count(tmp_path: Path) -> None:
    """Where they tell sizes; weights packed into bytes are counted from the configuration."""
    values = PUBLISHED["SmolLM2-135M"][0]
    (tmp_path / "config.json").write_text(json.dumps(values))
    by_config = shape_of_folder(tmp_path)
    safetensors(tmp_path / "model-1.safetensors", {"a": ("BF16", [1000, 3]), "b": ("F32", [7])})
    safetensors(tmp_path / "model-2.safetensors", {"c": ("BF16", [1000, 997])})
    found = shape_of_folder(tmp_path)
    assert found is not None
    assert found.parameters == 1_000_007
    assert dataclasses.replace(found, counted=None) == by_config
    for damage in (b"", b"\xff" * 8, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 9) + b'{"a": 1}'):
        (tmp_path / "model-2.safetensors").write_bytes(damage)
        damaged = shape_of_folder(tmp_path)
        assert damaged is not None
        assert damaged.counted in (None, 3007)
    safetensors(tmp_path / "model-2.safetensors", {"c": ("U8", [1000])})
    assert shape_of_folder(tmp_path) == by_config


def test_a_quantized_repository_is_loaded_as_it_is() -> None:
    """Whatever `load_in_4bit` says."""
    values = PUBLISHED["Llama-3.1-8B"][0]
    quantized = shape_from_config({**values, "quantization_config": {"load_in_4bit": True}})
    assert estimate(quantized, work()) == estimate(shape("Llama-3.1-8B"), work(load_in_4bit=True))
