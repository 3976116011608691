"""Results: whole, finite, loadable by name, and the same function that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from openweights_prefect.jobs.training import results
from openweights_prefect.jobs.training.results import BrokenResultError

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
LAYERS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(vocab={chr(97 + n): n for n in range(26)} | {"<end>": 26}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    made.chat_template = TEMPLATE
    return made


def base_model(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=tied, dtype=dtype, **sizes)
    return LlamaForCausalLM(config).to(dtype)


def trained(base: Any, *, layers: list[str] = LAYERS, **more: Any) -> PeftModel:
    """An adapter that changes what the model says."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=layers, **more))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    return model.eval()


def asked(model: str = "org/base") -> Any:
    return SimpleNamespace(model=model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def reloaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def test_an_adapter_loads_and_gives_the_same_logits(tmp_path: Path, tokenizer: Any) -> None:
    """With the tokenizer, its chat template and the name of the model that was asked for."""
    model = trained(base_model())
    folder = results.save_result(model, tokenizer, asked(), tmp_path / "uploads")
    assert folder == tmp_path / "uploads" / "adapter"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".md"))]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    again = PeftModel.from_pretrained(base_model(), folder)
    assert torch.equal(logits(again), logits(model))
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_adapter_of_the_embedding_is_complete(tmp_path: Path, tokenizer: Any) -> None:
    model = trained(base_model(), layers=["embed_tokens", "q_proj"])
    folder = results.save_result(model, tokenizer, asked(), tmp_path / "uploads")
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), folder)), logits(model))


