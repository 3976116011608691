"""Check a JSONL data file against the format of its purpose, line by line, in memory that does not grow."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.files.hashing import open_file

MAX_LINE_BYTES = 64 << 20

_NAMED_LINES = 10
_ROLES = ("system", "user", "assistant")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Problem(Exception):
    """What is wrong with one row."""


def validate_jsonl(source: Path | BinaryIO, purpose: str) -> None:
    """Raise `InvalidFileError` naming the first ten bad lines, and how many more there are.

    Only `conversations` and `preference` have a format; any other purpose passes unread. A stream is read
    from its current position to its end and not rewound.
    """
    check_row = _ROW_CHECKS.get(purpose)
    if check_row is None:
        return
    if isinstance(source, Path):
        with open_file(source) as stream:
            _validate(stream, check_row, purpose, name=str(source))
    else:
        _validate(source, check_row, purpose, name=str(getattr(source, "name", "the stream")))


@dataclass
class _Report:
    lines: list[str] = field(default_factory=list)
    bad: int = 0

    def add(self, number: int, problem: object) -> None:
        self.bad += 1
        if len(self.lines) < _NAMED_LINES:
            self.lines.append(f"  line {number}: {problem}")

    def raise_if_bad(self, purpose: str, name: str) -> None:
        if not self.bad:
            return
        rest = [f"  and {self.bad - len(self.lines)} more"] if self.bad > len(self.lines) else []
        lines = "line" if self.bad == 1 else "lines"
        head = f"File {name!r} does not have the format of purpose {purpose!r}: {self.bad} bad {lines}."
        raise InvalidFileError("\n".join([head, *self.lines, *rest]))


def _validate(stream: BinaryIO, check_row: Callable[[Any], None], purpose: str, *, name: str) -> None:
    report = _Report()
    blank = range(0)
    rows = 0
    for number, line in enumerate(_lines(stream), start=1):
        if line is not None and not line.strip():
            blank = range(blank.start or number, number + 1)
            continue
        for blank_number in blank:
            report.add(blank_number, "is blank; only the end of a file may have blank lines")
        blank = range(0)
        rows += 1
        try:
            check_row(_parsed(line))
        except _Problem as problem:
            report.add(number, problem)
    report.raise_if_bad(purpose, name)
    if not rows:
        raise InvalidFileError(
            f"File {name!r} has no rows; purpose {purpose!r} needs one JSON object per line."
        )


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield each line; None stands for one that is too long to hold."""
    first = True
    while True:
        line = stream.readline(MAX_LINE_BYTES + 1)
        if not isinstance(line, bytes):
            raise InvalidParameterError(
                f"The stream gave {type(line).__name__}, not bytes; open the file with mode 'rb'."
            )
        if not line:
            return
        if first:
            line, first = line.removeprefix(codecs.BOM_UTF8), False
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
        yield None


def _parsed(line: bytes | None) -> Any:
    if line is None:
        raise _Problem(f"is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as exc:
        raise _Problem(f"is not UTF-8 (byte {exc.start + 1}: {exc.reason})") from exc
    except json.JSONDecodeError as exc:
        raise _Problem(f"is not JSON ({exc.msg} at column {exc.colno})") from exc
    except ValueError as exc:
        raise _Problem(f"is not JSON that can be read ({exc})") from exc
    except RecursionError as exc:
        raise _Problem("is nested too deeply") from exc
    if _ESCAPED_SURROGATE.search(line) and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise _Problem("holds half of a surrogate pair (an escape like \\ud83d alone), which is not text")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_conversation(row: Any) -> None:
    _require(isinstance(row, dict), "is {} instead of an object", row)
    if "messages" in row and "text" in row:
        raise _Problem("has both `messages` and `text`; keep one")
    if "messages" in row:
        _check_messages(row["messages"], "messages")
    elif "text" in row:
        _require(isinstance(row["text"], str), "text is {} instead of a string", row["text"])
    else:
        raise _Problem(f"has neither `messages` nor `text`; its keys are {_shown(list(row))}")


def _check_preference(row: Any) -> None:
    _require(isinstance(row, dict), "is {} instead of an object", row)
    for key in ("prompt", "chosen", "rejected"):
        if key not in row:
            raise _Problem(f"has no `{key}`; its keys are {_shown(list(row))}")
        _check_messages(row[key], key)


def _check_messages(messages: Any, path: str) -> None:
    _require(isinstance(messages, list), path + " is {} instead of a list of messages", messages)
    if not messages:
        raise _Problem(f"{path} is empty; give at least one message")
    for index, message in enumerate(messages):
        _check_message(message, f"{path}[{index}]")


def _check_message(message: Any, path: str) -> None:
    _require(
        isinstance(message, dict), path + " is {} instead of an object with `role` and `content`", message
    )
    role = message.get("role")
    _require(role in _ROLES, f"{path}.role is {{}}; use 'system', 'user' or 'assistant'", role)
    content = message.get("content")
    if isinstance(content, str):
        return
    _require(
        isinstance(content, list), path + ".content is {} instead of a string or a list of blocks", content
    )
    for index, block in enumerate(content):
        _check_block(block, f"{path}.content[{index}]")


def _check_block(block: Any, path: str) -> None:
    _require(isinstance(block, dict), path + " is {} instead of an object with `text`", block)
    _require(isinstance(block.get("text"), str), path + ".text is {} instead of a string", block.get("text"))
    weight, tag = block.get("weight"), block.get("tag")
    # Compared, not converted: JSON integers can be too large for a float.
    number = type(weight) in (int, float) and abs(weight) <= sys.float_info.max
    _require(weight is None or number, path + ".weight is {} instead of a finite number", weight)
    _require(tag is None or isinstance(tag, str), path + ".tag is {} instead of a string", tag)


def _require(condition: bool, message: str, value: Any) -> None:
    if not condition:
        raise _Problem(message.format(_shown(value)))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_ROW_CHECKS: dict[str, Callable[[Any], None]] = {
    "conversations": _check_conversation,
    "preference": _check_preference,
}
