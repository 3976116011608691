"""A run whose events can be read, and a tiny model to train."""

from __future__ import annotations

import contextlib
import json
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from openweights_prefect.runtime import wire
from openweights_prefect.runtime.inside import CurrentRun

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Agent(socketserver.ThreadingUnixStreamServer):
    """Stands for the pod's agent: keeps every upload and knows the events of earlier runs."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Call)
        self.files: dict[str, bytes] = {}
        self.earlier: list[dict[str, Any]] = []


class _Call(socketserver.StreamRequestHandler):
    """One line in, one line out."""

    def handle(self) -> None:
        call = json.loads(self.rfile.readline())
        agent = self.server
        assert isinstance(agent, Agent)
        answer: dict[str, Any] = {}
        if call["call"] == "upload":
            file_id = f"{call['purpose']}:file-{len(agent.files):012x}"
            agent.files[file_id] = Path(call["path"]).read_bytes()
            answer = {"file": {"id": file_id}}
        elif call["call"] == "events":
            answer = {"events": [{"data": data, "file": None} for data in agent.earlier]}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def read_spool(spool: Path) -> list[dict[str, Any]]:
    """The data of the events that were logged, as they are stored."""
    if not spool.exists():
        return []
    lines = spool.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["data"] for line in lines if line]


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes as tokens, with ChatML; its end of turn is its end of sequence and its padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = CHATML
    return made


def make_model(kind: str = "qwen3", **settings: Any) -> transformers.PreTrainedModel:
    """A model with random weights, the same at each call."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        **settings,
    }
    config = transformers.AutoConfig.for_model(kind, **common)
    return transformers.AutoModelForCausalLM.from_config(config)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a data file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Recording:
    """A run of a job: its client, its agent, and what it logged."""

    def __init__(self, agent: Agent, spool: Path) -> None:
        self.agent = agent
        self.run = CurrentRun()
        self._spool = spool

    def events(self, **wanted: Any) -> list[dict[str, Any]]:
        """The data of the events with these values, in order."""
        found = read_spool(self._spool)
        return [data for data in found if all(data.get(name) == value for name, value in wanted.items())]

    def file(self, event: dict[str, Any]) -> str:
        """The text of an event's file."""
        return self.agent.files[event["file"]].decode()


@contextlib.contextmanager
def recording(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Recording]:
    """Start a run."""
    sockets = Path(tempfile.mkdtemp(prefix="ow-run-"))  # a socket's path must be short
    with Agent(sockets / "agent") as agent:
        threading.Thread(target=agent.serve_forever, daemon=True).start()
        patch.setenv(wire.RUN_VARIABLE, "run")
        patch.setenv(wire.JOB_VARIABLE, "job")
        patch.setenv(wire.SPOOL_VARIABLE, str(folder / "events.jsonl"))
        patch.setenv(wire.SOCKET_VARIABLE, str(sockets / "agent"))
        yield Recording(agent, folder / "events.jsonl")
        agent.shutdown()
    shutil.rmtree(sockets)


class Lesson:
    """A short training by the plain trainer, always the same."""

    rows: ClassVar[list[dict[str, Any]]] = [
        {"input_ids": ids, "labels": ids} for ids in ([256, *range(n, n + 12), 257] for n in range(16))
    ]

    def __init__(self, folder: Path, *, steps: int = 7, model: Any = None, **arguments: Any) -> None:
        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "use_cpu": True,
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": [],
            "seed": 5,
            **arguments,
        }
        transformers.set_seed(5)
        self.arguments = transformers.TrainingArguments(**settings)
        self.model = model if model is not None else make_model(attention_dropout=0.3)

    def train(
        self, callbacks: list[transformers.TrainerCallback], *, resume: str | None = None, **trainer: Any
    ) -> list[float]:
        """The loss of each step."""
        made = transformers.Trainer(
            model=self.model,
            args=self.arguments,
            train_dataset=self.rows,
            callbacks=callbacks,
            data_collator=lambda rows: {
                name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")
            },
            **trainer,
        )
        made.remove_callback(transformers.PrinterCallback)
        made.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]
