"""Model cards: complete, and never more than text, whatever a parameter holds."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from openweights_prefect.jobs.training.model_card import Losses, losses, model_card

PARAMS: dict[str, Any] = {
    "model": "org/base",
    "training_file": "conversations:file-0123456789ab",
    "test_file": None,
    "finetuned_model_id": "org/tuned",
    "loss": "sft",
    "learning_rate": 1e-05,
    "weight_decay": 0.01,
    "target_modules": ["q_proj", "v_proj"],
    "chat_template": "default",
    "meta": {"note": "for my eyes"},
}
VERSIONS = {"torch": "2.13.0", "trl": "1.14.2"}


MEASURED = Losses(3.5, 1.25, 3.0, 2.0)


def card(kind: Any = "adapter", measured: Losses = MEASURED, **more: Any) -> str:
    return model_card(
        {**PARAMS, **more}, job_id="ftjob-0123456789ab", kind=kind, losses=measured, versions=VERSIONS
    )


def front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    return dict(yaml.safe_load(match[1]))


def rows(text: str) -> dict[str, str]:
    """What a reader sees: the cells of all tables."""
    tokens = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(text.split("\n---\n", 1)[1])
    cells = [
        token.children[0].content if token.children else ""
        for before, token in itertools.pairwise(tokens)
        if before.type == "td_open"
    ]
    return dict(zip(cells[::2], cells[1::2], strict=True))


def test_a_card_tells_what_was_trained() -> None:
    """Losses, data by file id, parameters, versions, job; not the user's own notes."""
    text = card()
    shown = rows(text)
    assert shown["first train"] == "3.5000"
    assert shown["last eval"] == "2.0000"
    assert shown["training_file"] == PARAMS["training_file"]
    assert shown["learning_rate"] == "1e-05"
    assert json.loads(shown["target_modules"]) == ["q_proj", "v_proj"]
    assert shown["torch"] == "2.13.0"
    assert "ftjob" in text
    assert "my eyes" not in text
    assert "0.01" in text


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [
        ("adapter", "peft", "adapter"),
        ("model", "transformers", "finetune"),
        ("merged", "transformers", "finetune"),
    ],
)
def test_the_front_matter_is_the_hubs(kind: str, library: str, relation: str) -> None:
    """Read by the library of Hugging Face itself."""
    data = ModelCard(card(kind)).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == (library, "org/base", "text-generation")
    assert data.to_dict()["base_model_relation"] == relation
    assert {"openweights-prefect", "sft"} <= set(data.tags)
    assert "datasets" not in data.to_dict()


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("org/base/checkpoint-10", "org/base"),
        ("model", None),
        ("./model", None),
        ("ftjob-0123456789ab", None),
    ],
)
def test_the_base_is_a_model_of_the_hub_or_left_out(model: str, base: str | None) -> None:
    assert front_matter(card(model=model)).get("base_model") == base


def test_without_losses_there_is_no_table_of_them() -> None:
    assert "## Loss" not in card(measured=Losses())


def test_losses_are_the_first_and_the_last() -> None:
    history = [{"eval_loss": 4.0}, {"loss": 3.0}, {"loss": 2.0}, {"eval_loss": 3.5}, {"train_runtime": 1.0}]
    assert losses(history) == Losses(3.0, 2.0, 4.0, 3.5)
    assert losses([]) == Losses()


HOSTILE = [
    "a | b\n\n# Title",
    "</td><script>alert(1)</script>",
    "![x](https://host/pixel.png)",
    "[click](javascript:alert(1))",
    "`code` **bold** _it_ ~~no~~",
    "---\nlicense: mit\n---",
    "https://host www.host.example me@host.example",
    "\u2028---\u2029\x85\x00\x1b[31m\ud800",
    "{{ 7 * 7 }}\\",
    "&lt;b&gt; &#60;",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", ["model", "chat_template", "finetuned_model_id", "training_file", "loss"])
def test_hostile_text_is_only_text(name: str, text: str) -> None:
    is_only_text(name, text)


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=100))
def test_any_text_is_only_text(text: str) -> None:
    is_only_text("chat_template", text)
    is_only_text("model", text)


def model_card_with(name: str, value: str) -> str:
    return model_card({**PARAMS, name: value}, job_id="ftjob-1", kind="adapter", losses=MEASURED, versions={})


def is_only_text(name: str, text: str) -> None:
    """The card has the structure of a harmless one, and no link, image, emphasis, code or HTML."""
    written, harmless = (model_card_with(name, value) for value in (text, "x"))
    written.encode("utf-8")
    parser = MarkdownIt("gfm-like", {"linkify": False})
    body, expected = (each.split("\n---\n", 1)[1] for each in (written, harmless))
    tokens = parser.parse(body)
    if text or name in ("model", "chat_template", "loss"):
        assert [token.type for token in tokens] == [token.type for token in parser.parse(expected)]
    inline = {child.type for token in tokens for child in token.children or []}
    assert inline <= {"text", "text_special"}
    assert not re.search(r"https?:|www\.|@", body)
    assert set(front_matter(written)) <= set(front_matter(harmless)) | {"base_model", "base_model_relation"}


def test_long_values_are_cut() -> None:
    """A chat template may be longer than all the rest."""
    assert len(card(chat_template="x" * 100_000)) < 5_000
