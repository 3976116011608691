"""Reads the rows of a data file, and renders them with the chat template."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from openweights_prefect.errors import InvalidFileError, InvalidParameterError

_RENDERED_KEYS = {"role", "content", "weight", "tag"}
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Block(NamedTuple):
    """A part of a message's text; `weight` and `tag` are None when the row does not give them."""

    text: str
    weight: float | None = None
    tag: str | None = None
    keys: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Message(NamedTuple):
    """One message; a content that is a string is one block, with the weight of the message."""

    role: str
    blocks: tuple[Block, ...]
    in_blocks: bool

    @property
    def content(self) -> str:
        """The whole text."""
        return "".join(block.text for block in self.blocks)


class Line(NamedTuple):
    """One row of a data file, and where it stands for messages of errors."""

    place: str
    row: dict[str, Any]


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the rows one by one; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"Line {number} of {path.name!r}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if _LONE_SURROGATE.search(line):
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as exc:
                raise InvalidFileError(f"{place} cannot be read as JSON ({exc}). Mend the line.") from exc
            if not isinstance(row, dict):
                raise InvalidFileError(f"{place} is {_shown(row)}, not an object. Write one object per line.")
            yield Line(place, row)


def parse_messages(messages: Any, name: str = "messages") -> list[Message]:
    """Check the messages of a row; a `ValueError` says what is wrong with which of them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is {_shown(messages)} instead of a list with at least one message")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def unrendered_keys(messages: Sequence[dict[str, Any]]) -> Counter[str]:
    """How often each key of messages that no template gets to see is there."""
    return Counter(key for message in messages for key in message.keys() - _RENDERED_KEYS)


def refuse_weights(messages: Sequence[Message]) -> None:
    """Raise `ValueError` when a weight would be ignored."""
    for index, message in enumerate(messages):
        weight = next((block.weight for block in message.blocks if block.weight not in (None, 1)), None)
        if weight is not None:
            raise ValueError(
                f"message {index} has weight {weight:g}, which this job would ignore. Use `ow.weighted_sft`, "
                "or take the weights out"
            )


class ChatTemplate:
    """The chat template of a tokenizer, and which tokens only it may write."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        special = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        special.update(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
        # The unknown token stands for text of the user's, unless it has another meaning too.
        unknown = tokenizer.unk_token_id
        if unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
            special.pop(unknown, None)
        self.special_ids = frozenset(special)
        texts = sorted((text for text in special.values() if text), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

    def render(
        self, roles: Sequence[str], contents: Sequence[str], *, generation_prompt: bool = False
    ) -> str:
        """Render a conversation; a `ValueError` tells why the template refuses it."""
        if not self._tokenizer.chat_template:
            raise InvalidParameterError(
                "The tokenizer of the model has no chat template. Pass one as `chat_template` (Jinja text), "
                "or train a model that was made for chat."
            )
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except TemplateSyntaxError as exc:
            raise InvalidParameterError(f"The chat template is not valid Jinja ({exc}).") from exc
        except (TemplateError, TypeError) as exc:
            raise ValueError(f"the chat template refuses it: {exc}") from exc

    def refuse_special(self, messages: Sequence[Message]) -> None:
        """Raise `ValueError` when a text of the user's would become a token that only the template writes."""
        if self._special is None:
            return
        for index, message in enumerate(messages):
            content = message.content
            found = self._special.search(content)
            if found is None:
                continue
            ids = self._tokenizer(content, add_special_tokens=False)["input_ids"]
            if not self.special_ids.isdisjoint(ids):
                raise ValueError(
                    f"message {index} ({message.role}) holds {found.group()!r}, which the tokenizer reads "
                    "as a special token, not as text. Take it out or spell it differently"
                )


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{name} is {_shown(message)} instead of an object with `role` and `content`")
    content, tag = message.get("content"), message.get("tag")
    if isinstance(content, str):
        weight = _weight(message.get("weight"), name)
        return Message(message["role"], (Block(content, weight, tag),), in_blocks=False)
    if not isinstance(content, list):
        raise ValueError(f"{name}.content is {_shown(content)} instead of a string or a list of blocks")
    blocks = tuple(_block(block, f"{name}.content[{index}]") for index, block in enumerate(content))
    return Message(message["role"], blocks or (Block(""),), in_blocks=bool(blocks))


def _block(block: Any, name: str) -> Block:
    if not isinstance(block, dict) or not isinstance(block.get("text"), str):
        raise ValueError(f"{name} is {_shown(block)} instead of an object with `text`")
    keys = {key: value for key, value in block.items() if key not in ("type", "text", "tag")}
    return Block(block["text"], _weight(block.get("weight"), name), block.get("tag"), keys)


def _weight(weight: Any, name: str) -> float | None:
    if weight is None:
        return None
    # Compared, not converted: JSON integers can be too large for a float.
    number = type(weight) in (int, float) and abs(weight) <= sys.float_info.max
    if not number:
        raise ValueError(f"{name}.weight is {_shown(weight)} instead of a finite number")
    return float(weight)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
