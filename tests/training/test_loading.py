"""Which model and tokenizer are loaded, in which numbers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.training import job
from openweights_prefect.jobs.training.arguments import choose
from openweights_prefect.jobs.training.loading import compute_dtype, load_model, load_result, weights_dtype
from openweights_prefect.jobs.training.results import save_result
from tests.training.tiny import small_params


def test_an_adapter_is_what_peft_makes_of_the_settings(workdir: Path) -> None:
    """Its layers, its rank and its scale are those that were asked for."""
    model = load_model(small_params(r=4, lora_alpha=12, target_modules=["q_proj"]), "cpu").model
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.r == {"default": 4}
    assert layer.scaling["default"] == pytest.approx(12 / 4**0.5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".q_proj.lora_" in name for name in trained)


def test_an_adapter_is_trained_further_or_merged(workdir: Path) -> None:
    """With `is_peft` that adapter goes on; without, its base has it merged. Its base is found beside it."""
    model, tokenizer = load_model(small_params(), "cpu")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[5, 6, 7]])
    wanted = model(input_ids=ids).logits
    result = save_result(model, tokenizer, small_params(), workdir / "uploads")
    (workdir / "model").rename(workdir / "base")
    shutil.copytree(result, workdir / "model")

    again = load_model(small_params(r=64), "cpu").model
    assert isinstance(again, PeftModel)
    assert again.peft_config["default"].r == 8
    assert all(p.requires_grad for name, p in again.named_parameters() if ".lora_" in name)
    assert torch.allclose(again(input_ids=ids).logits, wanted, atol=1e-6)
    merged = load_model(small_params(is_peft=False), "cpu").model
    assert isinstance(merged, transformers.LlamaForCausalLM)
    assert torch.allclose(merged(input_ids=ids).logits, wanted, atol=1e-4)
    kept = load_result(small_params(), "cpu", result).model
    assert torch.allclose(kept(input_ids=ids).logits, wanted, atol=1e-6)


def test_an_adapter_without_its_base_is_refused(workdir: Path) -> None:
    """The error names the base."""
    (workdir / "model").unlink()
    (workdir / "model").mkdir()
    config = {"base_model_name_or_path": "./elsewhere", "peft_type": "LORA"}
    (workdir / "model/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidParameterError, match=r"is an adapter of '\./elsewhere', which is not here"):
        load_model(small_params(), "cpu")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"load_in_4bit": True}, "load_in_4bit=True needs an NVIDIA GPU and bitsandbytes"),
        ({"target_modules": ["nowhere"]}, r"target_modules=\['nowhere'\]: "),
        ({"model": "./missing"}, r"The model '\./missing' cannot be loaded: "),
        ({"model": "nobody/nothing"}, "The model 'nobody/nothing' cannot be loaded: "),
    ],
)
def test_what_cannot_be_loaded_is_told_in_a_line(workdir: Path, values: dict[str, Any], reason: str) -> None:
    """With the value and what to do."""
    with pytest.raises(InvalidParameterError, match=reason) as caught:
        load_model(small_params(**values), "cpu")
    assert "\n" not in str(caught.value)


def test_the_code_of_a_model_is_never_run(workdir: Path) -> None:
    """A model that needs its own is refused."""
    folder = workdir / "foreign"
    shutil.copytree((workdir / "model").resolve(), folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="foreign", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(workdir / 'ran')!r}, 'w')\n")
    with pytest.raises(InvalidParameterError, match="cannot be loaded"):
        load_model(small_params(model=str(folder)), "cpu")
    assert not (workdir / "ran").exists()


@pytest.mark.parametrize(
    ("device", "has_bf16", "values", "computed", "held"),
    [
        ("cpu", False, {}, torch.float32, torch.float32),
        ("cpu", False, {"dtype": "float16"}, torch.float32, torch.float32),
        ("cpu", False, {"dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ("cuda", True, {}, torch.bfloat16, torch.bfloat16),
        ("cuda", False, {}, torch.float16, torch.float16),
        ("cuda", True, {"is_peft": False}, torch.bfloat16, torch.float32),
        ("cuda", True, {"is_peft": False, "dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ("cuda", False, {"is_peft": False}, torch.float16, torch.float32),
        ("cuda", True, {"dtype": "float32"}, torch.float32, torch.float32),
    ],
)
def test_numbers(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    has_bf16: bool,
    values: dict[str, Any],
    computed: Any,
    held: Any,
) -> None:
    """16 bits on a GPU, but not for weights that are all trained."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert compute_dtype(small_params(**values), device) == computed
    assert weights_dtype(small_params(**values), device) == held


def test_wishes_that_are_not_granted_are_noted(workdir: Path) -> None:
    """Each with what happens instead."""
    params = small_params(optim="adamw_8bit", packing=True, dtype="float16")
    choices = choose(params, load_model(params, "cpu").model, "cpu", kind="fine_tuning")
    assert choices.optimizer == "adamw_torch"
    assert choices.packing is False
    assert [note.split(" ")[0] for note in choices.notes] == [
        "optim='adamw_8bit'",
        "dtype='float16'",
        "packing",
    ]


def test_too_little_memory_names_what_to_lower() -> None:
    """The three parameters that it depends on, with their values."""
    text = str(job.out_of_memory(small_params(per_device_train_batch_size=16, max_seq_length=4096)))
    assert "per_device_train_batch_size=16" in text
    assert "max_seq_length=4096" in text
    assert "load_in_4bit=True" in text
    assert "set load_in_4bit" not in str(job.out_of_memory(small_params(load_in_4bit=True)))
