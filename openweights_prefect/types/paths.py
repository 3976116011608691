"""Relative paths that others named: mount targets, uploads, downloads.

A path that passes stays below the folder it is joined to, on every operating system.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

from openweights_prefect.errors import InvalidParameterError

_MAX_PATH_BYTES = 1024
_MAX_PART_BYTES = 255
_DRIVE = re.compile(r"[A-Za-z]:")
# Windows opens a device for these, with any extension, in any folder.
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
# Cc: control characters; Cs: surrogates, which UTF-8 has not; Zl, Zp: line breaks of their own.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Overrides of the writing direction make a name look like another one.
_REFUSED_CHARACTERS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def safe_relative_path(text: str) -> PurePosixPath:
    """Return `text` as a normal relative path, or raise `InvalidParameterError` saying why it is refused.

    `./a//b/` becomes `a/b`. Refused are paths that are absolute, climb (`..`), name nothing, are too long,
    or hold backslashes, control or direction characters, a drive letter or a Windows device name.
    """
    reason = _refusal(text)
    if reason:
        raise InvalidParameterError(
            f"Path {text!r:.200} is not allowed: {reason}. Use a relative path like `data/a.jsonl`."
        )
    return PurePosixPath(text)


def _refusal(text: str) -> str | None:
    if not isinstance(text, str):
        return f"it is of type {type(text).__name__}, not a string"
    if any(unicodedata.category(char) in _REFUSED_CATEGORIES or char in _REFUSED_CHARACTERS for char in text):
        return "it holds control characters"
    if "\\" in text:
        return "it holds a backslash; separate folders with `/`"
    if text.startswith("/"):
        return "it is absolute"
    if _DRIVE.match(text):
        return "it starts with a drive letter"
    parts = PurePosixPath(text).parts
    if not parts:
        return "it names no file"
    if len(str(PurePosixPath(text)).encode()) > _MAX_PATH_BYTES:
        return f"it is longer than {_MAX_PATH_BYTES} bytes"
    return next(filter(None, map(_part_refusal, parts)), None)


def _part_refusal(part: str) -> str | None:
    # Windows drops dots and spaces at the end of a name: `.. ` climbs there.
    if part == ".." or not part.rstrip(". "):
        return f"the part {part!r} does not name a file below the folder"
    if len(part.encode()) > _MAX_PART_BYTES:
        return f"the part {part[:40]!r}... is longer than {_MAX_PART_BYTES} bytes"
    if _WINDOWS_DEVICE.fullmatch(part.rstrip(". ")):
        return f"the part {part!r} is a device on Windows"
    return None
