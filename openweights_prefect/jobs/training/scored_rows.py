"""The rows of a dataset whose log-probabilities are measured, and what is written down about each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.training.conversations import read_lines
from openweights_prefect.jobs.training.examples import Example, Mode, TokenBlock, load_examples


class ScoredRow(NamedTuple):
    """A row as it was uploaded, and its tokens."""

    row: dict[str, Any]
    example: Example


@dataclass(frozen=True)
class ScoredRows:
    """The rows of a file in its order; `in_blocks` says how the content of its first message is written."""

    rows: list[ScoredRow]
    in_blocks: bool
    truncated: int
    notes: list[str]

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of each row."""
        return [row.example.input_ids for row in self.rows]


def data_path(file_id: str, files: Mapping[str, str]) -> Path:
    """Where a data file was mounted."""
    path = Path(files.get(file_id, ""))
    if not path.is_file():
        raise InvalidParameterError(
            f"The data file {file_id!r} is not in the job folder. Submit the job again."
        )
    return path


def load_scored_rows(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, flat: Mode, max_length: int | None
) -> ScoredRows:
    """Read and tokenize every row; `flat` is the mode of a file whose messages are plain strings."""
    rows = [line.row for line in read_lines(path)]
    in_blocks = bool(rows) and _in_blocks(rows[0])
    mode = "weighted" if in_blocks else flat
    loaded = load_examples(path, tokenizer, max_length=None, mode=mode, keep_untrained=True)
    examples, truncated, notes = loaded.rows, 0, list(loaded.notes)
    if max_length is not None:
        truncated = sum(len(example.input_ids) > max_length for example in examples)
        examples = [_cut(example, max_length) for example in examples]
    if truncated:
        notes.append(f"{truncated} of {len(rows)} rows were cut to max_seq_length={max_length} tokens")
    scored = [ScoredRow(row, example) for row, example in zip(rows, examples, strict=True)]
    return ScoredRows(scored, in_blocks, truncated, notes)


@dataclass
class Nll:
    """The mean negative log-likelihood over all trained tokens, those of a positive weight."""

    tokens: int = 0
    _sums: list[float] = field(default_factory=list)

    def add(self, example: Example, logprobs: Sequence[float]) -> None:
        """Add a row; `logprobs` begins with the second token."""
        trained = [-value for value, weight in zip(logprobs, example.weights[1:], strict=True) if weight > 0]
        self.tokens += len(trained)
        self._sums.append(sum(trained))

    @property
    def mean(self) -> float:
        """NaN when there is no trained token."""
        if not self.tokens:
            return math.nan
        if not all(map(math.isfinite, self._sums)):
            return sum(self._sums) / self.tokens
        return math.fsum(self._sums) / self.tokens


class Records:
    """Writes rows down with their log-probabilities, as values that JSON can hold."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text = lru_cache(maxsize=100_000)(lambda token_id: str(tokenizer.decode([token_id])))

    def with_tokens(self, scored: ScoredRow, logprobs: Sequence[float]) -> dict[str, Any]:
        """The row and `tokens`, which begin with the second: the first one is not predicted."""
        ids = scored.example.input_ids[1:]
        tokens = [
            {"token": self._text(token_id), "token_id": token_id, "logp": finite(value)}
            for token_id, value in zip(ids, logprobs, strict=True)
        ]
        return {**scored.row, "tokens": tokens}

    @staticmethod
    def with_blocks(scored: ScoredRow, logprobs: Sequence[float]) -> dict[str, Any]:
        """The row, each block with the sum of its tokens as `logprobs` and its `range` in `tokens`.

        Both are None for a block that the template left out or that was cut off; a block that says
        `logprobs: false` keeps that.
        """
        places = {(block.message, block.index): block for block in scored.example.blocks}
        messages = []
        for number, message in enumerate(scored.row.get("messages", [])):
            content = message["content"]
            if isinstance(content, list):
                content = [
                    _scored_block(block, places.get((number, index)), logprobs)
                    for index, block in enumerate(content)
                ]
            messages.append({**message, "content": content})
        return {**scored.row, "messages": messages} if messages else scored.row


def tagged_blocks(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The blocks with a tag of a row from `Records.with_blocks`."""
    for message in record.get("messages", []):
        if isinstance(message["content"], list):
            yield from (block for block in message["content"] if block.get("tag"))


def to_json(record: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(record, separators=(",", ":"))


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinities."""
    return value if math.isfinite(value) else None


def _in_blocks(row: dict[str, Any]) -> bool:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return False
    return isinstance(messages[0].get("content"), list)


def _scored_block(
    block: dict[str, Any], place: TokenBlock | None, logprobs: Sequence[float]
) -> dict[str, Any]:
    places = range(max(place.start - 1, 0), max(place.end - 1, 0)) if place else None
    scored = {**block, "range": [places.start, places.stop] if places is not None else None}
    if block.get("logprobs") is not False:
        total = None if places is None else sum(logprobs[places.start : places.stop])
        scored["logprobs"] = None if total is None else finite(total)
    return scored


def _cut(example: Example, length: int) -> Example:
    blocks = [block for block in example.blocks if block.end <= length]
    return Example(example.input_ids[:length], example.weights[:length], blocks)
