"""A job's program in its folder: what is refused, in a line, and what its log says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_double import HubDouble

from openweights_prefect.jobs.training import train
from openweights_prefect.runtime.inside import RunFiles
from tests.training.recording import recording
from tests.training.tiny import chats, preferences, small_params, weighted, write

UNANSWERED = [{"messages": [{"role": "user", "content": "Who are you?"}]}]
REJECTED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "empty": ([], {}, "error: The data file 'data.jsonl' is empty."),
    "nothing trained": (UNANSWERED, {}, "'data.jsonl'"),
    "cut before the answer": (chats(2), {"max_seq_length": 8}, "max_seq_length=8"),
    "weights with plain SFT": (weighted(2), {}, "ow.weighted_sft"),
    "conversations with DPO": (chats(2), {"loss": "dpo"}, "not a preference pair"),
    "preferences with SFT": (preferences(2), {}, "preference pair"),
    "no file": (chats(1), {"training_file": "gone"}, "error: The data file 'gone' is not in the job folder."),
    "4 bits without a GPU": (chats(1), {"load_in_4bit": True}, "load_in_4bit=True needs an NVIDIA GPU"),
    "biases with DPO": (preferences(2), {"loss": "dpo", "lora_bias": "all"}, "lora_bias='all'"),
    "no model": (chats(1), {"model": "./missing"}, "The model './missing' cannot be loaded:"),
}


@pytest.fixture(autouse=True)
def run(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without an agent; gives the file of its events."""
    monkeypatch.setenv("OPENWEIGHTS_RUN_ID", "run")
    monkeypatch.setenv("OPENWEIGHTS_JOB_ID", "job")
    monkeypatch.setenv("OW_AGENT_SOCKET", str(workdir / "none"))
    monkeypatch.setenv("OW_EVENT_SPOOL", str(workdir / "events.jsonl"))
    return workdir / "events.jsonl"


def lay_out(folder: Path, rows: list[dict[str, Any]], **values: Any) -> None:
    write(folder / "data.jsonl", rows)
    pushing = {name: values.pop(name, None) for name in ("push", "finetuned_model_id")}
    others = {"merge_before_push": True, "push_to_private": True, "files": {}}
    params = vars(small_params(**values)) | pushing | others
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")


@pytest.mark.parametrize("name", REJECTED)
def test_refused_in_a_line(workdir: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Exit code 1, the reason last, and no result."""
    rows, values, reason = REJECTED[name]
    lay_out(workdir, rows, **values)
    assert train.main([]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert reason in last
    assert list((workdir / "uploads").iterdir()) == []


def test_an_unknown_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With those that there are."""
    assert train.main(["dancing"]) == 1
    assert "'dancing' is no kind of training; there are fine_tuning, weighted_sft." in capsys.readouterr().err


def test_a_template_is_needed_and_may_be_given(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says how."""
    folder = workdir / "bare"
    shutil.copytree((workdir / "model").resolve(), folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    lay_out(workdir, chats(2), model=str(folder))
    assert train.main([]) == 1
    assert "`chat_template`" in capsys.readouterr().err.splitlines()[-1]
    lay_out(workdir, chats(2), model=str(folder), chat_template=template)
    assert train.main([]) == 0


def test_what_was_left_out_is_said(workdir: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the log and in the first event."""
    lay_out(workdir, chats(6) + UNANSWERED, max_seq_length=60, optim="adamw_8bit", packing=True)
    assert train.main([]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    [start] = [
        event
        for line in run.read_text(encoding="utf-8").splitlines()
        if line and (event := json.loads(line)["data"]).get("tag") == "start"
    ]
    assert notes == [f"note: {note}" for note in start["notes"]]
    assert start["dropped"] == 1
    assert any("no token to train on" in note for note in notes)
    assert any("'adamw_torch' is used" in note for note in notes)
    assert any("packing" in note for note in notes)


def test_a_lost_run_does_not_train_again_to_push(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pushed is the merged model with its card; what the first run kept is enough for a second one."""
    lay_out(workdir, chats(8), push=True, finetuned_model_id="org/tuned")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with HubDouble(token="hf_secret") as hub, recording(monkeypatch, workdir) as told:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(RunFiles, "content", lambda _, file_id: told.agent.files[file_id])
        assert train.main([]) == 0
        pushed = dict(hub.repositories["org/tuned"].files)
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= pushed.keys()
        assert "its LoRA adapter merged into the base" in pushed["README.md"].decode()
        [event] = told.events(tag="push")
        assert event["repository"] == "org/tuned"

        hub.repositories.clear()
        told.agent.earlier.extend(told.events())
        shutil.rmtree(workdir / "uploads")
        capsys.readouterr()
        assert train.main([]) == 0
        assert "training" not in capsys.readouterr().out
        again = hub.repositories["org/tuned"].files
        assert again.keys() == pushed.keys()
        assert again["model.safetensors"] == pushed["model.safetensors"]
    assert (workdir / "uploads/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_push_that_is_bound_to_fail_fails_before_training(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str | None
) -> None:
    """And not after hours of it."""
    lay_out(workdir, chats(8), push=True, finetuned_model_id="org/tuned")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with HubDouble(token="hf_secret") as hub, recording(monkeypatch, workdir) as told:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        assert train.main([]) == 1
        assert not told.events(tag="train")
    said = capsys.readouterr()
    assert "HF_TOKEN" in said.err
    assert "hf_wrong" not in said.out + said.err
