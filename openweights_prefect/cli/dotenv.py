"""Reads `.env` files: the part of python-dotenv's syntax that means the same to everybody."""

from __future__ import annotations

import re
from collections.abc import Iterator

from openweights_prefect.errors import InvalidFileError

_SHOWN_ERRORS = 10
_NAME = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]{0,99})[ \t]*=[ \t]*")
_QUOTED = {
    "'": re.compile(r"'((?:[^'\\]|\\.)*)'[ \t]*(?:#[^\n]*)?(?=\n|\Z)", re.DOTALL),
    '"': re.compile(r'"((?:[^"\\]|\\.)*)"[ \t]*(?:#[^\n]*)?(?=\n|\Z)', re.DOTALL),
}
_COMMENT = re.compile(r"\s+#.*")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "'": "'", "$": "$"}
_SINGLE_QUOTED_ESCAPE = re.compile(r"\\([\\'])")


class _LineError(Exception):
    """What is wrong with a line; never its value."""


def parse_dotenv(text: str, *, source: str) -> dict[str, str]:
    """The variables of a `.env` file, in order.

    Lines are `NAME=value`, `export NAME=value`, empty, or comments. Single quotes keep everything as it is,
    double quotes know `\\n`, `\\t`, `\\"`, `\\\\` and `\\$`; both may span lines. `${OTHER}` is not replaced,
    and an error where other readers would. Raises `InvalidFileError` naming every bad line, without values.
    """
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    errors: list[str] = []
    for line, name, value in _assignments(text.removeprefix("\ufeff").replace("\r\n", "\n")):
        if isinstance(value, _LineError):
            errors.append(f"line {line}: {value}")
        elif name in values:
            errors.append(f"line {line}: {name} is set again; line {lines[name]} has it already")
        else:
            values[name], lines[name] = value, line
    if errors:
        rest = f"\n  and {len(errors) - _SHOWN_ERRORS} more" if len(errors) > _SHOWN_ERRORS else ""
        listed = "\n  ".join(errors[:_SHOWN_ERRORS])
        raise InvalidFileError(f"{source!r} cannot be imported; nothing was stored.\n  {listed}{rest}")
    return values


def _assignments(text: str) -> Iterator[tuple[int, str, str | _LineError]]:
    """Line number, name and value, or what is wrong there; goes on with the next line after an error."""
    position = 0
    while position < len(text):
        end = text.find("\n", position)
        end = len(text) if end == -1 else end
        start = position + len(text[position:end]) - len(text[position:end].lstrip())
        position = end + 1
        if start == end or text[start] == "#":
            continue
        line = text.count("\n", 0, start) + 1
        match = _NAME.match(text, start, end)
        if match is None:
            yield line, "", _LineError(_why_no_name(text[start:end]))
            continue
        try:
            value, after = _value(text, match.end(), end)
        except _LineError as error:
            yield line, match[1], error
            continue
        position = max(position, after + 1)
        yield line, match[1], value or _LineError(f"{match[1]} has no value; give it one or remove the line")


def _value(text: str, start: int, end: int) -> tuple[str, int]:
    """The value that begins at `start`, and where it ends."""
    quote = text[start] if start < end else ""
    if quote not in _QUOTED:
        value = _COMMENT.sub("", text[start:end]).strip()
        _refuse_references(value)
        return "" if value.startswith("#") else value, end
    match = _QUOTED[quote].match(text, start)
    if match is None:
        raise _LineError(f"the value begins with {quote} and does not end with it, or something follows it")
    if quote == "'":
        return _SINGLE_QUOTED_ESCAPE.sub(r"\1", match[1]), match.end()
    _refuse_references(match[1].replace("\\$", ""))
    return _ESCAPE.sub(_unescape, match[1]), match.end()


def _refuse_references(value: str) -> None:
    if "${" in value:
        raise _LineError("`${...}` is not replaced here; write what it stands for, or use single quotes")


def _unescape(match: re.Match[str]) -> str:
    try:
        return _ESCAPES[match[1]]
    except KeyError:
        raise _LineError(f"`\\{match[1]}` means nothing in double quotes; use single quotes") from None


def _why_no_name(line: str) -> str:
    """The line may be a secret that lost its name: nothing of it is repeated."""
    if "=" not in line:
        return "there is no `=`; write NAME=value"
    return "what is before `=` is no name; use letters, digits and `_`, at most 100, no digit first"
