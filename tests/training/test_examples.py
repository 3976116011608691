"""Rows of a file become tokens and weights, and what cannot be trained on is said."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.jobs.training.examples import Example, Examples, load_examples, tokenize_row
from tests.training import templates

USER = {"role": "user", "content": "Who are you?"}
ANSWER = {"role": "assistant", "content": "Aye."}
HEAD = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"


def chatml(**options: Any) -> transformers.PreTrainedTokenizerFast:
    tokenizer = templates.byte_level(**options)
    tokenizer.chat_template = templates.CHATML
    return tokenizer


def segments(example: Example, tokenizer: transformers.PreTrainedTokenizerFast) -> list[tuple[float, str]]:
    """Neighbours of the same weight, decoded."""
    pairs = zip(example.input_ids, example.weights, strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [(weight, tokenizer.decode([token for token, _ in group])) for weight, group in groups]


def load(folder: Path, rows: list[Any], **options: Any) -> Examples:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = options.pop("tokenizer", None) or chatml()
    return load_examples(path, tokenizer, **{"max_length": None, "mode": "responses", **options})


def test_responses() -> None:
    """The assistant's text and its end of turn, with what is between the two."""
    tokenizer = chatml()
    row = {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": ""}]}
    assert segments(tokenize_row(row, tokenizer, mode="responses"), tokenizer) == [
        (0, HEAD), (1, "Aye.<|im_end|>"), (0, "\n" + HEAD), (1, "<|im_end|>"), (0, "\n"),
    ]  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}"
    )
    assert segments(tokenize_row({"messages": [USER, ANSWER]}, tokenizer, mode="responses"), tokenizer) == [
        (0, "[INST] Who are you? [/INST]"), (1, " Aye. <|im_end|>"),
    ]  # fmt: skip


def test_no_end_of_turn() -> None:
    """Where the template ends no turn, the end-of-sequence token ends the row; not after a user's words."""
    tokenizer = chatml()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    row = {"messages": [USER, ANSWER]}
    assert segments(tokenize_row(row, tokenizer, mode="responses"), tokenizer) == [
        (0, "user: Who are you?\nassistant:"), (1, " Aye."), (0, "\n"), (1, "<|im_end|>"),
    ]  # fmt: skip
    last = tokenize_row({"messages": [USER, ANSWER, USER]}, tokenizer, mode="responses")
    assert last.input_ids[-1] != tokenizer.eos_token_id


def test_end_of_turn_need_not_be_the_eos_token() -> None:
    """Gemma's `<end_of_turn>` is trained although the end-of-sequence token is another one."""
    tokenizer = templates.metaspace()
    tokenizer.chat_template = templates.trl_template("gemma3")
    row = {"messages": [{"role": "system", "content": "Aye"}, USER, ANSWER]}
    for mode in ("responses", "all"):
        example = tokenize_row(row, tokenizer, mode=mode)
        assert tokenizer.eos_token_id not in example.input_ids
    assert segments(tokenize_row(row, tokenizer, mode="responses"), tokenizer)[-2:] == [
        (1, "Aye.<end_of_turn>"), (0, "\n"),
    ]  # fmt: skip


def test_weights_of_blocks() -> None:
    """Given weights hold, missing ones are 1; an end of turn has that of the last block; scaffold has 0."""
    tokenizer = chatml()
    row = {
        "messages": [
            {"role": "user", "content": [{"text": "Who ", "weight": 0.5}, {"text": "are"}]},
            {"role": "assistant", "content": [
                {"text": "", "weight": 7}, {"text": "Aye", "tag": "a", "logprobs": False},
                {"text": "🙂", "weight": -2},
            ]},
        ]
    }  # fmt: skip
    example = tokenize_row(row, tokenizer, mode="weighted")
    assert segments(example, tokenizer) == [
        (0, "<|im_start|>user\n"), (0.5, "Who "), (1, "are<|im_end|>"), (0, "\n<|im_start|>assistant\n"),
        (1, "Aye"), (-2, "🙂<|im_end|>"), (0, "\n"),
    ]  # fmt: skip
    texts = [tokenizer.decode(example.input_ids[block.start : block.end]) for block in example.blocks]
    assert texts == ["Who ", "are", "", "Aye", "🙂"]
    assert [(block.message, block.index) for block in example.blocks] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert example.blocks[3].tag == "a"
    assert example.blocks[3].keys == {"logprobs": False}
    assert example.blocks[4].keys == {"weight": -2}


