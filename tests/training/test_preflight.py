"""What is said of data before training is what training does with it, and torch is not needed for that."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.jobs.training import data_report
from openweights_prefect.jobs.training.examples import load_examples
from openweights_prefect.jobs.training.sources import Source, load_tokenizer
from tests.training import templates, tiny
from tests.training.hub_double import HubDouble, Repository

REPOSITORY = Path(__file__).resolve().parents[2]
PARAMS = {
    "model": "model",
    "chat_template": "default",
    "loss": "sft",
    "max_seq_length": 512,
    "train_on_responses_only": True,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job folder with a tokenizer and no weights."""
    tokenizer = templates.byte_level()
    tokenizer.chat_template = templates.CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"hidden_size": 8}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inspect(folder: Path) -> Callable[..., dict[str, Any]]:
    def ask(
        rows: list[Any], test: list[Any] | None = None, *, kind: str = "fine_tuning", **params: Any
    ) -> Any:
        files = {"training_file": str(tiny.write(folder / "rows.jsonl", rows))}
        if test is not None:
            files["test_file"] = str(tiny.write(folder / "test.jsonl", test))
        question = {"kind": kind, "params": {**PARAMS, **params}, "files": files}
        return json.loads(json.dumps(data_report.inspect(question, on_tokenizer=lambda: None)))

    return ask


