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
from openweights_prefect.jobs.weighted_sft.params import WeightedSftParams

pytestmark = pytest.mark.training

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = "conversations:file-0123456789ab"
TEST_FILE = "conversations:file-ba9876543210"
PREFERENCES = "preference:file-0123456789ab"


class Agent(socketserver.ThreadingUnixStreamServer):
    """Stands for the pod's agent: takes every upload, hands it out again, and knows the earlier events."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), AgentCall)
        self.uploads: dict[str, int] = {}
        self.files: dict[str, Path] = {}
        self.earlier: list[dict[str, Any]] = []


class AgentCall(socketserver.StreamRequestHandler):
    """One line in, one line out."""

    def handle(self) -> None:
        call = json.loads(self.rfile.readline())
        agent = self.server
        assert isinstance(agent, Agent)
        answer: dict[str, Any] = {}
        if call["call"] == "upload":
            kept = Path(str(agent.server_address)).parent / f"file-{len(agent.files):012x}"
            shutil.copy(call["path"], kept)
            agent.files[f"{call['purpose']}:{kept.name}"] = kept
            agent.uploads[call["name"]] = kept.stat().st_size
            answer = {"file": {"id": f"{call['purpose']}:{kept.name}"}}
        elif call["call"] == "fetch":
            answer = {"path": str(agent.files[call["id"]])}
        elif call["call"] == "events":
            answer = {"events": agent.earlier}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


@dataclass(frozen=True)
class Lab:
    """The job interpreter, a tiny model and a place to train."""

    python: str
    model: Path
    folder: Path
    agent: Agent

    def job(
        self,
        name: str,
        rows: list[dict[str, Any]],
        *,
        kind: type[FineTuningParams | WeightedSftParams] = FineTuningParams,
        **values: Any,
    ) -> Path:
        """Lay out a job folder as an agent does."""
        work = self.folder / name
        (work / "uploads").mkdir(parents=True)
        (work / "model").symlink_to(self.model)
        (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        params = kind(**{"model": "model", "training_file": FILE, "loss": "sft", **values})
        files = dict.fromkeys((FILE, TEST_FILE, PREFERENCES), "data.jsonl")
        stored = {**params.model_dump(mode="json"), "files": files}
        (work / "params.json").write_text(json.dumps(stored), encoding="utf-8")
        return work

    def run(
        self, *arguments: str, cwd: Path, text: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
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
            **variables,
        }
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env=environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=280,
        )

    def train(self, work: Path, *kind: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Train in a job folder."""
        return self.run("-m", "openweights_prefect.jobs.training.train", *kind, cwd=work, **variables)


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
    """The start; the first, every `logging_steps`-th, each saved and the last step; evaluations between."""
    assert (
        events(trained)[0].items()
        >= {"tag": "start", "total": 14, "dataset_size": 50, "progress": 0.0}.items()
    )
    steps = events(trained, "train")
    assert [event["step"] for event in steps] == [1, 3, 5, 6, 9, 10, 12, 14]
    assert [event["step"] for event in events(trained, "eval")] == [0, 7, 14]
    assert [event["progress"] for event in steps] == [round(event["step"] / 14, 4) for event in steps]
    assert {"loss", "learning_rate", "grad_norm", "epoch", "step", "tag", "progress"} <= set(steps[0])
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
    card = (trained / "uploads/adapter/README.md").read_text(encoding="utf-8")
    assert "trained by job job" in card


def test_a_lost_run_goes_on_from_its_last_checkpoint(lab: Lab, trained: Path) -> None:
    """On another machine: its state comes from the store, and no step is told twice or not at all."""
    told = events(trained)
    lost = next(place for place, event in enumerate(told) if event.get("step") == 12)
    lab.agent.earlier = [{"data": data, "file": data.get("file")} for data in told[:lost]]
    again = lab.folder / "again"
    shutil.copytree(trained, again, symlinks=True, ignore=shutil.ignore_patterns("tmp", "events.jsonl"))
    shutil.rmtree(again / "uploads" / "adapter")
    done = lab.train(again)
    lab.agent.earlier = []
    assert done.returncode == 0, done.stdout + done.stderr
    assert events(again, "start")[0]["step"] == 10
    resumed = {event["step"]: event["loss"] for event in events(again, "train")}
    whole = {event["step"]: event["loss"] for event in events(trained, "train")}
    assert list(resumed) == [12, 14]
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-6)


