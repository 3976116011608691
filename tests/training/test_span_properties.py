"""Made-up templates and conversations: an oracle knows whose each character is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st

from openweights_prefect.jobs.training.conversations import ChatTemplate
from openweights_prefect.jobs.training.examples import tokenize_row
from openweights_prefect.jobs.training.spans import Span, locate
from tests.training import templates
from tests.training.templates import SCAFFOLDS, THOUGHTS, WORDS, Piece, Scaffold

ROLES = st.tuples(st.booleans(), st.integers(1, 3), st.booleans()).map(
    lambda drawn: ["system"] * drawn[0] + (["user", "assistant"] * drawn[1])[: 2 * drawn[1] - drawn[2]]
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[str], list[list[str]]]:
    """Roles, and the blocks of each message, some of which are empty."""
    roles = draw(ROLES)
    messages = []
    for role in roles:
        text = draw(THOUGHTS if role == "assistant" else WORDS)
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=2)))
        messages.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
    return roles, messages


def oracle_spans(pieces: list[Piece], messages: list[list[str]]) -> list[list[Span | None]]:
    """Where each block's characters are."""
    spans: list[list[Span | None]] = [[None] * len(blocks) for blocks in messages]
    place = 0
    for piece in pieces:
        if piece.owner is not None:
            message, block = piece.owner
            known = spans[message][block]
            spans[message][block] = Span(place if known is None else known.start, place + 1)
        place += len(piece.text)
    return spans


PROPERTY = settings(
    max_examples=150,
    phases=(Phase.explicit, Phase.generate),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@PROPERTY
@given(SCAFFOLDS, conversations())
def test_spans_are_where_the_text_is(scaffold: Scaffold, chat: tuple[list[str], list[list[str]]]) -> None:
    """Never a wrong place; and one for every text, unless the template shows lengths or drops thoughts."""
    roles, messages = chat
    tokenizer = templates.byte_level()
    tokenizer.chat_template = scaffold.jinja
    template = ChatTemplate(tokenizer)
    pieces = scaffold.render(roles, messages)
    rendered = template.render(roles, ["".join(blocks) for blocks in messages])
    assert rendered == "".join(piece.text for piece in pieces)

    renderings = 0

    def render(contents: Any) -> str:
        nonlocal renderings
        renderings += 1
        return template.render(roles, contents)

    found = locate(rendered, messages, render)
    assert renderings <= 12
    wanted = oracle_spans(pieces, messages)
    for message, (spans, true_spans) in enumerate(zip(found, wanted, strict=True)):
        for span, true_span in zip(spans, true_spans, strict=True):
            if span is None:
                if true_span is None:
                    continue
                event("not found")
                assert scaffold.shows_length or scaffold.drops_thoughts, (message, spans, true_spans)
            elif true_span is None:
                assert span.start == span.end, (message, spans, true_spans)
            elif scaffold.shows_length:
                # Here white space that was kept may be missing.
                text = rendered[true_span.start : true_span.end]
                assert text.strip() in ("", rendered[span.start : span.end].strip())
            else:
                assert span == true_span, (message, spans, true_spans)


WEIGHTS = st.sampled_from([None, 0.0, 1.0, 2.0, -0.5])


def weighted_row(
    roles: list[str], messages: list[list[str]], weights: list[list[float | None]]
) -> dict[str, Any]:
    """The row of a file; a weight of None is not given."""
    return {
        "messages": [
            {
                "role": role,
                "content": [
                    {"text": text} if weight is None else {"text": text, "weight": weight}
                    for text, weight in zip(blocks, given_weights, strict=True)
                ],
            }
            for role, blocks, given_weights in zip(roles, messages, weights, strict=True)
        ]
    }


def oracle_weights(
    pieces: list[Piece], weights: list[list[float]], offsets: list[tuple[int, int]], ends: set[int]
) -> list[float]:
    """The weight of each token: of the first text in it, or of the message that it ends."""
    characters: list[float | None] = []
    endings: dict[int, float] = {}
    for piece in pieces:
        if piece.ends is not None:
            endings[len(characters)] = weights[piece.ends][-1]
        owner = piece.owner
        characters += [None if owner is None else weights[owner[0]][owner[1]]] * len(piece.text)
    found = []
    for place, (start, end) in enumerate(offsets):
        if place in ends:
            found.append(endings.get(start, 0.0))
        else:
            found.append(next((w for w in characters[start:end] if w is not None), 0.0))
    return found


@PROPERTY
@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
@given(SCAFFOLDS.filter(lambda s: not s.shows_length), conversations(), st.data())
def test_weights_are_those_of_the_characters(
    kind: str, scaffold: Scaffold, chat: tuple[list[str], list[list[str]]], data: st.DataObject
) -> None:
    """A token has the weight of the first block in it, an end of turn that of the last block before it."""
    roles, messages = chat
    weights = [[data.draw(WEIGHTS) for _ in blocks] for blocks in messages]
    tokenizer = templates.byte_level() if kind == "byte level" else templates.metaspace()
    tokenizer.chat_template = scaffold.jinja
    pieces = scaffold.render(roles, messages)
    rendered = "".join(piece.text for piece in pieces)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    template = ChatTemplate(tokenizer)
    special = template.special_ids
    found_spans = locate(rendered, messages, lambda contents: template.render(roles, contents))
    assume(all(any(span is not None for span in spans) for spans in found_spans))
    ends = {place for place, token in enumerate(encoded["input_ids"]) if token in special}

    row = weighted_row(roles, messages, weights)
    found = tokenize_row(row, tokenizer, mode="weighted")
    assert found.input_ids == encoded["input_ids"]
    full = [[1.0 if weight is None else weight for weight in line] for line in weights]
    assert found.weights == oracle_weights(pieces, full, encoded["offset_mapping"], ends)
    answers = [
        [float(role == "assistant")] * len(blocks) for role, blocks in zip(roles, messages, strict=True)
    ]
    found = tokenize_row(
        weighted_row(roles, messages, [[None] * len(b) for b in messages]), tokenizer, mode="responses"
    )
    assert found.weights == oracle_weights(pieces, answers, encoded["offset_mapping"], ends)
    if kind == "byte level":
        trimming = templates.byte_level(trim_offsets=True)
        trimming.chat_template = scaffold.jinja
        assert (
            tokenize_row(row, trimming, mode="weighted").weights
            == tokenize_row(row, tokenizer, mode="weighted").weights
        )