def test_an_adapter_of_an_adapter_names_the_model_below(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training that went on with the result of another job."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    folder = results.save_result(trained(base_model()), tokenizer, asked("model"), tmp_path / "uploads")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_model_is_saved_whole(tmp_path: Path, tokenizer: Any, tied: bool) -> None:
    model = base_model(tied=tied)
    folder = results.save_result(model, tokenizer, asked(), tmp_path / "uploads")
    assert folder == tmp_path / "uploads" / "model"
    assert torch.equal(logits(reloaded(folder)), logits(model))


def test_a_result_replaces_an_older_one(tmp_path: Path, tokenizer: Any) -> None:
    """Nothing of the older one, and nothing half-written, stays."""
    old = tmp_path / "uploads" / "adapter"
    old.mkdir(parents=True)
    (old / "stale.safetensors").touch()
    (tmp_path / "adapter.unfinished").mkdir()
    (tmp_path / "adapter.unfinished" / "torn.safetensors").write_bytes(b"x")
    folder = results.save_result(trained(base_model()), tokenizer, asked(), tmp_path / "uploads")
    assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_is_the_trained_function(
    tmp_path: Path, tokenizer: Any, dtype: torch.dtype, tied: bool
) -> None:
    """In the dtype of its base, whatever the adapter's was."""
    model = trained(base_model(tied=tied, dtype=dtype))
    exact = trained(base_model(tied=tied, dtype=dtype)).to(torch.float32)
    folder = results.save_merged(model, tokenizer, tmp_path / "merged")
    merged = reloaded(folder)
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert merged.config.tie_word_embeddings is tied
    close = 1e-5 if dtype is torch.float32 else 0.02
    assert difference(logits(merged), logits(exact)) < close
    assert difference(logits(merged), logits(base_model(tied=tied, dtype=dtype))) > 5 * close


@pytest.mark.parametrize(
    "wish",
    [
        {"layers": ["q_proj", "lm_head"]},
        {"layers": ["q_proj", "embed_tokens"]},
        {"layers": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lm_head", "embed_tokens", "saved"],
)
def test_merging_one_of_two_tied_layers_leaves_the_other(tmp_path: Path, tokenizer: Any, wish: Any) -> None:
    """The merged model is untied, for its embedding and its head now differ."""
    model = trained(base_model(tied=True), **wish)
    if "modules_to_save" in wish:
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    before = logits(model)
    merged = reloaded(results.save_merged(model, tokenizer, tmp_path / "merged"))
    assert merged.config.tie_word_embeddings is False
    assert difference(logits(merged), before) < 1e-5


def test_sums_are_rounded_once() -> None:
    """A merged weight is the nearest bfloat16 to the exact sum."""
    model = trained(base_model(dtype=torch.bfloat16), layers=["q_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
    merged = results.merge(model).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, exact.to(torch.bfloat16))


def test_a_quantized_base_is_dequantized(tmp_path: Path, tokenizer: Any) -> None:
    """The merged model has the weights that the adapter was trained against, not those before."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base_model().save_pretrained(tmp_path / "base")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        device_map={"": "cpu"},
        dtype=torch.float32,
    )
    model = trained(quantized)
    before = logits(model)
    merged = reloaded(results.save_merged(model, tokenizer, tmp_path / "merged"))
    assert "quantization_config" not in merged.config.to_dict()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    assert difference(logits(merged), before) < 1e-4
    assert difference(logits(trained(base_model())), before) > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_never_handed_out(
    tmp_path: Path, tokenizer: Any, value: float
) -> None:
    model = trained(base_model())
    next(each for name, each in model.named_parameters() if "lora_B" in name).data[0, 0] = value
    with pytest.raises(BrokenResultError, match=r"lora_B.*not finite.*learning_rate"):
        results.save_result(model, tokenizer, asked(), tmp_path / "uploads")
    with pytest.raises((BrokenResultError, ValueError)):
        results.save_merged(model, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "uploads").exists()
    assert not (tmp_path / "merged").exists()


def test_shards_are_listed_and_checked(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large models are split; a missing shard is noticed."""
    monkeypatch.setattr(results, "_SHARD_SIZE", "100KB")
    folder = results.save_result(base_model(), tokenizer, asked(), tmp_path / "uploads")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert results.verify(folder) == sum(each.numel() for each in base_model().parameters())
    assert torch.equal(logits(reloaded(folder)), logits(base_model()))
    shards[0].unlink()
    with pytest.raises(BrokenResultError, match=r"model\.safetensors\.index\.json"):
        results.verify(folder)


def test_a_truncated_file_is_noticed(tmp_path: Path, tokenizer: Any) -> None:
    """As a full disk leaves it."""
    folder = results.save_result(trained(base_model()), tokenizer, asked(), tmp_path / "uploads")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BrokenResultError, match="cannot be read back"):
        results.verify(folder)
    weights.unlink()
    with pytest.raises(BrokenResultError, match="No weights"):
        results.verify(folder)


class Agent:
    """Stands for the run: keeps what is uploaded and logged, and gives it back."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        self.events: list[dict[str, Any]] = []
        self.flushed = 0

    def upload(self, path: Path, name: str) -> str:
        file_id = f"result:{len(self.stored)}"
        self.stored[file_id] = path.read_bytes()
        self.log({"path": name, "file": file_id})
        return file_id

    def log(self, data: dict[str, Any]) -> None:
        self.events.append({"data": data})
        self.flushed = 0

    def flush(self) -> None:
        self.flushed = len(self.events)

    def content(self, file_id: str) -> bytes:
        return self.stored[file_id]


def test_a_kept_result_comes_back_in_another_run(tmp_path: Path, tokenizer: Any) -> None:
    """File by file the same; the events of the run name every file."""
    agent: Any = Agent()
    first = results.save_result(trained(base_model()), tokenizer, asked(), tmp_path / "one" / "uploads")
    results.keep_result(agent, first)
    assert agent.flushed == len(agent.events)
    assert "adapter/adapter_model.safetensors" in [event["data"].get("path") for event in agent.events]
    again = results.restore_result(agent.events, agent, tmp_path / "two" / "uploads")
    assert again == tmp_path / "two" / "uploads" / "adapter"
    files = [path.relative_to(first) for path in first.rglob("*")]
    assert sorted(path.relative_to(again) for path in again.rglob("*")) == sorted(files)
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_nothing_is_restored_when_the_run_ended_before_all_was_kept(tmp_path: Path) -> None:
    agent: Any = Agent()
    agent.log({"path": "adapter/adapter_model.safetensors", "file": "result:0"})
    assert results.restore_result(agent.events, agent, tmp_path / "uploads") is None


def test_a_kept_result_that_is_damaged_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    agent: Any = Agent()
    folder = results.save_result(trained(base_model()), tokenizer, asked(), tmp_path / "one" / "uploads")
    results.keep_result(agent, folder)
    for file_id, content in agent.stored.items():
        agent.stored[file_id] = content[:100]
    with pytest.raises(BrokenResultError):
        results.restore_result(agent.events, agent, tmp_path / "two" / "uploads")
    assert not (tmp_path / "two" / "uploads").exists()


def test_only_safetensors_are_written(tmp_path: Path, tokenizer: Any) -> None:
    """And what is in them is what the index says: plain tensors, no code."""
    folder = results.save_result(base_model(), tokenizer, asked(), tmp_path / "uploads")
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert "model.embed_tokens.weight" in tensors.keys()  # noqa: SIM118
