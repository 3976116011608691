"""Turns a conversations file into token ids, with a weight for each token."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.jobs.training.conversations import (
    ChatTemplate,
    Line,
    Message,
    parse_messages,
    read_lines,
    refuse_weights,
    unrendered_keys,
)
from openweights_prefect.jobs.training.spans import Span, locate

Mode = Literal["responses", "all", "weighted"]

_ROWS_AT_ONCE = 64


class TokenBlock(NamedTuple):
    """The tokens of one block of a message, `[start, end)`; `keys` is what else the row says of it."""

    message: int
    index: int  # type: ignore[assignment] # shadows `tuple.index`, which nobody asks a block for
    tag: str | None
    start: int
    end: int
    keys: dict[str, Any]


class Example(NamedTuple):
    """One row; `weights[i]` is that of predicting token i, so that of the first token is without effect."""

    input_ids: list[int]
    weights: list[float]
    blocks: list[TokenBlock]

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss is taken on."""
        return sum(weight != 0 for weight in itertools.islice(self.weights, 1, None))


@dataclass(frozen=True)
class Examples:
    """The rows of a file that can be trained on, and what happened to the rest.

    `eos_trained` counts the rows where the last trained text is followed by a trained end of turn.
    """

    rows: list[Example]
    truncated: int
    dropped: int
    total: int
    notes: list[str]
    eos_trained: int

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss is taken on."""
        return sum(row.trained_tokens for row in self.rows)


def load_examples(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    mode: Mode,
    responses_only: bool = True,
    keep_untrained: bool = False,
) -> Examples:
    """Read a JSONL file of conversations and texts, cut to `max_length` tokens.

    `responses_only` is for the mode `weighted`: whether a message that is a string and has no weight of its
    own has weight 0 unless it is the assistant's. Rows without a trained token are dropped and counted, or
    kept with `keep_untrained`, which also accepts a file that trains nothing.
    """
    encoder = _Encoder(tokenizer, mode, responses_only=responses_only)
    rows: list[Example] = []
    tally = _Tally()
    for row in _encoded(path, encoder):
        example = row.example
        if max_length is not None and len(example.input_ids) > max_length:
            example = _cut(example, max_length)
        trained = any(itertools.islice(example.weights, 1, None))
        tally.add(row, example, trained=trained)
        if trained or keep_untrained:
            rows.append(example)
    if not tally.total:
        raise InvalidFileError(f"The data file {path.name!r} is empty. Upload at least one conversation.")
    if not keep_untrained:
        tally.raise_if_meaningless(path.name, max_length)
    return Examples(
        rows,
        tally.truncated,
        tally.total - len(rows),
        tally.total,
        tally.notes(max_length),
        tally.eos_trained,
    )


def tokenize_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, mode: Mode, responses_only: bool = True
) -> Example:
    """Tokenize one row of a conversations file and weigh its tokens, without cutting it."""
    encoder = _Encoder(tokenizer, mode, responses_only=responses_only)
    return next(encoder.encode([Line("The row", row)])).example


class _Encoded(NamedTuple):
    """A row before it is cut; `ends` are the trained tokens that end a turn."""

    example: Example
    ends: list[int]
    is_text: bool
    lost: int
    unrendered: Counter[str]


class _Chat(NamedTuple):
    line: Line
    messages: list[Message]
    rendered: str
    spans: list[list[Span | None]]


class _Encoder:
    """Tokenizes rows: a few at once, which is faster with fast tokenizers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: Mode, *, responses_only: bool) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._mode = mode
        self._responses_only = responses_only

    def encode(self, lines: Sequence[Line]) -> Iterator[_Encoded]:
        """Yield the rows of these lines in order."""
        chats = [None if "text" in line.row else self._chat(line) for line in lines]
        rendered = [chat.rendered for chat in chats if chat is not None]
        if rendered:
            batch = self._tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
            tokens = iter(zip(batch["input_ids"], batch["offset_mapping"], strict=True))
        for line, chat in zip(lines, chats, strict=True):
            yield self._text(line) if chat is None else self._weigh(chat, *next(tokens))

    def _chat(self, line: Line) -> _Chat:
        if "messages" not in line.row and {"prompt", "chosen"} <= line.row.keys():
            raise InvalidFileError(
                f"{line.place} is a preference pair, which is for loss='dpo' or 'orpo'. Upload "
                'conversations: one {"messages": [...]} per line.'
            )
        if "messages" not in line.row:
            raise InvalidFileError(
                f"{line.place} has neither `messages` nor `text`; its keys are {sorted(line.row)}."
            )
        try:
            messages = parse_messages(line.row["messages"])
            if self._mode != "weighted":
                refuse_weights(messages)
            self._template.refuse_special(messages)
            roles = [message.role for message in messages]
            rendered = self._template.render(roles, [message.content for message in messages])
            spans = locate(
                rendered,
                [[block.text for block in message.blocks] for message in messages],
                lambda contents: self._template.render(roles, contents),
            )
        except ValueError as exc:
            if isinstance(exc, InvalidParameterError):
                raise
            raise InvalidFileError(f"{line.place}: {exc}.") from exc
        return _Chat(line, messages, rendered, spans)

    def _text(self, line: Line) -> _Encoded:
        text = line.row["text"]
        if not isinstance(text, str) or "messages" in line.row:
            raise InvalidFileError(f"{line.place} needs a string as `text`, and no `messages` beside it.")
        bos, eos = self._tokenizer.bos_token, self._tokenizer.eos_token_id
        begun = bos is not None and text.startswith(bos)
        ids = list(self._tokenizer(text, add_special_tokens=not begun)["input_ids"])
        if eos is not None and eos not in ids[-2:]:
            ids.append(eos)
        ends = [place for place in range(len(ids))[-2:] if ids[place] == eos]
        blocks = [TokenBlock(0, 0, None, 0, len(ids), {})]
        example = Example(ids, [1.0] * len(ids), blocks)
        return _Encoded(example, ends, is_text=True, lost=0, unrendered=Counter())

    def _weigh(self, chat: _Chat, ids: list[int], offsets: list[tuple[int, int]]) -> _Encoded:
        blocks = self._blocks(chat, ids, offsets)
        turns = _turns(blocks, ids, self._template.special_ids)
        weights = [1.0 if self._mode == "all" else 0.0] * len(ids)
        if self._mode == "responses":
            for turn in turns:
                if chat.messages[turn.message].role == "assistant":
                    weights[turn.start : turn.stop] = [1.0] * (turn.stop - turn.start)
        elif self._mode == "weighted":
            for block in blocks:
                weight = self._weight(chat.messages[block.message], block.index)
                weights[block.start : block.end] = [weight] * (block.end - block.start)
            for turn in turns:
                if turn.ended:
                    weights[turn.stop - 1] = self._weight(chat.messages[turn.message], -1)
        ends = [turn.stop - 1 for turn in turns if turn.ended and weights[turn.stop - 1]]
        closing = self._closing_weight(chat, turns, ids)
        if closing:
            ends.append(len(ids))
            ids, weights = [*ids, self._tokenizer.eos_token_id], [*weights, closing]
        texts = zip(chat.messages, chat.spans, strict=True)
        lost = sum(
            bool(block.text.strip()) and (span is None or span.start == span.end)
            for message, spans in texts
            for block, span in zip(message.blocks, spans, strict=True)
        )
        unrendered = unrendered_keys(chat.line.row["messages"])
        return _Encoded(Example(ids, weights, blocks), ends, is_text=False, lost=lost, unrendered=unrendered)

    def _blocks(self, chat: _Chat, ids: list[int], offsets: list[tuple[int, int]]) -> list[TokenBlock]:
        """The tokens of each block that was rendered, in the order of the text."""
        order = sorted(
            (span.start, span.end, message, index)
            for message, spans in enumerate(chat.spans)
            for index, span in enumerate(spans)
            if span is not None
        )
        stops = [stop for _, stop in offsets]
        if len(offsets) > 1 and stops[0] == 0:  # A space at the start, from a tokenizer that trims offsets.
            stops[0] = offsets[1][0]
        blocks: list[TokenBlock] = []
        taken = 0
        for start, end, message, index in order:
            # A token that is in two blocks belongs to the first.
            first, last = _token_range(start, end, offsets, stops)
            first = max(first, taken)
            # A special token may swallow white space of the text beside it; it is the template's still.
            while first < last and ids[first] in self._template.special_ids:
                first += 1
            while first < last and ids[last - 1] in self._template.special_ids:
                last -= 1
            taken = last = max(first, last)
            block = chat.messages[message].blocks[index]
            blocks.append(TokenBlock(message, index, block.tag, first, last, block.keys))
        return blocks

    def _weight(self, message: Message, index: int) -> float:
        weight = message.blocks[index].weight
        if weight is not None:
            return weight
        return 1.0 if message.in_blocks or message.role == "assistant" or not self._responses_only else 0.0

    def _closing_weight(self, chat: _Chat, turns: list[_Turn], ids: list[int]) -> float:
        """The weight of an end-of-sequence token to add where the template does not end the last turn."""
        eos, last = self._tokenizer.eos_token_id, len(chat.messages) - 1
        turn = next((turn for turn in turns if turn.message == last), None)
        if eos is None or eos in ids[-2:] or (turn is not None and turn.ended):
            return 0.0
        if self._mode == "all":
            return 0.0 if self._template.special_ids.intersection(ids[-2:]) else 1.0
        if turn is None:
            return 0.0
        if self._mode == "responses":
            return float(chat.messages[last].role == "assistant")
        return self._weight(chat.messages[last], -1)


