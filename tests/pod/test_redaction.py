from __future__ import annotations

import base64
import json
import logging
import re
import stat
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights_prefect.pod.redaction import MASK, Redaction, redact_logging

TOKEN = "hf_AbCdEfGhIjKlMnOpQr"
PASSWORD = 'p\u00e4ss "w\\rd" /&+%?'
KEY = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqG\nshort\nSM49AgEGCCqG+/SM\n-----END PRIVATE KEY-----\n"

redaction = Redaction([TOKEN, PASSWORD, KEY, "1234567"])


def pieces(known: Redaction, content: bytes, sizes: list[int]) -> bytes:
    """What is shown of a log that is read in pieces of these sizes, the last one again and again."""
    shown, rest, offset = b"", b"", 0
    for size in [*sizes, *[sizes[-1]] * len(content)]:
        rest += content[offset : offset + size]
        offset += size
        text, taken = known.piece(rest)
        shown, rest = shown + text, rest[taken:]
        if offset >= len(content):
            break
    return shown + known.piece(rest, last=True)[0]


@pytest.mark.parametrize("value", [TOKEN, PASSWORD])
@pytest.mark.parametrize(
    "write",
    [
        str,
        json.dumps,
        lambda value: json.dumps(value, ensure_ascii=False),
        lambda value: quote(value, safe=""),
        quote,
        quote_plus,
        lambda value: re.sub("%..", lambda escape: escape[0].lower(), quote(value, safe="")),
        lambda value: base64.b64encode(value.encode()).decode(),
        lambda value: base64.urlsafe_b64encode(value.encode()).decode(),
    ],
)
def test_a_value_is_found_however_it_is_written(value: str, write: object) -> None:
    """In text, in a piece of a log, in the values and keys of an event."""
    assert callable(write)
    text = write(value).strip('"').rstrip("=")
    assert redaction.text(f"a {text} b {text}") == f"a {MASK} b {MASK}"
    assert redaction.piece(f"a {text} b\n".encode())[0] == f"a {MASK} b\n".encode()
    event = {"n": 1, "x": [{text: None, "y": (text, 2.5, True)}]}
    assert redaction.data(event) == {"n": 1, "x": [{MASK: None, "y": [MASK, 2.5, True]}]}


@pytest.mark.parametrize("before", ["", "u", "us", "user:", "user: "])
@pytest.mark.parametrize("after", ["", "1", "12", "123"])
def test_a_value_within_something_in_base64_is_found(before: str, after: str) -> None:
    """As in an `Authorization: Basic` header; at most four characters of it at either end are left."""
    text = base64.b64encode(f"{before}{TOKEN}{after}".encode()).decode()
    shown = redaction.text(text)
    head, _, tail = shown.partition(MASK)
    assert MASK in shown
    assert len(head) <= len(base64.b64encode(before.encode())) + 1
    assert len(tail) <= 8


def test_each_line_of_a_value_is_one() -> None:
    """A private key is shown neither as a whole nor in part; its short lines tell nothing."""
    assert redaction.text(f"<{KEY}>") == f"<{MASK}>"
    assert redaction.text(KEY.replace("\n", "\r\n")).split() == [MASK, MASK, "short", MASK, MASK]
    assert redaction.text(repr(KEY)).count(MASK) == 1
    assert pieces(redaction, KEY.encode(), [28, 17, 6]) == MASK.encode()


def test_short_values_and_other_text_pass() -> None:
    """And what looks like the beginning of a value passes as soon as it is none."""
    text = "1234567 hf_ hf_AbC def \u2713 100%"
    assert redaction.text(text) == text
    assert pieces(redaction, text.encode(), [1]) == text.encode()
    assert not Redaction(["short", ""])
    assert redaction


def test_a_value_that_was_cut_is_masked() -> None:
    """The end of a text that was shortened, and the end of a log."""
    assert redaction.text(f"token {TOKEN[:12]}") == f"token {MASK}"
    assert redaction.text(f"token {TOKEN[:12]}...") == f"token {TOKEN[:12]}..."
    assert redaction.piece(TOKEN[:12].encode(), last=True) == (MASK.encode(), 12)
    assert redaction.piece(TOKEN[:12].encode()) == (b"", 0)
    assert redaction.piece(TOKEN[:5].encode(), last=True) == (TOKEN[:5].encode(), 5)


def test_one_value_may_begin_with_another() -> None:
    """Nothing of the longer one is left, wherever the pieces are cut."""
    both = Redaction(["secret-value", "secret-value-is-longer"])
    for cut in range(1, 24):
        assert pieces(both, b"<secret-value-is-longer>", [cut, 1]) == b"<***>"
        assert pieces(both, b"<secret-value-is-shorter>", [cut, 1]) == b"<***-is-shorter>"


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from([TOKEN, TOKEN[:9], "hf_", "\n", "x", "abababab", "abab", "aab"]), max_size=12
    ),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
)
def test_however_a_log_is_cut_no_value_is_shown(parts: list[str], sizes: list[int]) -> None:
    """And what is no value is shown as it is."""
    known = Redaction([TOKEN, "abababab"])
    content = "".join(parts)
    shown = pieces(known, content.encode(), sizes).decode()
    assert TOKEN not in shown
    assert "abababab" not in shown
    if TOKEN[:9] not in content and "abababab" not in content:
        assert shown == content


def test_a_copy_of_a_file_is_without_them(tmp_path: Path) -> None:
    """Also where a value lies across the blocks that are read; only its owner can read it."""
    source, target = tmp_path / "log", tmp_path / "copy"
    filler = b"x" * ((1 << 20) - 5)
    source.write_bytes(filler + TOKEN.encode() + b"\n\xff\x00" + filler + TOKEN.encode()[:9])
    redaction.copy(source, target)
    assert target.read_bytes() == filler + b"***\n\xff\x00" + filler + b"***"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_what_a_process_logs_is_without_them(caplog: pytest.LogCaptureFixture) -> None:
    """Message, arguments and traceback, whatever handles them."""
    make = logging.getLogRecordFactory()
    redact_logging(redaction)
    try:
        try:
            raise ValueError(TOKEN)
        except ValueError:
            logging.getLogger("flow").exception("%s failed with %d", TOKEN, 3)
    finally:
        logging.setLogRecordFactory(make)
    assert TOKEN not in caplog.text
    assert "*** failed with 3" in caplog.text
    assert "ValueError: ***" in caplog.text
