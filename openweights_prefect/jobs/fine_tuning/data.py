"""Turns a conversations file into token ids and labels, with the loss on the assistant's words only."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from openweights_prefect.errors import InvalidFileError, InvalidParameterError

IGNORED = -100

# The marks round each message's text are private-use characters: message i gets the pair 2i, 2i + 1.
_FIRST_MARK = 0xF0000
_MARK = re.compile("[\U000f0000-\U000ffffd]")


class Example(NamedTuple):
    """One training row; a label is the token itself, or `IGNORED`."""

    input_ids: list[int]
    labels: list[int]


class Span(NamedTuple):
    """A range of characters in a rendered conversation."""

    start: int
    end: int


@dataclass(frozen=True)
class Examples:
    """The rows of a file that can be trained on, and what happened to the rest."""

    rows: list[Example]
    truncated: int
    dropped: int

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss is taken on."""
        return sum(label != IGNORED for row in self.rows for label in row.labels)


def load_examples(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int, responses_only: bool
) -> Examples:
    """Read a JSONL file of conversations; rows without a single token to train on are dropped and counted."""
    rows: list[Example] = []
    truncated = dropped = 0
    for row in _read_jsonl(path):
        example = _tokenize(row, tokenizer, responses_only=responses_only)
        truncated += len(example.input_ids) > max_length
        example = Example(example.input_ids[:max_length], example.labels[:max_length])
        # The first token is never predicted, so a label there trains nothing.
        if any(label != IGNORED for label in example.labels[1:]):
            rows.append(example)
        else:
            dropped += 1
    if not rows and not dropped:
        raise InvalidFileError(f"The data file {path.name!r} is empty. Upload at least one conversation.")
    if not rows:
        raise InvalidFileError(
            f"No token of the {dropped} conversations in {path.name!r} is trained on. Check that they hold "
            f"assistant messages and that these begin within max_seq_length={max_length} tokens."
        )
    return Examples(rows, truncated, dropped)


def tokenize_chat(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, responses_only: bool
) -> Example:
    """Render a conversation with the chat template, tokenize it once and label it.

    Trained on are the text of each assistant message, its end-of-turn token and what the template puts
    between the two. The conversation is rendered a second time with marks round each message's text, which
    tells where it went under any template; a template that answers to the marks leaves nothing to train on.
    """
    rendered = _render(messages, tokenizer)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    if not responses_only:
        return _closed(Example(ids, list(ids)), tokenizer)

    spans = message_spans(
        rendered, _render([_marked(i, m) for i, m in enumerate(messages)], tokenizer), messages
    )
    special = _special_ids(tokenizer)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    labels = [IGNORED] * len(ids)
    ended = True
    for index, span in spans.items():
        if messages[index]["role"] != "assistant":
            continue
        limit = min(
            (other.start for other in spans.values() if other.start >= span.end and other != span),
            default=len(rendered),
        )
        chosen = [i for i, (start, end) in enumerate(offsets) if start < span.end and end > span.start]
        after = [i for i, (start, end) in enumerate(offsets) if span.end <= start and end <= limit]
        stop = next((i for i in after if ids[i] in special), None)
        ended = stop is not None
        if stop is not None:
            chosen += range(chosen[-1] + 1 if chosen else stop, stop + 1)
        for i in chosen:
            labels[i] = ids[i]
    example = Example(ids, labels)
    return example if ended else _closed(example, tokenizer)


def message_spans(rendered: str, marked: str, messages: list[dict[str, str]]) -> dict[int, Span]:
    """Where each message's text is in `rendered`, by index, without those that the template dropped."""
    if _MARK.sub("", marked) != rendered:
        return {}
    places = {
        ord(mark.group()) - _FIRST_MARK: mark.start() - n for n, mark in enumerate(_MARK.finditer(marked))
    }
    spans: dict[int, Span] = {}
    for index, message in enumerate(messages):
        start, end = places.get(2 * index), places.get(2 * index + 1)
        if end is None:
            continue
        text = message["content"]
        if start is None:  # A template that drops a chain of thought drops the mark before it.
            previous = max((span.end for span in spans.values()), default=0)
            start = end - len(_common_end(text.rstrip(), rendered[previous:end]).lstrip())
        else:  # White space that the template kept is the assistant's too.
            before = text[: len(text) - len(text.lstrip())]
            start -= len(before) if rendered[:start].endswith(before) else 0
        spans[index] = Span(start, end)
    return spans


def _common_end(one: str, other: str) -> str:
    pairs = zip(reversed(one), reversed(other), strict=False)
    length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[len(one) - length :]


def _tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, responses_only: bool) -> Example:
    if "messages" in row:
        messages = [{"role": m["role"], "content": _plain(m["content"])} for m in row["messages"]]
        return tokenize_chat(messages, tokenizer, responses_only=responses_only)
    ids = list(tokenizer(row["text"])["input_ids"])
    return _closed(Example(ids, list(ids)), tokenizer)


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row.get("messages", row.get("text")), list | str):
                    raise TypeError("neither 'messages' nor 'text'")
            except (ValueError, TypeError, AttributeError) as exc:
                raise InvalidFileError(
                    f"Line {number} of {path.name!r} is not a conversation ({exc})."
                ) from exc
            yield row


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise InvalidParameterError(
            "The tokenizer of the model has no chat template. Pass one as `chat_template` (Jinja text), "
            "or train a model that was made for chat."
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _marked(index: int, message: dict[str, str]) -> dict[str, str]:
    """Put the marks inside the outer white space: templates that trim must still find it at the ends."""
    text = message["content"]
    core = text.strip()
    before = text[: len(text) - len(text.lstrip())]
    after = text[len(before) + len(core) :]
    opening, closing = chr(_FIRST_MARK + 2 * index), chr(_FIRST_MARK + 2 * index + 1)
    return {**message, "content": f"{before}{opening}{core}{closing}{after}"}


def _plain(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)}


def _closed(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """End the row with the end-of-sequence token, where the template puts no end of turn itself."""
    eos = tokenizer.eos_token_id
    if eos is None or eos in example.input_ids[-2:]:
        return example
    return Example([*example.input_ids, eos], [*example.labels, eos])