class _Turn(NamedTuple):
    """The tokens of one message; `ended` says that the last of them is its end-of-turn token."""

    message: int
    start: int
    stop: int
    ended: bool


def _turns(blocks: list[TokenBlock], ids: list[int], special: frozenset[int]) -> list[_Turn]:
    """The messages with what the template puts between a text and the first special token after it."""
    messages = [list(group) for _, group in itertools.groupby(blocks, key=lambda block: block.message)]
    turns: list[_Turn] = []
    for group, following in itertools.zip_longest(messages, messages[1:]):
        message, start, stop = group[0].message, group[0].start, group[-1].end
        limit = following[0].start if following else len(ids)
        end = next((place for place in range(stop, limit) if ids[place] in special), None)
        turns.append(_Turn(message, start, stop if end is None else end + 1, end is not None))
    return turns


def _token_range(start: int, end: int, offsets: list[tuple[int, int]], stops: list[int]) -> tuple[int, int]:
    """The tokens with a character in `[start, end)`; characters in no token count for the one after them."""
    first = bisect_right(stops, start)
    if end <= start:
        return first, first
    last = min(bisect_left(stops, end) + 1, len(stops))
    while last < len(stops) and offsets[last][0] < end:  # Further bytes of the last character.
        last += 1
    return first, max(first, last)