@pytest.fixture(scope="module")
def divided(lab: Lab) -> tuple[Path, Path, Path]:
    """Three trainings of two steps of four rows: in one batch, in four, and in two processes."""
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
    shared = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    works = []
    for name, values, gpus in (
        ("once", once, "1"),
        ("parts", {**parts, "test_file_eval_steps": 1}, "1"),
        ("shared", {**shared, "test_file_eval_strategy": "no"}, "2"),
    ):
        works.append(lab.job(name, chats(8), test_file=TEST_FILE, max_steps=2, **{**SMALL, **values}))
        done = lab.train(works[-1], N_GPUS=gpus)
        assert done.returncode == 0, done.stdout + done.stderr
    return works[0], works[1], works[2]


def test_accumulated_gradients_equal_one_large_batch(divided: tuple[Path, Path, Path]) -> None:
    """Rows of different lengths weigh the same however a step is divided, also between processes."""
    once, *others = ([(e["loss"], e["grad_norm"]) for e in events(work, "train")] for work in divided)
    for other in others:
        assert len(once) == len(other) == 2
        for one, another in zip(once, other, strict=True):
            assert another == pytest.approx(one, rel=1e-4)


def test_only_the_first_process_speaks(divided: tuple[Path, Path, Path]) -> None:
    """One set of events and one result."""
    work = divided[2]
    [start] = events(work, "start")
    assert start["processes"] == 2
    assert [event["step"] for event in events(work, "train")] == [1, 2]
    assert (work / "uploads/adapter/adapter_model.safetensors").is_file()


def test_evaluations_are_at_both_ends_and_each_once(divided: tuple[Path, Path, Path]) -> None:
    """Before the first and after the last step, with any strategy."""
    once, parts, _ = ([event["step"] for event in events(work, "eval")] for work in divided)
    assert once == [0, 2]
    assert parts == [0, 1, 2]


BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Who are you?", "weight": 0}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog.", "weight": -0.5}]},
]


def test_weighted_blocks(lab: Lab) -> None:
    """Their own job type: what is weighted negatively becomes less likely; evaluations follow `log`."""
    rows = [*chats(7), {"messages": BLOCKS}]
    values = {**SMALL, "optim": "adamw_torch", "test_file": TEST_FILE, "gradient_accumulation_steps": 1}
    work = lab.job("weighted", rows, kind=WeightedSftParams, **values)
    done = lab.train(work, "weighted_sft")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["step"] for event in events(work, "eval")] == [0, 1, 2]
    losses = [event["eval_loss"] for event in events(work, "eval")]
    assert losses[-1] < losses[0]


def test_preferences(lab: Lab) -> None:
    """DPO begins with a loss of log 2 and tells its rewards."""
    pair = {
        "prompt": [{"role": "user", "content": "Who are you?"}],
        "chosen": [{"role": "assistant", "content": "Arr, matey!"}],
        "rejected": [{"role": "assistant", "content": "A dog."}],
    }
    values = {**SMALL, "training_file": PREFERENCES, "loss": "dpo", "max_steps": 3}
    work = lab.job("preferences", [pair] * 8, **values)
    done = lab.train(work)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = events(work, "train")
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["loss"] < 0.6
    assert steps[-1]["rewards/margins"] > 0


USER = {"role": "user", "content": "Who are you?"}


def test_what_the_user_can_mend_is_the_last_line(lab: Lab) -> None:
    """One clear line, no traceback, exit code 1, and no result."""
    work = lab.job("masked", [{"messages": [USER]}])
    done = lab.train(work)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "'data.jsonl'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list((work / "uploads").iterdir()) == []


def test_the_error_of_a_process_is_the_last_line(lab: Lab) -> None:
    """After what the launcher has to say about it."""
    done = lab.train(lab.job("launched", []), N_GPUS="2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: The data file 'data.jsonl' is empty.")
