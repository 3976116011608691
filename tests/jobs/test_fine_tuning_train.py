"""Training for real: a tiny model on the CPU, in the job environment, as a job would run it."""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import openweights_prefect
from openweights_prefect.jobs.fine_tuning.params import FineTuningParams

pytestmark = pytest.mark.training

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = "conversations:file-0123456789ab"
TEST_FILE = "conversations:file-ba9876543210"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Agent(socketserver.ThreadingUnixStreamServer):
    """Stands for the pod's agent: takes every upload."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), AgentCall)
        self.uploads: dict[str, int] = {}


class AgentCall(socketserver.StreamRequestHandler):
    """One line in, one line out."""

    def handle(self) -> None:
        call = json.loads(self.rfile.readline())
        assert isinstance(self.server, Agent)
        self.server.uploads[call["name"]] = Path(call["path"]).stat().st_size
        self.wfile.write(json.dumps({"file": {"id": f"result:{call['name']}"}}).encode() + b"\n")


@dataclass(frozen=True)
class Lab:
    """The job interpreter, a tiny model and a place to train."""

    python: str
    model: Path
    folder: Path
    agent: Agent

    def job(self, name: str, rows: list[dict[str, Any]], **values: Any) -> Path:
        """Lay out a job folder as an agent does."""
        work = self.folder / name
        (work / "uploads").mkdir(parents=True)
        (work / "model").symlink_to(self.model)
        (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        params = FineTuningParams(**{"model": "model", "training_file": FILE, "loss": "sft", **values})
        stored = {**params.model_dump(mode="json"), "files": {FILE: "data.jsonl", TEST_FILE: "data.jsonl"}}
        (work / "params.json").write_text(json.dumps(stored), encoding="utf-8")
        return work

    def run(self, *arguments: str, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
        """Run the job interpreter in a job folder, with nothing but our package to import."""
        library = self.folder / "lib"
        library.mkdir(exist_ok=True)
        if not (library / "openweights_prefect").exists():
            (library / "openweights_prefect").symlink_to(Path(openweights_prefect.__file__).parent)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(library),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "OPENWEIGHTS_RUN_ID": "run",
            "OPENWEIGHTS_JOB_ID": "job",
            "OW_EVENT_SPOOL": str(cwd / "events.jsonl"),
            "OW_AGENT_SOCKET": str(self.agent.server_address),
        }
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env=environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def train(self, work: Path) -> subprocess.CompletedProcess[str]:
        """Train in a job folder."""
        return self.run("-m", "openweights_prefect.jobs.fine_tuning.train", cwd=work)


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


def events(work: Path, tag: str | None = None) -> list[dict[str, Any]]:
    """What was logged, in order."""
    lines = (work / "events.jsonl").read_text(encoding="utf-8").splitlines()
    data: list[dict[str, Any]] = [json.loads(line)["data"] for line in lines if line]
    return [event for event in data if tag is None or event.get("tag") == tag]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    python = os.environ.get("OW_JOB_PYTHON", "")
    if not python:
        pytest.skip("OW_JOB_PYTHON names no interpreter with torch and TRL")
    with tempfile.TemporaryDirectory(prefix="ow-train-") as name:
        folder = Path(name)
        script = REPOSITORY / "cookbook" / "fine_tuning" / "models.py"
        made = subprocess.run(
            [python, str(script), "tiny", str(folder / "tiny")], capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        with Agent(folder / "agent") as agent:
            threading.Thread(target=agent.serve_forever, daemon=True).start()
            yield Lab(python=python, model=folder / "tiny", folder=folder, agent=agent)
            agent.shutdown()


SMALL: dict[str, Any] = {
    "r": 8,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Path:
    """A finished training of 14 steps: 50 conversations, 2 epochs, 7 steps each."""
    work = lab.job(
        "trained", chats(50), epochs=2, save_steps=5, logging_steps=3, test_file=TEST_FILE, **SMALL
    )
    done = lab.train(work)
    assert done.returncode == 0, done.stdout + done.stderr
    (work / "log").write_text(done.stdout, encoding="utf-8")
    return work


def test_the_loss_falls(trained: Path) -> None:
    """Training on it teaches the data."""
    losses = [event["loss"] for event in events(trained, "train")]
    evaluations = [event["eval_loss"] for event in events(trained, "eval")]
    assert losses[-1] < losses[0] - 1.5
    assert evaluations[-1] < evaluations[0] - 1.5


def test_events_come_in_order_and_each_once(trained: Path) -> None:
    """The start, the first step, every `logging_steps`-th and the last; evaluations between."""
    assert (
        events(trained)[0].items()
        >= {"tag": "start", "total": 14, "dataset_size": 50, "progress": 0.0}.items()
    )
    steps = events(trained, "train")
    assert [event["step"] for event in steps] == [1, 3, 6, 9, 12, 14]
    assert [event["step"] for event in events(trained, "eval")] == [0, 7, 14]
    assert [event["progress"] for event in steps] == [round(event["step"] / 14, 4) for event in steps]
    assert {"loss", "learning_rate", "grad_norm", "epoch", "step", "tag", "progress"} == set(steps[0])
    order = [event["step"] for event in events(trained) if "step" in event]
    assert order == sorted(order)


def test_the_log_has_a_line_for_each_step_and_the_fall_backs(trained: Path) -> None:
    """A person who reads the log sees what goes on."""
    lines = (trained / "log").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("step 14/14 loss ") for line in lines)
    assert any("'adamw_torch' is used" in line for line in lines)
    assert lines[-1] == "saved uploads/adapter"


def test_checkpoints_are_stored_while_training_goes_on(lab: Lab, trained: Path) -> None:
    """Each has all that is needed to go on, between the events of its step and the next."""
    names = [event["path"] for event in events(trained) if "path" in event]
    needed = (
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    )
    for step in (5, 10):
        assert {f"checkpoints/checkpoint-{step}/{name}" for name in needed} <= set(names)
    assert not any("checkpoint-14" in name for name in names)
    assert set(names) == {name for name, size in lab.agent.uploads.items() if size}
    first = next(index for index, event in enumerate(events(trained)) if "path" in event)
    assert any(event.get("step") == 9 for event in events(trained)[first:])


def test_the_adapter_works_with_plain_peft(lab: Lab, trained: Path) -> None:
    """It loads on the base model, names that model, and brings the loss down."""
    script = """