def _encoded(path: Path, encoder: _Encoder) -> Iterator[_Encoded]:
    lines = read_lines(path)
    while batch := list(itertools.islice(lines, _ROWS_AT_ONCE)):
        yield from encoder.encode(batch)


def _cut(example: Example, length: int) -> Example:
    blocks = [block._replace(end=min(block.end, length)) for block in example.blocks if block.start < length]
    return Example(example.input_ids[:length], example.weights[:length], blocks)


@dataclass
class _Tally:
    """Counts what happened to the rows."""

    total: int = 0
    trained: int = 0
    truncated: int = 0
    cut_before_answer: int = 0
    ended: int = 0
    eos_trained: int = 0
    chats_ended: int = 0
    chats_end_trained: int = 0
    lost: int = 0
    unrendered: Counter[str] = field(default_factory=Counter)

    def add(self, row: _Encoded, example: Example, *, trained: bool) -> None:
        """Count a row before and after it was cut."""
        self.total += 1
        self.trained += trained
        self.truncated += len(example.input_ids) < len(row.example.input_ids)
        self.lost += row.lost
        self.unrendered += row.unrendered
        if not trained:
            self.cut_before_answer += any(itertools.islice(row.example.weights, 1, None))
            return
        text_stop = max(
            (block.end for block in row.example.blocks if any(row.example.weights[block.start : block.end])),
            default=0,
        )
        end_trained = any(
            end < len(example.input_ids) and (row.is_text or end >= text_stop) for end in row.ends
        )
        self.ended += bool(row.ends)
        self.eos_trained += end_trained
        self.chats_ended += bool(row.ends) and not row.is_text
        self.chats_end_trained += end_trained and not row.is_text

    def raise_if_meaningless(self, name: str, max_length: int | None) -> None:
        """Raise `InvalidFileError` when training on the file could teach nothing, or never to stop."""
        if not self.trained and self.cut_before_answer == self.total:
            raise InvalidFileError(
                f"Every row of {name!r} ({self.total}) is cut before what it trains begins. Raise "
                f"max_seq_length={max_length}, or shorten the rows."
            )
        if not self.trained:
            lost = f" {self._lost()}; a different `chat_template` may mend that." if self.lost else ""
            raise InvalidFileError(
                f"No token of the {self.total} conversations in {name!r} is trained on. Check that they hold "
                f"assistant messages, that these begin within max_seq_length={max_length} tokens, and that "
                f"not all weights are 0.{lost}"
            )
        if self.chats_ended and not self.chats_end_trained and self.truncated:
            raise InvalidFileError(
                f"No answer in {name!r} is trained to its end, so the model would never learn to stop: "
                f"{self.truncated} of {self.total} rows are cut. Raise max_seq_length={max_length}."
            )

    def notes(self, max_length: int | None) -> list[str]:
        """A sentence for each thing that a user may not have wanted."""
        notes = []
        if self.truncated:
            notes.append(
                f"{self.truncated} of {self.total} rows were cut to max_seq_length={max_length} tokens"
            )
        if self.trained < self.total:
            notes.append(
                f"{self.total - self.trained} of {self.total} rows have no token to train on"
                + (
                    f", {self.cut_before_answer} of them because they were cut"
                    if self.cut_before_answer
                    else ""
                )
            )
        if self.lost:
            notes.append(self._lost())
        if self.unrendered:
            keys = ", ".join(f"{key!r} ({count})" for key, count in sorted(self.unrendered.items()))
            notes.append(f"keys of messages that are not used: {keys}")
        if self.trained > self.eos_trained:
            notes.append(
                f"{self.trained - self.eos_trained} of {self.trained} trained rows train no end of turn "
                "after their last trained text"
            )
        return notes

    def _lost(self) -> str:
        return f"{self.lost} blocks are not, or not for certain, in what the chat template makes of their row"
