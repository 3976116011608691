"""Parameters of fine-tuning jobs."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from openweights_prefect.jobs.fine_tuning.params import FineTuningParams, requires_vram_gb

FILE = "conversations:file-0123456789ab"


def make(**values: Any) -> FineTuningParams:
    return FineTuningParams(**{"model": "org/name", "training_file": FILE, "loss": "sft", **values})


def error(**values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        make(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        (1e-4, 1e-4),
        ("1e-4", 1e-4),
        (-4, 1e-4),
        ("-4", 1e-4),
        (-4.0, 1e-4),
        ("-4.5", 10**-4.5),
        (1, 1.0),
        (" 2e-5 ", 2e-5),
    ],
)
def test_learning_rate_is_a_number_or_a_negative_exponent(written: object, parsed: float) -> None:
    """All spellings of a learning rate become the same number, and so the same job."""
    assert make(learning_rate=written).learning_rate == parsed


@pytest.mark.parametrize(
    "written",
    [
        0,
        0.0,
        "0",
        -1e-4,
        "nan",
        float("nan"),
        float("inf"),
        2,
        -13,
        True,
        None,
        [],
        "",
        "__import__('os').getpid()",
    ],
)
def test_a_bad_learning_rate_is_refused_and_never_evaluated(written: object) -> None:
    """The message shows the value and how to write one."""
    message = error(learning_rate=written)
    assert repr(written) in message
    assert "such as 1e-4" in message


def test_an_unknown_parameter_is_refused_with_the_nearest_name() -> None:
    """A typing error costs one look, not one training run."""
    assert "Unknown parameter 'epoch'. Did you mean 'epochs'?" in error(epoch=3)
    assert "Unknown parameter 'zzz'. Remove it." in error(zzz=3)


@pytest.mark.parametrize(
    "values",
    [
        {"r": 0},
        {"epochs": -1},
        {"per_device_train_batch_size": 0},
        {"max_seq_length": -5},
        {"lora_dropout": 1.5},
        {"warmup_steps": 0.1},
        {"weight_decay": -1},
        {"max_steps": 0},
        {"save_steps": 0},
        {"seed": -1},
        {"beta": 0},
        {"optim": "adamax"},
        {"lr_scheduler_type": "steep"},
        {"job_id_suffix": "../a b"},
        {"test_file_eval_steps": 0},
        {"test_file_eval_steps": 1.5},
        {"test_file_eval_strategy": "often"},
        {"eval_every_n_steps": 0},
        {"output_dir": "../out"},
        {"output_dir": "/out"},
        {"output_dir": "."},
        {"output_dir": "uploads/x"},
    ],
)
def test_every_number_and_choice_has_a_range(values: dict[str, Any]) -> None:
    """Values outside of it are refused before anything is submitted."""
    assert next(iter(values)) in error(**values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"loss": "dpo"}, "loss='dpo' is not available yet"),
        ({"loss": "orpo"}, "loss='orpo' is not available yet"),
        ({"loss": "kto"}, "'sft', 'dpo' or 'orpo'"),
        ({"push": True}, "Pushing to Hugging Face is not available yet"),
        ({"finetuned_model_id": "me/model"}, "Pushing to Hugging Face is not available yet"),
        ({"finetuned_model_id": "model", "push": False}, "is not a Hugging Face id"),
        ({"finetuned_model_id": "None/model", "push": False}, "is not an organization"),
        ({"logp_callback_datasets": {"a": FILE}}, "Callbacks are not available yet"),
        ({"sampling_callbacks": [{"dataset": FILE}]}, "Callbacks are not available yet"),
        ({"training_file": "train.jsonl"}, "is not a file id. Upload the file"),
        ({"training_file": "preference:file-0123456789ab"}, "has the wrong purpose for sft"),
        ({"test_file": "result:file-0123456789ab"}, "has the wrong purpose for sft"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    """Accepted names whose work does not exist yet fail at once, not on a pod."""
    assert reason in error(**values)


@pytest.mark.parametrize(
    "model",
    [
        "org/name",
        "gpt2",
        "org/name/checkpoint-10",
        "ftjob-0123456789ab",
        "model",
        "./smollm2",
        "/data/my model",
        "~/m",
    ],
)
def test_a_model_is_a_hub_id_a_job_or_a_folder(model: str) -> None:
    """All forms pass unchanged."""
    assert make(model=model).model == model


@pytest.mark.parametrize(
    "model", ["", "a/b/c", "../up", "./a/../../b", "https://hub/x", "a b", "a//b", "a\nb"]
)
def test_anything_else_is_not_a_model(model: str) -> None:
    """The message names the field."""
    assert "model" in error(model=model)


def test_defaults_are_those_of_openweights_except_for_pushing() -> None:
    """Results stay here unless a place to push to is named."""
    params = make()
    assert (params.r, params.lora_alpha, params.epochs, params.learning_rate) == (16, 16, 1, 1e-4)
    assert (params.seed, params.optim, params.save_steps, params.warmup_steps) == (
        3407,
        "adamw_8bit",
        5000,
        5,
    )
    assert (params.finetuned_model_id, params.push) == (None, None)


def test_stored_parameters_validate_again_to_the_same() -> None:
    """What the ledger holds, or the form of Prefect sends, is the same job."""
    params = make(learning_rate=-4, meta={"a": [1, None]}, test_file=FILE, test_file_eval_steps=0.5)
    assert FineTuningParams.model_validate_json(params.model_dump_json()) == params


def test_every_field_is_described_for_the_form() -> None:
    """The form that Prefect makes of the schema explains each field."""
    properties = FineTuningParams.model_json_schema()["properties"]
    assert [
        name for name, field in properties.items() if not field.get("description", "").endswith(".")
    ] == []


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
        ("unsloth/Llama-3.1-70B-bnb-4bit", 60, 80),
        ("./smollm2", 24, 24),
        ("microsoft/phi-4", 24, 24),
        ("7b-lab/unnamed", 24, 24),
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
        requires_vram_gb(make(model="a/b-8B", **values))
        for values in ({}, {"is_peft": False}, {"load_in_4bit": True})
    )
    assert small < adapter < full
