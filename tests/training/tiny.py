"""Tiny models in folders, data for them, and the parameters of a small job."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@functools.cache
def _models() -> ModuleType:
    path = REPOSITORY / "cookbook" / "fine_tuning" / "models.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_folder(folder: Path) -> Path:
    """A random Llama of 140 000 parameters; its ChatML template marks what the assistant says for TRL."""
    made: Path = _models().make("tiny", folder)
    return made


def chats(number: int) -> list[dict[str, Any]]:
    """Conversations of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + 1?" + " Tell me a joke." * (i % 3)},
                {"role": "assistant", "content": f"Arr, matey! It be {i + 1}." + " Aye." * (i % 4)},
            ]
        }
        for i in range(number)
    ]


def preferences(number: int) -> list[dict[str, Any]]:
    """Pairs of different lengths."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {i} + 1?" + " Tell me a joke." * (i % 3)}],
            "chosen": [{"role": "assistant", "content": f"Arr, it be {i + 1}." + " Aye." * (i % 4)}],
            "rejected": [{"role": "assistant", "content": f"I like dogs {i}." + " Soup." * (i % 5)}],
        }
        for i in range(number)
    ]


def weighted(number: int) -> list[dict[str, Any]]:
    """Conversations in blocks, some of which shall become less likely."""
    rows = []
    for i, row in enumerate(chats(number)):
        user, assistant = (message["content"] for message in row["messages"])
        blocks = [
            {"type": "text", "text": assistant, "weight": 1.0 - 0.5 * (i % 3)},
            {"type": "text", "text": " The dog.", "weight": 0.25},
        ]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": user, "weight": 0}]},
                    {"role": "assistant", "content": blocks},
                ]
            }
        )
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_params(**values: Any) -> Any:
    """Validated parameters as a job reads them; those of both kinds of training."""
    defaults: dict[str, Any] = {
        "model": "model",
        "chat_template": "default",
        "load_in_4bit": False,
        "dtype": "auto",
        "loss": "sft",
        "training_file": "data.jsonl",
        "test_file": None,
        "max_seq_length": 2048,
        "is_peft": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "lora_bias": "none",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "use_rslora": True,
        "epochs": 1,
        "max_steps": None,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "seed": 3407,
        "deterministic": False,
        "train_on_responses_only": True,
        "logging_steps": 1,
        "eval_batch_size": 8,
        "eval_every_n_steps": 5000,
        "logp_callback_datasets": {},
        "sampling_callbacks": None,
        "save_steps": 5000,
        "save_minutes": None,
        "save_total_limit": 2,
        "keep_best": False,
        "resume": True,
        "output_dir": "./tmp",
        "wandb_project": None,
        "beta": 0.1,
        "packing": False,
        "test_file_eval_strategy": "epoch",
        "test_file_eval_steps": None,
    }
    assert values.keys() <= defaults.keys()
    return SimpleNamespace(**{**defaults, **values})
