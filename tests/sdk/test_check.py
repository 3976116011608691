"""A training is looked at before anything is bought: what `check` says, and what `create` refuses."""

from __future__ import annotations

import html.parser
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.jobs.memory import Workload, estimate
from openweights_prefect.jobs.model_shape import shape_from_name
from openweights_prefect.resources.check_report import CheckReport, DataReport, Segment
from openweights_prefect.resources.fine_tuning import FineTuning
from openweights_prefect.resources.preflight import ON_CREATE, ON_REQUEST
from openweights_prefect.resources.session import Session

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}


def write_model(folder: Path) -> Path:
    """A tokenizer of single bytes, written by hand, and the configuration of a Llama of 1.2 billion."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    special = ["<|im_start|>", "<|im_end|>"]
    added = [
        {
            "id": 256 + number,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for number, text in enumerate(special)
    ]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    folder.mkdir()
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": bytes_only,
        "decoder": bytes_only,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHATML,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
    }
    for name, values in (("tokenizer", tokenizer), ("tokenizer_config", settings), ("config", CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def job_python() -> str:
    python = os.environ.get("OW_JOB_PYTHON", "")
    if not python:
        pytest.skip("OW_JOB_PYTHON names no interpreter with Transformers")
    return python


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture
def checking(settings: Any, job_python: str) -> Iterator[OpenWeights]:
    """A client with a job environment."""
    with OpenWeights(settings=replace(settings, job_python=job_python)) as client:
        yield client


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    def write(*pairs: tuple[str, str], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            for asked, answer in pairs
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.training
def test_a_check_says_what_training_would_do(
    checking: OpenWeights, model: Path, data: Callable[..., Path]
) -> None:
    """Rows, tokens, the mask, steps, memory by the model's configuration, cost; and stores nothing."""
    path = data(*[("Who?", "Arr!")] * 2, *[("What?", f"Aye {n}.") for n in range(38)])
    report = checking.fine_tuning.check(
        model=model,
        training_file=path,
        loss="sft",
        epochs=3,
        test_file=data(("Who?", "Arr!"), name="t.jsonl"),
    )
    assert (report.ok, report.errors, report.not_checked) == (True, (), None)
    assert report.training is not None
    assert (report.training.total, report.training.rows, report.training.eos_trained) == (40, 40, 40)
    assert report.training.copies == 1
    assert report.steps == 9
    assert report.training.examples[0] == (
        Segment("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", 0),
        Segment("Arr!<|im_end|>", 1),
        Segment("\n", 0),
    )
    assert report.memory.source == "config"
    assert report.memory.parameters == pytest.approx(1.2358e9, rel=0.001)
    assert report.cost is not None
    assert 0 < report.cost.usd[0] < report.cost.usd[1] < 1
    assert any("copies" in warning for warning in report.warnings)
    assert any("in both training_file and test_file" in warning for warning in report.warnings)
    text = str(report)
    assert text.startswith("ow.fine_tuning: ok, 2 warnings\n")
    assert "\n  + Arr!<|im_end|>\n" in text
    assert "\x1b" not in text
    assert checking.files.list() == []
    assert checking.jobs.list() == []


@pytest.mark.training
def test_weights_below_0_and_preferences(checking: OpenWeights, model: Path, tmp_path: Path) -> None:
    """Shown as what is made less likely."""
    blocks = [{"type": "text", "text": "A dog.", "weight": -0.5}]
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": blocks}]}
    path = tmp_path / "weighted.jsonl"
    path.write_text(json.dumps(row) + "\n")
    report = checking.weighted_sft.check(model=model, training_file=path)
    assert "\n  - [-0.5] A dog.<|im_end|>\n" in str(report)
    message = {"prompt": "Who?", "chosen": "Arr!", "rejected": "A dog."}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pair = {name: [{"role": roles[name], "content": text}] for name, text in message.items()}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair) + "\n")
    report = checking.fine_tuning.check(model=model, training_file=path, loss="dpo")
    assert "\n  + Arr!<|im_end|>↵\n  - A dog.<|im_end|>↵" in str(report)
    assert any("warmup_steps=5" in warning for warning in report.warnings)


