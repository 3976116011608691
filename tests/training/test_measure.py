"""The job that measures log-probabilities, in a job folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from openweights_prefect.jobs.logprob import measure
from openweights_prefect.jobs.training.logprobs import token_logprobs
from tests.training.recording import Recording, recording
from tests.training.tiny import chats, weighted, write

DATASET = "conversations:file-0123456789ab"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, workdir: Path) -> Iterator[Recording]:
    with recording(monkeypatch, workdir) as made:
        yield made


def job(folder: Path, rows: list[dict[str, Any]], **values: Any) -> None:
    params = {
        "model": "model",
        "dataset": DATASET,
        "batch_size": 4,
        "chat_template": "default",
        "load_in_4bit": False,
        "dtype": "auto",
        "max_seq_length": None,
        "files": {DATASET: "data.jsonl"},
        **values,
    }
    write(folder / "data.jsonl", rows)
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")


def results(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "uploads" / "logprobs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def exact(model: Any, row: dict[str, Any], first: int) -> list[float]:
    ids = torch.tensor([[first, *(token["token_id"] for token in row["tokens"])]])
    values: list[float] = token_logprobs(model, ids, torch.ones_like(ids))[0].tolist()
    return values


def test_each_row_is_scored_in_its_place(run: Recording, workdir: Path) -> None:
    """Whatever order is quickest; the average is over the assistant's tokens."""
    job(workdir, chats(11))
    assert measure.main() == 0
    found = results(workdir)
    assert [row["messages"] for row in found] == [row["messages"] for row in chats(11)]
    [event] = run.events(type="logprobs")
    assert event["file"].startswith("result:")
    assert run.file(event) == (workdir / "uploads" / "logprobs.jsonl").read_text(encoding="utf-8")
    assert (event["rows"], event["truncated"], event["progress"]) == (11, 0, 1.0)
    assert event["nll"] > 0
    assert not (workdir / "logprobs.unfinished.jsonl").exists()

    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    model = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    first = tokenizer.apply_chat_template(chats(1)[0]["messages"], return_dict=False)[0]
    for row in found:
        assert [token["logp"] for token in row["tokens"]] == pytest.approx(exact(model, row, first), abs=1e-5)


def test_blocks_have_their_sums(run: Recording, workdir: Path) -> None:
    job(workdir, weighted(3))
    assert measure.main() == 0
    for row in results(workdir):
        for message in row["messages"]:
            for block in message["content"]:
                start, end = block["range"]
                values = [token["logp"] for token in row["tokens"][start:end]]
                assert block["logprobs"] == pytest.approx(sum(values))
                assert "".join(token["token"] for token in row["tokens"][start:end]) == block["text"]


def test_an_adapter_is_scored_on_its_base(run: Recording, workdir: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    base.name_or_path = base.config._name_or_path = str((workdir / "model").resolve())
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    job(workdir, chats(2), model="adapter")
    assert measure.main() == 0
    [row, _] = results(workdir)
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    first = tokenizer.apply_chat_template(chats(1)[0]["messages"], return_dict=False)[0]
    assert [token["logp"] for token in row["tokens"]] == pytest.approx(exact(adapted, row, first), abs=1e-5)


def test_progress_is_told_on_the_way(run: Recording, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_PROGRESS_SECONDS", 0.0)
    job(workdir, chats(5))
    assert measure.main() == 0
    events = run.events(tag="progress")
    assert [event["rows"] for event in events] == [1, 2, 3, 4, 5]
    assert events[-1]["progress"] == 1.0


def test_rows_that_are_cut_are_counted(
    run: Recording, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(workdir, chats(3), max_seq_length=16)
    assert measure.main() == 0
    assert run.events(type="logprobs")[0]["truncated"] == 3
    assert "note: 3 of 3 rows were cut to max_seq_length=16 tokens" in capsys.readouterr().out
    assert {len(row["tokens"]) for row in results(workdir)} == {15}


@pytest.mark.parametrize(
    ("rows", "values", "reason"),
    [
        ([], {}, "is empty"),
        (chats(1), {"model": "nowhere"}, "The model 'nowhere' cannot be loaded"),
        (chats(1), {"files": {}}, "is not in the job folder"),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(
    run: Recording,
    workdir: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    values: dict[str, Any],
    reason: str,
) -> None:
    job(workdir, rows, **values)
    assert measure.main() == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert reason in last
