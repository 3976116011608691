from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.types.paths import safe_relative_path

HOSTILE = [
    "", ".", "./", "./.", "/", "/etc/passwd", "//server/share", "..", "../a", "a/..", "a/../b",
    "a/../../b", "../../escape.txt",
    "..\\a", "a\\b", "\\\\server\\share", "C:", "C:a", "c:/a", "z:\\a", "a\x00", "\x00", "a\nb", "a\rb",
    "a\tb", "\x1b[31m",
    "a\x7f", "a\x85b", "a\u2028b", "a\u202egpj.exe", "\ud800", "... ", "...", " ", "a/ /b", ".. /a",
    "a/.. ./b",
    "con", "CON", "a/nul", "nul.txt", "aux.tar.gz", "Com1", "lpt9.log", "com¹", "conin$", "prn ",
    "prn .txt", "nul.", "x" * 256,
    "é" * 128, "a/" * 513 + "b",
]  # fmt: skip

FINE = {
    "a": "a", "./a": "a", "a//b/": "a/b", "a/./b": "a/b", ".hidden": ".hidden", "a b.jsonl": "a b.jsonl",
    "..a/b..": "..a/b..",
    "x" * 255: "x" * 255, "a/" * 511 + "bc": "a/" * 511 + "bc", "console/auxiliary": "console/auxiliary",
    "com10": "com10",
    "2026-01-01T10:00.json": "2026-01-01T10:00.json", "日本/été.txt": "日本/été.txt", "~/a": "~/a",
    "$HOME/a": "$HOME/a", "-rf": "-rf",
}  # fmt: skip


@pytest.mark.parametrize("text", [*HOSTILE, None, 3, b"a", Path("a")])
def test_hostile_paths_are_refused(text: Any) -> None:
    """Nothing that climbs, hides or names a device passes."""
    with pytest.raises(InvalidParameterError, match="is not allowed"):
        safe_relative_path(text)


@pytest.mark.parametrize(("text", "normal"), FINE.items())
def test_ordinary_paths_pass(text: str, normal: str) -> None:
    """Odd but harmless names pass, in their normal spelling."""
    assert str(safe_relative_path(text)) == normal


@given(st.text(st.sampled_from("a.~/\\: \x00\u202eCONnul$1") | st.characters(), max_size=12))
def test_what_passes_stays_in_the_folder(text: str) -> None:
    """Joined to a folder, on POSIX and on Windows, a path that passed is below it."""
    try:
        path = safe_relative_path(text)
    except InvalidParameterError:
        return
    assert os.path.normpath(f"/root/{path}").startswith("/root/")
    windows = PureWindowsPath("D:/root") / str(path)
    assert windows.is_relative_to("D:/root")
    assert ".." not in windows.parts
    assert not windows.is_reserved()
    assert safe_relative_path(str(path)) == path
