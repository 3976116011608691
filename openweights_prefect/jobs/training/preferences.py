"""Turns a preference file into token ids: a prompt and two answers to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.jobs.training.conversations import (
    ChatTemplate,
    Line,
    Message,
    parse_messages,
    read_lines,
    refuse_weights,
)

_KEYS = ("prompt", "chosen", "rejected")


class Pair(NamedTuple):
    """One row; every token of the answers counts, the end of turn included."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a file that can be trained on, and what happened to the rest."""

    rows: list[Pair]
    truncated: int
    dropped: int
    total: int
    notes: list[str]


def load_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None) -> Pairs:
    """Read a JSONL file of preferences; prompt and answer together are cut at the end to `max_length`.

    Pairs whose prompt leaves no room for an answer are dropped and counted.
    """
    template = ChatTemplate(tokenizer)
    tally = _Tally(path.name, max_length)
    rows: list[Pair] = []
    for line in read_lines(path):
        whole = _pair(line, tokenizer, template)
        pair = whole if max_length is None else _cut(whole, max_length)
        kept = bool(pair.chosen_ids and pair.rejected_ids)
        tally.add(whole, pair, kept=kept)
        if kept:
            rows.append(pair)
    tally.raise_if_meaningless()
    return Pairs(rows, tally.truncated, tally.total - tally.kept, tally.total, tally.notes())


def _pair(line: Line, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> Pair:
    if not line.row.keys() >= set(_KEYS):
        raise InvalidFileError(
            f"{line.place} is not a preference pair; its keys are {sorted(line.row)}. Upload a file with "
            "`prompt`, `chosen` and `rejected` in every line, or use loss='sft' for conversations."
        )
    try:
        prompt, chosen, rejected = (parse_messages(line.row[key], key) for key in _KEYS)
        for messages in (prompt, chosen, rejected):
            refuse_weights(messages)
            template.refuse_special(messages)
        return _tokenized(prompt, chosen, rejected, tokenizer, template)
    except InvalidParameterError:
        raise
    except ValueError as exc:
        raise InvalidFileError(f"{line.place}: {exc}.") from exc


def _tokenized(
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
) -> Pair:
    """The completion begins where the tokens of the prompt and of the whole differ, as in TRL."""
    question = _render(prompt, template, generation_prompt=prompt[-1].role != "assistant")
    texts = [question, _render([*prompt, *chosen], template), _render([*prompt, *rejected], template)]
    for name, text in zip(_KEYS[1:], texts[1:], strict=True):
        if not text.startswith(question):
            raise ValueError(
                f"the chat template renders the prompt differently when `{name}` follows: what ends "
                f"with {question[-40:]!r} is not the beginning of the whole. Give another `chat_template`"
            )
    asked, one, other = tokenizer(texts, add_special_tokens=False)["input_ids"]
    length = min(_common_length(asked, one), _common_length(asked, other))
    chosen_ids, rejected_ids = (_closed(list(ids[length:]), tokenizer, template) for ids in (one, other))
    return Pair(list(asked[:length]), chosen_ids, rejected_ids)


def _render(messages: list[Message], template: ChatTemplate, *, generation_prompt: bool = False) -> str:
    return template.render(
        [message.role for message in messages],
        [message.content for message in messages],
        generation_prompt=generation_prompt,
    )


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[int]:
    """End an answer with the end-of-sequence token, where the template puts no end of turn."""
    place = len(ids)
    while place and not tokenizer.decode(ids[place - 1]).strip():
        place -= 1
    ended = place > 0 and ids[place - 1] in template.special_ids
    return ids if ended or tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _common_length(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _cut(pair: Pair, length: int) -> Pair:
    room = max(0, length - len(pair.prompt_ids))
    return Pair(pair.prompt_ids[:length], pair.chosen_ids[:room], pair.rejected_ids[:room])


@dataclass
class _Tally:
    """Counts what happened to the pairs."""

    name: str
    max_length: int | None
    total: int = 0
    kept: int = 0
    truncated: int = 0
    equal: int = 0
    ended: int = 0

    def add(self, whole: Pair, pair: Pair, *, kept: bool) -> None:
        """Count a pair before and after it was cut."""
        self.total += 1
        self.kept += kept
        self.truncated += pair != whole
        self.equal += kept and pair.chosen_ids == pair.rejected_ids
        self.ended += kept and len(pair.chosen_ids) == len(whole.chosen_ids)

    def raise_if_meaningless(self) -> None:
        """Raise `InvalidFileError` when the pairs could teach nothing, or never to stop."""
        limit = f"max_seq_length={self.max_length}"
        if not self.total:
            raise InvalidFileError(
                f"The data file {self.name!r} is empty. Upload at least one preference pair."
            )
        if not self.kept:
            raise InvalidFileError(
                f"Every prompt in {self.name!r} ({self.total}) fills {limit} tokens, so nothing of the "
                "answers is left. Raise it, or shorten the prompts."
            )
        if self.equal == self.kept:
            raise InvalidFileError(
                f"In every pair of {self.name!r} the chosen and the rejected answer are the same"
                + (f" within {limit} tokens" if self.truncated else "")
                + ", so there is no preference to learn."
            )
        if not self.ended:
            raise InvalidFileError(
                f"No chosen answer in {self.name!r} is trained to its end, so the model would never learn to "
                f"stop. Raise {limit}."
            )

    def notes(self) -> list[str]:
        """A sentence for each thing that a user may not have wanted."""
        limit = f"max_seq_length={self.max_length} tokens"
        dropped = self.total - self.kept
        return [
            f"{count} of {self.total} pairs {what}"
            for count, what in (
                (self.truncated - dropped, f"were cut to {limit}"),
                (dropped, f"were left out: their prompt fills {limit}"),
                (self.equal, "have the same chosen and rejected answer"),
            )
            if count
        ]