@pytest.mark.training
def test_what_is_meaningless_is_refused_before_it_is_stored(
    checking: OpenWeights, model: Path, data: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """By `create` too, with the error of training; `check=False` submits it all the same."""
    long = data(("Who?" * 30, "Arr!"))
    arguments: dict[str, Any] = {"model": model, "training_file": long, "loss": "sft", "max_seq_length": 64}
    report = checking.fine_tuning.check(**arguments)
    assert not report.ok
    [error] = report.errors
    assert isinstance(error, InvalidFileError)
    with pytest.raises(InvalidFileError, match="is cut before what it trains begins"):
        checking.fine_tuning.create(**arguments)
    with pytest.raises(InvalidFileError, match="is cut before"):
        report.raise_for_errors()
    assert checking.files.list() == []
    with pytest.raises(InvalidParameterError, match="not valid Jinja"):
        checking.fine_tuning.create(**{**arguments, "chat_template": "{% for %}"})
    job = checking.fine_tuning.create(**arguments, check=False)
    assert job.status == "pending"
    with caplog.at_level(logging.WARNING):
        good = checking.fine_tuning.create(**{**arguments, "training_file": data(("Hm?", "Aye."))})
    assert "warmup_steps=5" in caplog.text
    assert good.requires_vram_gb == 6


@pytest.mark.training
def test_a_stored_file_is_checked_and_a_known_job_is_not(
    session: Session, ledger: Any, model: Path, data: Callable[..., Path], job_python: str, tmp_path: Path
) -> None:
    """The job that exists is one round trip, and the same data is looked at once."""
    counting = tmp_path / "python"
    counting.write_text(f'#!/bin/sh\necho >> {tmp_path}/looks\nexec {job_python} "$@"\n')
    counting.chmod(0o755)
    tuning = FineTuning(replace(session, settings=replace(session.settings, job_python=str(counting))))
    path = data(("Who?", "Arr!"))
    arguments: dict[str, Any] = {"model": model, "training_file": path, "loss": "sft"}
    job = tuning.create(**arguments)
    ledger.calls.clear()
    assert tuning.create(**arguments).id == job.id
    assert ledger.calls == ["submit_job"]
    stored = {**arguments, "training_file": job.params["validated_params"]["training_file"]}
    for seed in range(5):
        ledger.calls.clear()
        assert tuning.create(**stored, seed=seed).status == "pending"
        assert ledger.calls == ["submit_job", "submit_job"]
    assert len((tmp_path / "looks").read_text()) == 1
    ledger.calls.clear()
    report = tuning.check(**stored, train_on_responses_only=False)
    assert report.training is not None
    assert report.training.examples[0][1].weight == 1
    assert ledger.calls == ["get_files"]
    missing = "conversations:file-0123456789ab"
    assert not tuning.check(**{**stored, "training_file": missing}).ok
    with pytest.raises(InvalidParameterError, match=rf"training_file='{missing}'"):
        tuning.create(**{**stored, "training_file": missing})


@pytest.mark.training
def test_the_model_of_a_job(
    checking: OpenWeights, model: Path, data: Callable[..., Path], pod: Any, tmp_path: Path
) -> None:
    """Its tokenizer and its base's configuration are fetched, its weights are not."""
    arguments: dict[str, Any] = {"training_file": data(("Who?", "Arr!")), "loss": "sft"}
    first = checking.fine_tuning.create(model=model, **arguments)
    pod.open(first)
    results = {
        "adapter_config.json": json.dumps({"base_model_name_or_path": "model"}),
        "adapter_model.safetensors": "no weights",
        "tokenizer.json": (model / "tokenizer.json").read_text(),
        "tokenizer_config.json": (model / "tokenizer_config.json").read_text(),
    }
    for name, text in results.items():
        (tmp_path / name).write_text(text)
        file = checking.files.upload(tmp_path / name, "result")["id"]
        pod.log({"path": f"adapter/{name}", "file": file}, file=file)
    pod.finish()
    report = checking.fine_tuning.check(model=first.id, **arguments)
    assert report.ok, report
    assert report.training is not None
    assert (report.memory.source, report.memory.parameters) == ("config", 1_235_812_352)


def test_where_nothing_can_be_checked(
    ow: OpenWeights, data: Callable[..., Path], caplog: pytest.LogCaptureFixture, settings: Any
) -> None:
    """The report says why and how to mend it, memory is estimated all the same, and `create` goes on."""
    arguments: dict[str, Any] = {"model": "org/m-8B", "training_file": data(("Who?", "Arr!")), "loss": "sft"}
    with OpenWeights(settings=replace(settings, job_python="/nowhere/python")) as other:
        report = other.fine_tuning.check(**arguments)
        assert not report.ok
        assert report.errors == ()
        assert "'/nowhere/python' cannot be run" in str(report)
        assert "OW_JOB_PYTHON" in str(report)
        assert report.memory.source == "name"
        with caplog.at_level(logging.INFO):
            assert other.fine_tuning.create(**arguments).status == "pending"
        assert "not checked before the job runs" in caplog.text
        assert other.fine_tuning.check(**arguments, requires_vram_gb=8).warnings
        assert other.fine_tuning.check(**arguments, allowed_hardware=["2x L4"]).warnings
    with OpenWeights(settings=replace(settings, job_python=sys.executable)) as other:
        assert "could not do it: " in str(other.fine_tuning.check(**arguments).not_checked)
    with pytest.raises(InvalidParameterError, match="check='no' is neither True nor False"):
        ow.fine_tuning.create(**{**arguments, "check": "no"})
    (bad := data(name="bad.jsonl")).write_text('{"messages": []}\n')
    [error] = ow.fine_tuning.check(**{**arguments, "training_file": bad}).errors
    assert "messages is empty" in str(error)


def test_a_check_that_takes_too_long(
    settings: Any, data: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is given up, and the job is submitted."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    module = "openweights_prefect.resources.training"
    monkeypatch.setattr(f"{module}.ON_CREATE", replace(ON_CREATE, seconds=0.1))
    monkeypatch.setattr(f"{module}.ON_REQUEST", replace(ON_REQUEST, seconds=0.1))
    arguments: dict[str, Any] = {"model": "org/m-8B", "training_file": data(("Who?", "Arr!")), "loss": "sft"}
    with OpenWeights(settings=replace(settings, job_python=str(slow))) as ow:
        assert "it took longer than 0.1 s" in str(ow.fine_tuning.check(**arguments))
        assert ow.fine_tuning.create(**arguments).status == "pending"


class Page(html.parser.HTMLParser):
    """Collects tags and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert(1)</script>\x1b[2J\x07[red]</pre>&\u202eevil\r"


def report_of(*segments: Segment) -> CheckReport:
    data = DataReport(
        total=1,
        rows=1,
        truncated=0,
        dropped=0,
        copies=0,
        tokens=9,
        trained_tokens=4,
        eos_trained=1,
        lengths={"p50": 9, "p95": 9, "max": 9},
        notes=(),
        examples=(segments,),
    )
    return CheckReport(
        job_type="fine_tuning",
        errors=(InvalidFileError(HOSTILE),),
        warnings=(HOSTILE,),
        not_checked=HOSTILE,
        training=data,
        test=None,
        steps=1,
        memory=estimate(shape_from_name("m-8B"), Workload()),
        cost=None,
    )


def test_hostile_text_does_nothing() -> None:
    """In no terminal and no notebook."""
    report = report_of(Segment(HOSTILE, 1), Segment(HOSTILE, 0), Segment("\ud800", -1))
    for text in (str(report), repr(report), report._repr_html_()):
        assert not {"\x1b", "\x07", "\r", "\u202e", "\ud800"} & set(text)
    assert "\\x1b[2J\\x07[red]</pre>&\\u202eevil" in str(report)
    page = Page()
    page.feed(report._repr_html_())
    assert page.tags <= {"div", "b", "table", "tr", "th", "td", "br", "p", "pre", "span"}
    assert page.text.count("<script>alert(1)</script>") == 5


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained green, made less likely red; without colours the mark in front says the same."""
    report = report_of(Segment("no", 0), Segment("yes", 1), Segment("never", -0.5))
    assert "  · no\n  + yes\n  - [-0.5] never" in str(report)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m  + yes" in str(report)
    assert "\x1b[31m  - [-0.5] never" in str(report)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[32m" not in str(report)