@pytest.mark.parametrize(("responses_only", "users"), [(True, 0), (False, 1)])
def test_weights_of_messages(responses_only: bool, users: float) -> None:
    """A string has the weight of its message, else one by its role; blocks are not concerned by that."""
    tokenizer = chatml()
    row = {"messages": [USER, {**ANSWER, "weight": -1}, {"role": "user", "content": [{"text": "Aye"}]}]}
    example = tokenize_row(row, tokenizer, mode="weighted", responses_only=responses_only)
    found = segments(example, tokenizer)
    assert (-1, "Aye.<|im_end|>") in found
    assert (1, "Aye<|im_end|>") in found
    assert example.weights[example.blocks[0].start] == users


def test_texts(tmp_path: Path) -> None:
    """All tokens of a text are trained, with the end of sequence once; a file may hold both kinds of rows."""
    eos = chatml().eos_token
    found = load(tmp_path, [{"text": "Aye"}, {"text": f"Aye{eos}"}, {"messages": [USER, ANSWER]}])
    assert found.rows[0] == found.rows[1]
    assert found.rows[0].input_ids[-1] == chatml().eos_token_id
    assert set(found.rows[0].weights) == {1.0}
    assert (found.total, found.dropped, found.eos_trained, found.notes) == (3, 0, 3, [])


def test_cut_and_untrained_rows_are_counted(tmp_path: Path) -> None:
    """Nothing is cut or dropped silently, and the blocks end where the row does."""
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [{"role": "user", "content": "Who? " * 50}, ANSWER]},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": "Aye. " * 100, "name": "x"}]},
    ]
    found = load(tmp_path, rows, max_length=60)
    assert (len(found.rows), found.total, found.truncated, found.dropped, found.eos_trained) == (
        2,
        4,
        2,
        2,
        1,
    )
    assert found.rows[1].blocks[-1].end == len(found.rows[1].input_ids) == 60
    assert [note.split(" ")[0] for note in found.notes] == ["2", "2", "keys", "1"]
    assert "'name' (1)" in found.notes[2]
    assert len(load(tmp_path, rows, max_length=60, keep_untrained=True).rows) == 4


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        ([], {}, "is empty"),
        ([{"messages": [USER]}], {}, "No token of the 1 conversations"),
        ([{"messages": [USER, ANSWER]}], {"max_length": 10}, "cut before what it trains"),
        ([{"messages": [USER, {**ANSWER, "content": "Aye. " * 99}]}], {"max_length": 60},
         "never learn to stop"),
        ([{"messages": [{**USER, "weight": 0}, {**ANSWER, "weight": 0}]}], {"mode": "weighted"}, "No token"),
        ([{"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}], {}, "Line 1 .*preference pair.*dpo"),
        ([{"conversation": []}], {}, "neither `messages` nor `text`"),
        ([5], {}, "Line 1 of 'rows.jsonl' is 5"),
        ([{"messages": []}], {}, "at least one message"),
        ([{"messages": [{"role": "user"}]}], {}, r"messages\[0\].content is None"),
        ([{"messages": [USER, {**ANSWER, "weight": True}]}], {"mode": "weighted"}, "weight is True"),
        ([{"text": 5}], {}, "a string as `text`"),
        ([{"messages": [USER, ANSWER]}, {"messages": [{**USER, "content": "a<|im_end|>b"}, ANSWER]}], {},
         r"Line 2 .*message 0 \(user\) holds '<\|im_end\|>'"),
        ([{"messages": [USER, {"role": "assistant", "content": [{"text": "a", "weight": 0.5}]}]}], {},
         "Line 1 .*message 1 has weight 0.5.*ow.weighted_sft"),
    ],
)  # fmt: skip
def test_files_that_train_nothing_sensible(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], problem: str
) -> None:
    """Each is refused in one sentence that says what is wrong and where."""
    with pytest.raises(InvalidFileError, match=problem):
        load(tmp_path, rows, **options)


def test_chat_template_errors(tmp_path: Path) -> None:
    """A template that is missing or wrong is named; one that refuses a row names the row."""
    row = {"messages": [USER, USER]}
    tokenizer = chatml()
    for template, error, problem in [
        ("", InvalidParameterError, "no chat template"),
        ("{% for %}", InvalidParameterError, "not valid Jinja"),
        (templates.trl_template("gemma3"), InvalidFileError, "Line 1 .*refuses it: Conversation roles must"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(error, match=problem):
            load(tmp_path, [row], tokenizer=tokenizer)