def test_the_counts_are_those_of_training(inspect: Callable[..., dict[str, Any]], folder: Path) -> None:
    """Rows, tokens, lengths, ends of turn, copies, what was cut and what was dropped."""
    rows = [*tiny.chats(20), *tiny.chats(3), {"messages": [{"role": "user", "content": "Hm?"}]}]
    answer = inspect(rows, tiny.chats(5), max_seq_length=70)
    data = answer["files"]["training_file"]
    tokenizer = load_tokenizer(tiny.small_params(), Source("model"), None)
    same = load_examples(folder / "rows.jsonl", tokenizer, max_length=70, mode="responses")
    lengths = sorted(len(row.input_ids) for row in same.rows)
    assert (data["total"], data["rows"], data["dropped"]) == (24, len(same.rows), same.dropped)
    assert 0 < data["truncated"] == same.truncated < 24
    assert (data["tokens"], data["trained_tokens"]) == (sum(lengths), same.trained_tokens)
    assert data["eos_trained"] == same.eos_trained
    assert (data["lengths"]["p50"], data["lengths"]["max"]) == (lengths[(len(lengths) - 1) // 2], lengths[-1])
    assert data["copies"] == 3
    assert data["notes"] == same.notes
    assert answer["overlap"] == 5
    assert answer["errors"] == []
    assert answer["model"] == {"config": {"hidden_size": 8}, "parameters": None}


def test_the_first_rows_with_their_weights(inspect: Callable[..., dict[str, Any]]) -> None:
    """Put together they are the rows; a long one lacks its middle."""
    one = inspect(tiny.chats(9))["files"]["training_file"]["examples"][0]
    head = "<|im_start|>user\nWhat is 0 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert one == [[head, 0], ["Arr, matey! It be 1.<|im_end|>", 1], ["\n", 0]]
    weighted = inspect(tiny.weighted(3), kind="weighted_sft")["files"]["training_file"]
    assert [weight for _, weight in weighted["examples"][1]] == [0, 0.5, 0.25, 0]
    pairs = inspect(tiny.preferences(2), loss="dpo")["files"]["training_file"]
    assert [(weight, text[:3]) for text, weight in pairs["examples"][0]] == [
        (0, "<|i"),
        (1, "Arr"),
        (-1, "I l"),
    ]
    assert pairs["eos_trained"] is None
    long = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y " * 1000}]}]
    segments = inspect(long, max_seq_length=4000)["files"]["training_file"]["examples"][0]
    assert any("tokens]" in text for text, _ in segments)
    assert len("".join(text for text, _ in segments)) < 2500


@pytest.mark.parametrize(
    ("rows", "params", "kind", "says"),
    [
        ([], {}, "InvalidFileError", "is empty"),
        ([{"messages": [{"role": "user", "content": "Hm?"}]}], {}, "InvalidFileError", "No token of the 1"),
        (tiny.chats(3), {"max_seq_length": 8}, "InvalidFileError", "is cut before what it trains begins"),
        (tiny.preferences(3), {}, "InvalidFileError", "is a preference pair"),
        (tiny.chats(3), {"loss": "dpo"}, "InvalidFileError", "is not a preference pair"),
        (tiny.weighted(3), {}, "InvalidFileError", "weighted_sft"),
        (tiny.chats(3), {"chat_template": "{{"}, "InvalidParameterError", "not valid Jinja"),
    ],
)
def test_what_makes_training_meaningless_is_an_error(
    inspect: Callable[..., dict[str, Any]], rows: list[Any], params: dict[str, Any], kind: str, says: str
) -> None:
    """Of the same class and words as in training."""
    [error] = inspect(rows, **params)["errors"]
    assert (error["parameter"], error["kind"]) == ("training_file", kind)
    assert says in error["message"]


def test_a_bad_test_file_is_an_error_too(inspect: Callable[..., dict[str, Any]]) -> None:
    """And what the other file holds is said all the same."""
    answer = inspect(tiny.chats(2), [])
    assert [error["parameter"] for error in answer["errors"]] == ["test_file"]
    assert answer["files"]["training_file"]["rows"] == 2


def run(folder: Path, question: dict[str, Any], **environment: str) -> dict[str, Any]:
    script = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from openweights_prefect.jobs.training import preflight\n"
        "answer = preflight._answer\n"
        "def tell(stream, found):\n"
        "    heavy = [name for name in ('torch', 'trl', 'peft', 'datasets') if sys.modules.get(name)]\n"
        "    answer(stream, {**found, 'heavy': heavy})\n"
        "preflight._answer = tell\n"
        "preflight.main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        input=json.dumps(question),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, **environment},
    )
    return dict(json.loads(done.stdout))


def test_no_torch_is_imported(folder: Path) -> None:
    """Which would take longer than everything else."""
    files = {"training_file": str(tiny.write(folder / "rows.jsonl", tiny.chats(4)))}
    answer = run(folder, {"kind": "fine_tuning", "params": PARAMS, "files": files, "patience": 30})
    assert answer["files"]["training_file"]["rows"] == 4
    assert answer["heavy"] == []


def test_a_model_of_the_hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its tokenizer, its configuration, and how many weights the headers of its files name."""
    header = json.dumps({"a": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]}}).encode()
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    files["model.safetensors"] = struct.pack("<Q", len(header)) + header + bytes(30)
    rows = {"training_file": str(tiny.write(folder / "rows.jsonl", tiny.chats(4)))}
    question = {"kind": "fine_tuning", "params": {**PARAMS, "model": "org/m"}, "files": rows, "patience": 30}
    with HubDouble(token="hf_x") as hub:
        hub.repositories["org/m"] = Repository(private=False, files=files)
        home = str(tmp_path_factory.mktemp("hub"))
        environment = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": home,
            "HF_TOKEN": "hf_x",
        }
        answer = run(folder, question, **environment)
    assert answer["files"]["training_file"]["rows"] == 4
    assert answer["model"] == {"config": {"hidden_size": 8}, "parameters": 15}


def test_a_tokenizer_that_is_out_of_reach(folder: Path) -> None:
    """Is told at once when offline, and within the patience when the hub is silent."""
    params = {**PARAMS, "model": "nobody/nothing"}
    question = {"kind": "fine_tuning", "params": params, "files": {}, "patience": 30}
    assert "'nobody/nothing' cannot be loaded" in run(folder, question)["unreachable"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        answer = run(folder, {**question, "patience": 1}, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0")
    assert answer["unreachable"] == "the tokenizer could not be loaded within 1 s"