import json, sys, torch, transformers
from peft import PeftModel
tokenizer = transformers.AutoTokenizer.from_pretrained("uploads/adapter")
base = transformers.AutoModelForCausalLM.from_pretrained("model")
ids = torch.tensor([tokenizer.apply_chat_template(json.load(sys.stdin), return_dict=False)])
before = base(ids, labels=ids).loss.item()
model = PeftModel.from_pretrained(base, "uploads/adapter")
print(json.dumps({"before": before, "after": model(ids, labels=ids).loss.item()}))
"""
    done = lab.run("-c", script, cwd=trained, text=json.dumps(chats(3)[2]["messages"]))
    assert done.returncode == 0, done.stderr
    loss = json.loads(done.stdout)
    assert loss["after"] < loss["before"] - 0.5
    config = json.loads((trained / "uploads/adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "model"
    assert not (trained / "uploads/adapter/README.md").exists()


def test_a_lost_run_goes_on_from_its_last_checkpoint(lab: Lab, trained: Path) -> None:
    """The resumed steps have the losses that they would have had."""
    again = lab.folder / "again"
    shutil.copytree(trained, again, symlinks=True)
    (again / "events.jsonl").unlink()
    shutil.rmtree(again / "uploads" / "adapter")
    done = lab.train(again)
    assert done.returncode == 0, done.stdout + done.stderr
    assert events(again, "start")[0]["step"] == 10
    resumed = {event["step"]: event["loss"] for event in events(again, "train")}
    whole = {event["step"]: event["loss"] for event in events(trained, "train")}
    assert list(resumed) == [12, 14]
    assert resumed[14] == pytest.approx(whole[14], rel=1e-4)


@pytest.fixture(scope="module")
def divided(lab: Lab) -> tuple[Path, Path]:
    """Two trainings of two steps of four rows: in one batch, and in four."""
    once = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "test_file_eval_strategy": "no",
    }
    parts = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "test_file_eval_strategy": "steps",
    }
    works = []
    for name, values in (("once", once), ("parts", {**parts, "test_file_eval_steps": 1})):
        works.append(lab.job(name, chats(8), test_file=TEST_FILE, max_steps=2, **{**SMALL, **values}))
        done = lab.train(works[-1])
        assert done.returncode == 0, done.stdout + done.stderr
    return works[0], works[1]


def test_accumulated_gradients_equal_one_large_batch(divided: tuple[Path, Path]) -> None:
    """Rows of different lengths weigh the same however a step is divided."""
    once, parts = ([(e["loss"], e["grad_norm"]) for e in events(work, "train")] for work in divided)
    assert len(once) == len(parts) == 2
    for one, other in zip(once, parts, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_evaluations_are_at_both_ends_and_each_once(divided: tuple[Path, Path]) -> None:
    """Before the first and after the last step, with any strategy."""
    once, parts = ([event["step"] for event in events(work, "eval")] for work in divided)
    assert once == [0, 2]
    assert parts == [0, 1, 2]


USER = {"role": "user", "content": "Who are you?"}


@pytest.mark.parametrize(
    ("name", "rows", "values", "reason"),
    [
        ("empty", [], {}, "error: The data file 'data.jsonl' is empty."),
        (
            "masked",
            [{"messages": [USER]}],
            {},
            "error: No token of the 1 conversations in 'data.jsonl' is trained on.",
        ),
        (
            "cut",
            chats(2),
            {"max_seq_length": 8},
            "error: No token of the 2 conversations in 'data.jsonl' is trained on.",
        ),
        ("four-bit", chats(1), {"load_in_4bit": True}, "error: load_in_4bit=True is not available yet."),
        ("no-model", chats(1), {"model": "./missing"}, "error: The model './missing' cannot be loaded:"),
    ],
)
def test_what_the_user_can_mend_is_the_last_line(
    lab: Lab, name: str, rows: list[dict[str, Any]], values: dict[str, Any], reason: str
) -> None:
    """One clear line, no traceback, exit code 1, and no result."""
    work = lab.job(name, rows, **values)
    done = lab.train(work)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(reason)
    assert "Traceback" not in done.stderr
    assert list((work / "uploads").iterdir()) == []


def test_a_model_without_a_chat_template_is_refused(lab: Lab) -> None:
    """The line says how to give one."""
    work = lab.job("no-template", chats(1))
    (work / "model").unlink()
    shutil.copytree(lab.model, work / "model")
    (work / "model" / "chat_template.jinja").unlink()
    done = lab.train(work)
    assert done.returncode == 1
    assert "has no chat template. Pass one as `chat_template`" in done.stderr.splitlines()[-1]


LLAMA3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|endoftext|>\n\n"
    "{{ m.content | trim }}<|im_end|>{% endfor %}"
)
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}"
)
UNMARKED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endfor %}"
)
SHOUTING = "{% for m in messages %}{{ m.content | length }}{{ m.content }}<|im_end|>{% endfor %}"
TWO_TURNS = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Aye."},
    {"role": "user", "content": "Aye."},
    {"role": "assistant", "content": " One two. "},
]
THOUGHTS = [
    USER,
    {"role": "assistant", "content": "<think>dog</think>\n\nArr."},
    USER,
    {"role": "assistant", "content": "<think>soup</think>\n\nAye."},
]
HEAD = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
# Segments of the rendered text: what is trained on is at the odd places.
MASKS: dict[str, tuple[str, list[dict[str, str]], list[str]]] = {
    "chatml": (
        CHATML,
        TWO_TURNS,
        [
            HEAD,
            "Aye.<|im_end|>",
            "\n<|im_start|>user\nAye.<|im_end|>\n<|im_start|>assistant\n",
            " One two. <|im_end|>",
            "\n",
        ],
    ),
    "trimming, headers of several special tokens": (
        LLAMA3,
        TWO_TURNS,
        [
            "<|im_start|>user<|endoftext|>\n\nWho are you?<|im_end|><|im_start|>assistant<|endoftext|>\n\n",
            "Aye.<|im_end|>",
            "<|im_start|>user<|endoftext|>\n\nAye.<|im_end|><|im_start|>assistant<|endoftext|>\n\n",
            "One two.<|im_end|>",
        ],
    ),
    "space before the end": (
        INSTRUCT,
        TWO_TURNS[:2],
        ["[INST] Who are you? [/INST]", " Aye. <|im_end|>"],
    ),
    "no end of turn": (
        UNMARKED,
        TWO_TURNS[:2],
        ["user: Who are you?\nassistant:", " Aye.", "\n", "<|im_end|>"],
    ),
    "thoughts of earlier turns dropped": (
        THINKING,
        THOUGHTS,
        [HEAD, "Arr.<|im_end|>", "\n" + HEAD, "<think>soup</think>\n\nAye.<|im_end|>", "\n"],
    ),
    "text depends on its length": (SHOUTING, TWO_TURNS[:2], ["12Who are you?<|im_end|>4Aye.<|im_end|>"]),
    "no assistant": (CHATML, [USER], ["<|im_start|>user\nWho are you?<|im_end|>\n"]),
    "empty answer": (CHATML, [USER, {"role": "assistant", "content": ""}], [HEAD, "<|im_end|>", "\n"]),
}


@pytest.fixture(scope="module")
def masks(lab: Lab) -> dict[str, list[str]]:
    """Every case of `MASKS` in one process: the segments that were found, token by token."""
    script = """
import itertools, json, sys, transformers
from openweights_prefect.jobs.fine_tuning.data import tokenize_chat
tokenizer = transformers.AutoTokenizer.from_pretrained("tiny")
found = {}
for name, (template, messages, _) in json.load(sys.stdin).items():
    tokenizer.chat_template = template
    example = tokenize_chat(messages, tokenizer, responses_only=True)
    assert all(label in (-100, token) for token, label in zip(*example, strict=True))
    groups = itertools.groupby(zip(*example, strict=True), key=lambda pair: pair[1] != -100)
    segments = [] if example.labels[0] == -100 else [""]
    found[name] = segments + [tokenizer.decode([token for token, _ in group]) for _, group in groups]
print(json.dumps(found))
"""
    done = lab.run("-c", script, cwd=lab.folder, text=json.dumps(MASKS))
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", MASKS)
def test_the_loss_is_on_the_assistant_and_its_end_of_turn(masks: dict[str, list[str]], name: str) -> None:
    """Exactly these tokens, under templates of different kinds."""
    assert masks[name] == MASKS[name][2]
