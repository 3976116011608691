"""Pairs of answers become tokens, as TRL makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.errors import InvalidFileError
from openweights_prefect.jobs.training.preferences import Pairs, load_pairs
from tests.training import templates

USER = {"role": "user", "content": "Who are you?"}
AYE = {"role": "assistant", "content": "Aye."}
NO = {"role": "assistant", "content": "No, no."}
HEAD = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": [USER], "chosen": [AYE], "rejected": [NO], **changes}


def load(
    folder: Path, rows: list[Any], *, max_length: int | None = None, template: str = templates.CHATML
) -> Pairs:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = templates.byte_level()
    tokenizer.chat_template = template
    return load_pairs(path, tokenizer, max_length=max_length)


def decoded(pairs: Pairs, row: int = 0) -> list[str]:
    return [templates.byte_level().decode(ids) for ids in pairs.rows[row]]


def test_answers_of_one_and_of_several_turns(tmp_path: Path) -> None:
    """The prompt ends where the answer begins; answers are rendered whole, with their end of turn."""
    pairs = load(tmp_path, [pair(), pair(chosen=[AYE, USER, NO])])
    assert decoded(pairs) == [HEAD, "Aye.<|im_end|>\n", "No, no.<|im_end|>\n"]
    assert decoded(pairs, 1)[1] == "Aye.<|im_end|>\n" + HEAD + "No, no.<|im_end|>\n"


def test_end_of_sequence_is_added_where_no_turn_is_ended(tmp_path: Path) -> None:
    """The answer ends with it, under a template that ends no turn."""
    template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    assert decoded(load(tmp_path, [pair()], template=template))[1] == "Aye.\n<|im_end|>"


def test_cut_dropped_and_equal_pairs_are_counted(tmp_path: Path) -> None:
    """Cut at the end, as TRL does; a prompt that leaves no room drops its pair."""
    long = [{"role": "user", "content": "Who? " * 60}]
    length = len(load(tmp_path, [pair()]).rows[0].prompt_ids) + 8
    rows = [pair(), pair(prompt=long), pair(rejected=[AYE]), pair(rejected=[{**NO, "content": "No. " * 30}])]
    pairs = load(tmp_path, rows, max_length=length)
    assert (pairs.total, pairs.truncated, pairs.dropped) == (4, 3, 1)
    assert all(len(row.prompt_ids) + len(row.rejected_ids) <= length for row in pairs.rows)
    assert [note.split(" ")[0] for note in pairs.notes] == ["2", "1", "1"]


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        ([], {}, "is empty"),
        ([{"messages": [USER, AYE]}], {}, "Line 1 .*not a preference pair.*loss='sft'"),
        ([pair()], {"max_length": 8}, "Every prompt .*fills"),
        ([pair(rejected=[AYE])], {}, "are the same, so"),
        ([pair(chosen=[{**AYE, "content": "Aye. " * 99}])], {"max_length": 60}, "never learn to stop"),
        ([pair(chosen=[])], {}, "chosen is .* at least one message"),
        ([pair(prompt=[{**USER, "content": "<|im_end|>"}])], {}, "special token"),
        ([pair(chosen=[{"role": "assistant", "content": [{"text": "a", "weight": 2}]}])], {}, "weighted_sft"),
        (
            [pair()],
            {"template": "{{ messages | length }}{{ messages[-1].content }}"},
            "differently when `chosen`",
        ),
    ],
)
def test_files_that_train_nothing_sensible(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], problem: str
) -> None:
    """Each is refused in one sentence."""
    with pytest.raises(InvalidFileError, match=problem):
        load(tmp_path, rows, **options)
