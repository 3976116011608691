"""Replaces the values of a run's secrets in what it shows to others: its log, its events, its errors."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"
MIN_CHARACTERS = 8
"""Shorter values are let through: they would black out half of a log, and can be guessed anyway."""

_MASK = MASK.encode()
_BLOCK_BYTES = 1 << 20


class Redaction:
    """Knows the values, each line of those with several, and how they look in JSON, URLs and base64.

    It finds what a job shows by accident. A job that wants to show a secret can: it may spell it backwards.
    """

    def __init__(self, values: Iterable[str]) -> None:
        needles = {needle for value in values for needle in _needles(value)}
        # The longest first: a value may be a part of another one.
        self._needles = sorted(needles, key=len, reverse=True)
        self._texts = [needle.decode() for needle in self._needles]
        self._any = re.compile(b"|".join(map(re.escape, self._needles)))

    def __bool__(self) -> bool:
        return bool(self._needles)

    def text(self, text: str) -> str:
        """The text without them; an end that begins one was perhaps cut, and is left out, too."""
        if len(text) < MIN_CHARACTERS:
            return text
        for needle in self._texts:
            head = needle[:MIN_CHARACTERS]
            if head in text:
                text = text.replace(needle, MASK)
                if (at := text.rfind(head)) >= 0 and needle.startswith(text[at:]):
                    text = text[:at] + MASK
        return text

    def data(self, value: Any) -> Any:
        """A JSON value without them, in keys, too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(key): self.data(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.data(item) for item in value]
        return value

    def piece(self, piece: bytes, *, last: bool = False) -> tuple[bytes, int]:
        """A piece of a log without them, and how many bytes of it that is.

        An end that may begin a value is left for the next piece; in the last one it is masked.
        """
        found = self._find(piece)
        cut = self._cut(piece, found)
        if last and len(piece) - cut >= MIN_CHARACTERS:
            found = [span for span in found if span[1] <= cut] + [(cut, len(piece))]
        if last:
            cut = len(piece)
        shown, at = [], 0
        for start, end in found:
            if end <= cut:
                shown += [piece[at:start], _MASK]
                at = end
        return b"".join([*shown, piece[at:cut]]), cut

    def copy(self, source: Path, target: Path) -> None:
        """Write a file's content without them into a new file that only its owner can read."""
        target.touch(mode=0o600)
        with source.open("rb") as reader, target.open("wb") as writer:
            rest = b""
            while block := reader.read(_BLOCK_BYTES):
                rest += block
                shown, taken = self.piece(rest)
                writer.write(shown)
                rest = rest[taken:]
            writer.write(self.piece(rest, last=True)[0])

    def _find(self, piece: bytes) -> list[tuple[int, int]]:
        """Where whole values are."""
        if not any(needle in piece for needle in self._needles):  # far faster than the expression
            return []
        return [match.span() for match in self._any.finditer(piece)]

    def _cut(self, piece: bytes, found: Sequence[tuple[int, int]]) -> int:
        """Where the longest end of the piece begins that a value may begin with, outside of whole values."""
        cut = len(piece)
        for needle in self._needles:
            at = max(0, len(piece) - len(needle) + 1)
            while 0 <= (at := piece.find(needle[:1], at)) < cut:
                if needle.startswith(piece[at:]) and not any(start < at < end for start, end in found):
                    cut = at
                at += 1
        return cut


def redact_logging(redaction: Redaction) -> None:
    """Take the values out of all that this process logs from here on, whoever handles it."""
    make, trace = logging.getLogRecordFactory(), logging.Formatter()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit: logging will say so
            record.msg, record.args = redaction.text(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redaction.text(trace.formatException(record.exc_info))
        return record

    logging.setLogRecordFactory(make_redacted)


def _needles(value: str) -> Iterator[bytes]:
    for part in {value, value.strip(), *(line.strip() for line in value.splitlines())}:
        if len(part) >= MIN_CHARACTERS:
            plain = part.encode()
            yield plain
            yield json.dumps(part)[1:-1].encode()
            yield json.dumps(part, ensure_ascii=False)[1:-1].encode()
            yield from _in_urls(part)
            yield from _in_base64(plain)


def _in_urls(part: str) -> Iterator[bytes]:
    for encoded in (quote(part, safe=""), quote(part), quote_plus(part)):
        yield encoded.encode()
        yield _small_escapes(encoded).encode()


def _small_escapes(encoded: str) -> str:
    """`%2F` is `%2f` for some."""
    first, *rest = encoded.split("%")
    return "%".join([first, *(each[:2].lower() + each[2:] for each in rest)])


def _in_base64(plain: bytes) -> Iterator[bytes]:
    """By itself, and within something longer, where it may begin at any of three places of a group."""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        yield encode(plain).rstrip(b"=")
        for before in range(3):
            whole = (before + len(plain)) // 3 * 4  # Characters that what follows cannot change.
            inner = encode(bytes(before) + plain)[:whole][(0, 2, 3)[before] :]
            if len(inner) >= MIN_CHARACTERS:
                yield inner
