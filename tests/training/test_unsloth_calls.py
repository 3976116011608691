"""What Unsloth is called with; where it is installed, that our calls fit and train the same.

Without a GPU it imports only with `UNSLOTH_ALLOW_CPU=1` and a few answers of `torch.cuda` that this file
fakes, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from openweights_prefect.jobs.training import loading, unsloth_loading
from tests.training.tiny import REPOSITORY, small_params


def from_pretrained(
    model_name: str = "",
    max_seq_length: int = 2048,
    dtype: Any = None,
    load_in_4bit: bool = True,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    full_finetuning: bool = False,
    token: str | None = None,
    device_map: Any = "sequential",
    revision: str | None = None,
    trust_remote_code: bool = False,
    use_gradient_checkpointing: Any = "unsloth",
    use_exact_model_name: bool = False,
    fast_inference: bool = False,
    random_state: int = 3407,
    max_lora_rank: int = 64,
) -> None:
    """The documented signature, which is checked against the real one where that is."""


def get_peft_model(
    model: Any,
    r: int = 16,
    target_modules: Any = None,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    use_gradient_checkpointing: Any = "unsloth",
    random_state: int = 3407,
    use_rslora: bool = False,
    modules_to_save: Any = None,
    init_lora_weights: Any = True,
) -> None:
    """As above."""


class FakeUnsloth(ModuleType):
    """Records the calls, and refuses arguments that Unsloth does not have."""

    def __init__(self) -> None:
        super().__init__("unsloth")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.FastModel = SimpleNamespace(
            from_pretrained=self._from_pretrained, get_peft_model=self._get_peft_model
        )

    def _from_pretrained(self, **arguments: Any) -> tuple[str, SimpleNamespace]:
        inspect.signature(from_pretrained).bind(**arguments)
        self.calls.append(("from_pretrained", arguments))
        return "base", SimpleNamespace(tokenizer="tokenizer of a processor")

    def _get_peft_model(self, model: str, **arguments: Any) -> str:
        inspect.signature(get_peft_model).bind(model, **arguments)
        self.calls.append(("get_peft_model", arguments))
        return f"adapted {model}"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeUnsloth:
    unsloth = FakeUnsloth()
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return unsloth


def test_a_new_adapter(workdir: Path, fake: FakeUnsloth) -> None:
    """The exact model that was named, no foreign code, and our LoRA settings; the tokenizer is our own."""
    params = small_params(r=4, use_rslora=False, lora_dropout=0.1, seed=7, max_seq_length=99)
    loaded = loading.load_model(params, "cpu")
    assert loaded.model == "adapted base"
    assert loaded.tokenizer.chat_template
    (_, load), (_, adapt) = fake.calls
    assert load["model_name"] == "model"
    assert load["max_seq_length"] == 99
    assert load["use_exact_model_name"] is True
    assert load["trust_remote_code"] is False
    assert load["load_in_4bit"] is False
    assert load["device_map"] == {"": 0}
    assert (adapt["r"], adapt["lora_alpha"], adapt["lora_dropout"], adapt["bias"]) == (4, 16, 0.1, "none")
    assert (adapt["use_rslora"], adapt["random_state"]) == (False, 7)
    assert adapt["target_modules"] == params.target_modules


def test_unnamed_targets_are_those_that_peft_would_take(workdir: Path, fake: FakeUnsloth) -> None:
    """Left alone, Unsloth would adapt every layer."""
    loading.load_model(small_params(target_modules=None), "cpu")
    assert fake.calls[1][1]["target_modules"] == ["q_proj", "v_proj"]


def test_an_adapter_is_not_wrapped_again(workdir: Path, fake: FakeUnsloth) -> None:
    """Unsloth loads its base by itself, ready to train."""
    (workdir / "model").rename(workdir / "base")
    (workdir / "model").mkdir()
    config = {"base_model_name_or_path": "model", "peft_type": "LORA"}
    (workdir / "model/adapter_config.json").write_text(json.dumps(config))
    assert loading.load_model(small_params(), "cpu").model == "base"
    assert [name for name, _ in fake.calls] == ["from_pretrained"]


def test_all_weights_are_trained_without_it(workdir: Path, fake: FakeUnsloth) -> None:
    """The plain loader holds them in float32."""
    model = loading.load_model(small_params(is_peft=False), "cpu").model
    assert not fake.calls
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())


def test_it_is_not_asked_for_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in a job of several processes."""
    assert unsloth_loading.prepare() is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert unsloth_loading.prepare() is False


REAL = """
import os, sys
os.environ.update(UNSLOTH_ALLOW_CPU="1", UNSLOTH_COMPILE_DISABLE="1", TORCHDYNAMO_DISABLE="1")
import torch
from types import SimpleNamespace
card = SimpleNamespace(name="cpu", major=8, minor=0, total_memory=8 << 30, multi_processor_count=1)
torch.cuda.get_device_properties = lambda *_, **__: card
torch.cuda.get_device_capability = lambda *_, **__: (8, 0)
torch.cuda.get_device_name = lambda *_, **__: "cpu"
torch.cuda.current_device = lambda: "cpu"
os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
import unsloth
import inspect, json
from tests.training import test_unsloth_calls as expected
# `FastModel.get_peft_model` hands its arguments on to that of its base.
owners = {"from_pretrained": unsloth.FastModel, "get_peft_model": unsloth.FastModel.__bases__[0]}
for name, owner in owners.items():
    real = inspect.signature(getattr(owner, name)).parameters
    assert set(inspect.signature(getattr(expected, name)).parameters) <= set(real), name
from openweights_prefect.jobs.training import unsloth_loading
# Its own checkpointing needs a GPU's pinned memory.
unsloth_loading._CHECKPOINTING = False
from tests.training.test_trainers import make_trainer
from tests.training.tiny import chats, preferences, small_params, weighted, write
from pathlib import Path
rows = {"sft": chats(16), "dpo": preferences(16), "orpo": preferences(16), "weighted": weighted(16)}
found = {}
for name in rows:
    write(Path("data.jsonl"), rows[name])
    params = small_params(
        loss="sft" if name == "weighted" else name,
        max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=2,
    )
    found[name] = []
    for prepared in (True, False):
        unsloth_loading.is_prepared = lambda: prepared
        trainer = make_trainer(params, kind="weighted_sft" if name == "weighted" else "fine_tuning")
        trainer.train()
        found[name].append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
print(json.dumps(found))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None or importlib.util.find_spec("triton") is None,
    reason="Unsloth is not installed",
)
def test_the_real_one_trains_the_same(workdir: Path) -> None:
    """With every loss, the losses of each step are those of the plain loader."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", REAL], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (with_unsloth, plain) in json.loads(done.stdout.splitlines()[-1]).items():
        assert with_unsloth == pytest.approx(plain, rel=1e-4), name
