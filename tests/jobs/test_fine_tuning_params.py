"""Parameters of the jobs on language models: names, defaults, ranges, and what goes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from openweights_prefect.jobs.fine_tuning.params import FineTuningParams
from openweights_prefect.jobs.logprob.params import LogprobParams
from openweights_prefect.jobs.training.params import ModelParams
from openweights_prefect.jobs.weighted_sft.params import WeightedSftParams

FILE = "conversations:file-0123456789ab"
PAIRS = "preference:file-0123456789ab"
KINDS = (FineTuningParams, WeightedSftParams, LogprobParams)


def make(**values: Any) -> FineTuningParams:
    return FineTuningParams(**{"model": "org/name", "training_file": FILE, "loss": "sft", **values})


def weighted(**values: Any) -> WeightedSftParams:
    return WeightedSftParams(**{"model": "org/name", "training_file": FILE, **values})


def logprob(**values: Any) -> LogprobParams:
    return LogprobParams(**{"model": "org/name", "dataset": FILE, **values})


MAKERS: list[Callable[..., ModelParams]] = [make, weighted, logprob]


def error(maker: Callable[..., ModelParams] = make, **values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        maker(**values)
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
        {"eval_every_n_steps": "often"},
        {"eval_every_n_steps": 2.5},
        {"sampling_callbacks": [{"dataset": FILE, "eval_steps": 0}]},
        {"sampling_callbacks": [{"dataset": FILE, "temperature": -1}]},
        {"sampling_callbacks": [{"dataset": FILE, "max_tokens": 0}]},
        {"save_minutes": 0},
        {"save_total_limit": 0},
        {"dtype": "int8"},
        {"hf_org": "a/b"},
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
        ({"loss": "kto"}, "'sft', 'dpo' or 'orpo'"),
        ({"loss": "dpo"}, "has the wrong purpose for dpo. Upload it with purpose='preference'"),
        ({"loss": "orpo"}, "has the wrong purpose for orpo. Upload it with purpose='preference'"),
        ({"loss": "dpo", "training_file": PAIRS, "test_file": FILE}, "the wrong purpose for dpo"),
        ({"training_file": "train.jsonl"}, "is not a file id. Upload the file"),
        ({"training_file": PAIRS}, "has the wrong purpose for sft"),
        ({"test_file": "result:file-0123456789ab"}, "has the wrong purpose for sft"),
        ({"logp_callback_datasets": {"a": PAIRS}}, "has the wrong purpose for log-probabilities"),
        ({"logp_callback_datasets": {"": FILE}}, "at least 1 character"),
        ({"sampling_callbacks": [{"dataset": PAIRS}]}, "has the wrong purpose for sampling"),
        ({"sampling_callbacks": [{"dataset": FILE, "max_token": 5}]}, "Did you mean 'max_tokens'?"),
        ({"is_peft": False, "load_in_4bit": True}, "which load_in_4bit=True has quantized"),
        ({"is_peft": False, "model": "unsloth/m-bnb-4bit"}, "which model='unsloth/m-bnb-4bit' has"),
        ({"keep_best": True}, "keep_best=True needs evaluations"),
        ({"keep_best": True, "test_file": FILE, "eval_strategy": "no"}, "keep_best=True needs evaluations"),
        ({"epochs": 2, "num_train_epochs": 2}, "'epochs' and 'num_train_epochs' are one parameter"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(values: dict[str, Any], reason: str) -> None:
    """Before anything is submitted."""
    assert reason in error(**values)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_preferences_are_trained_on_and_conversations_watched(loss: str) -> None:
    """Callbacks read conversations whatever the loss is."""
    watched = {"logp_callback_datasets": {"a": FILE}, "sampling_callbacks": [{"dataset": FILE}]}
    params = make(loss=loss, training_file=PAIRS, test_file=PAIRS, load_in_4bit=True, **watched)
    assert params.sampling_callbacks is not None
    assert params.sampling_callbacks[0].eval_steps == 10


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"num_train_epochs": 3}, {"epochs": 3}),
        ({"max_length": 512}, {"max_seq_length": 512}),
        ({"per_device_eval_batch_size": 2}, {"eval_batch_size": 2}),
        (
            {"eval_steps": 0.5, "eval_strategy": "steps"},
            {"test_file_eval_steps": 0.5, "test_file_eval_strategy": "steps"},
        ),
        ({"assistant_only_loss": False}, {"train_on_responses_only": False}),
        ({"lora_r": 8, "lora_target_modules": ["q_proj"]}, {"r": 8, "target_modules": ["q_proj"]}),
        ({"use_peft": False}, {"is_peft": False}),
        ({"full_determinism": True}, {"deterministic": True}),
        ({"learning_rate": -4}, {"learning_rate": "1e-4"}),
        ({"push": True, "hf_org": "me"}, {"hf_org": "me"}),
        ({"hf_org": "me"}, {"hf_org": "me", "finetuned_model_id": "{org_id}/{model_name}-{job_id}"}),
        ({"push": False}, {"push": None}),
    ],
)
def test_two_spellings_are_one_job(values: dict[str, Any], same: dict[str, Any]) -> None:
    """TRL's and PEFT's names are accepted, and stored under ours."""
    assert make(**values).model_dump() == make(**same).model_dump()


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
    assert (params.finetuned_model_id, params.push) == (None, False)


OPENWEIGHTS: dict[str, Any] = {
    "model": "unsloth/Qwen2.5-32B-Instruct",
    "training_file": FILE,
    "test_file": FILE,
    "chat_template": "default",
    "finetuned_model_id": "{org_id}/{model_name}-{job_id}",
    "job_id_suffix": "mine",
    "max_seq_length": 2048,
    "load_in_4bit": False,
    "loss": "sft",
    "is_peft": True,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_bias": "none",
    "r": 16,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "use_rslora": True,
    "merge_before_push": True,
    "push_to_private": True,
    "epochs": 1,
    "max_steps": None,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "warmup_steps": 5,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "optim": "adamw_8bit",
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3407,
    "save_steps": 5000,
    "output_dir": "./tmp",
    "train_on_responses_only": True,
    "logp_callback_datasets": {},
    "eval_every_n_steps": 5000,
    "sampling_callbacks": None,
    "eval_batch_size": 8,
    "meta": None,
}
OF_FINE_TUNING: dict[str, Any] = {
    "model_naming_extra_parameters": None,
    "beta": 0.1,
    "packing": True,
    "test_file_eval_steps": None,
    "test_file_eval_strategy": "epoch",
}
OF_WEIGHTED_SFT: dict[str, Any] = {
    "optim": "adamw_torch",
    "eval_every_n_steps": "log",
    "ft_id_suffix": None,
}
GIVEN = {"model", "training_file", "test_file", "job_id_suffix", "finetuned_model_id", "hf_org", "push"}


@pytest.mark.parametrize(
    ("maker", "values"),
    [(make, OPENWEIGHTS | OF_FINE_TUNING), (weighted, OPENWEIGHTS | OF_WEIGHTED_SFT)],
)
def test_a_script_for_openweights_runs_with_all_its_parameters(
    maker: Callable[..., ModelParams], values: dict[str, Any]
) -> None:
    """Every name and every default is the same; only `{org_id}` has to be named."""
    params, plain = maker(**values, hf_org="me").model_dump(), maker().model_dump()
    assert {name: params[name] for name in values} == values
    assert {name: plain[name] for name in values.keys() - GIVEN} == {
        name: values[name] for name in values.keys() - GIVEN
    }
    assert params["push"]


def test_what_weighted_sft_has_not_is_unknown_there() -> None:
    """As in OpenWeights; further defaults are its own."""
    for name in OF_FINE_TUNING:
        assert f"Unknown parameter {name!r}" in error(weighted, **{name: 1})
    assert "'sft'" in error(weighted, loss="dpo")
    callbacks = weighted(sampling_callbacks=[{"dataset": FILE}]).sampling_callbacks
    assert callbacks is not None
    assert callbacks[0].eval_steps == "log"


def test_the_parameters_of_a_measurement() -> None:
    """Flat; conversations are not cut unless it is said."""
    assert logprob().model_dump() == {
        "model": "org/name",
        "dataset": FILE,
        "batch_size": 8,
        "chat_template": "default",
        "load_in_4bit": False,
        "dtype": "auto",
        "max_seq_length": None,
    }
    assert "has the wrong purpose" in error(logprob, dataset=PAIRS)
    assert "Did you mean 'batch_size'?" in error(logprob, batchsize=1)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"finetuned_model_id": "model"}, "is not a Hugging Face id. Write it as 'user/model'"),
        ({"finetuned_model_id": "model", "push": False}, "is not a Hugging Face id"),
        ({"finetuned_model_id": "a/b/c"}, "is not a Hugging Face id"),
        ({"finetuned_model_id": "None/model"}, "'None' is not an organization"),
        ({"finetuned_model_id": "me/-model"}, "'-model' is not a Hugging Face name"),
        ({"finetuned_model_id": "me/a--b"}, "'--', '..' and '.git'"),
        ({"finetuned_model_id": "me/" + "a" * 97}, "is not a Hugging Face name"),
        ({"finetuned_model_id": "me/{model}"}, "finetuned_model_id='me/org/name' (made of 'me/{model}')"),
        ({"finetuned_model_id": "me/{model_nam}"}, "`{model_nam}` is unknown; did you mean `{model_name}`?"),
        ({"finetuned_model_id": "me/{model.x}"}, "`{model.x}` is unknown"),
        ({"finetuned_model_id": "me/{seed"}, "is not a Hugging Face name"),
        ({"finetuned_model_id": "{org_id}/m"}, "`{org_id}` needs `hf_org`"),
        ({"push": True}, "`{org_id}` needs `hf_org`"),
        ({"hf_org": "unsloth"}, "'unsloth' is not an organization"),
    ],
)
def test_a_name_that_nothing_can_be_pushed_to(values: dict[str, Any], reason: str) -> None:
    """Templates are filled in before the job is submitted, and the result is a legal name."""
    assert reason in error(**values)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (make(hf_org="me"), "me/name-ftjob-1"),
        (make(finetuned_model_id="a/b"), "a/b"),
        (make(finetuned_model_id="a/{model_name}-{loss}-r{r}-{learning_rate}"), "a/name-sft-r16-0.0001"),
        (make(finetuned_model_id="a/{x}", model_naming_extra_parameters={"x": "y"}), "a/y"),
        (make(finetuned_model_id="{org_id}/b", model_naming_extra_parameters={"org_id": "me"}), "me/b"),
        (weighted(hf_org="me", ft_id_suffix="v2"), "me/name-ftjob-1-v2"),
        (make(finetuned_model_id="a/{job_id}", push=False), "a/ftjob-1"),
    ],
)
def test_the_name_that_a_template_gives(params: FineTuningParams | WeightedSftParams, name: str) -> None:
    """Placeholders are the job id, the organization, the model, any parameter, and further values."""
    repository = params.repository(params.model)
    assert repository is not None
    assert repository.of("ftjob-1") == name


def test_stored_parameters_validate_again_to_the_same() -> None:
    """What the ledger holds, or the form of Prefect sends, is the same job."""
    params = make(learning_rate=-4, meta={"a": [1, None]}, test_file=FILE, test_file_eval_steps=0.5)
    assert FineTuningParams.model_validate_json(params.model_dump_json()) == params
    for maker in (make, weighted):
        pushed = maker(hf_org="me", sampling_callbacks=[{"dataset": FILE}])
        assert type(pushed).model_validate_json(pushed.model_dump_json()) == pushed


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_described_for_the_form(kind: type[ModelParams]) -> None:
    """The form that Prefect makes of the schema explains each field, under our name, in order."""
    properties = kind.model_json_schema()["properties"]
    assert list(properties) == list(kind.model_fields)
    assert [field["position"] for field in properties.values()] == list(range(len(properties)))
    assert [
        name for name, field in properties.items() if not field.get("description", "").endswith(".")
    ] == []
