from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import pytest

from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.files.validation import MAX_LINE_BYTES, validate_jsonl

GOOD = b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}'
PAIR = '{"prompt":[%s],"chosen":[%s],"rejected":[%s]}'
MESSAGE = '{"role":"user","content":"a"}'


def check(content: bytes | str, purpose: str = "conversations") -> None:
    validate_jsonl(io.BytesIO(content if isinstance(content, bytes) else content.encode()), purpose)


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD + b"\n\n  \n",
        GOOD + b"\r\n" + GOOD + b"\r\n",
        b"\xef\xbb\xbf" + GOOD,
        b'{"text":"a"}\n' + GOOD,
        b'{"messages":[{"role":"system","content":"a","name":"x"}],"id":7}',
        b'{"messages":[{"role":"user","content":[{"type":"text","text":"a","weight":-0.5,"tag":"t"},{"text":"b"}]}]}',
        b'{"messages":[{"role":"user","content":[{"text":"a","weight":null,"tag":null}]}]}',
        b'{"text":"\\ud83d\\ude00 \\\\ud83d"}',
        '{"text":"\u2028 is no line end, nor is \x85"}',
    ],
)
def test_good_conversations_pass(content: bytes | str) -> None:
    """Every documented form passes, with any line end, a byte order mark and blank lines at the end."""
    check(content)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"5", "is 5 instead of an object"),
        (b"[1]", "instead of an object"),
        (b"{", "is not JSON"),
        (b"{} {}", "is not JSON"),
        (b'{"text":NaN}', "NaN is not a JSON number"),
        (b'{"text":' + b"1" * 5000 + b"}", "is not JSON that can be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text":"\xe9"}', "is not UTF-8 .byte 10"),
        (GOOD.decode().encode("utf-16"), "is not UTF-8"),
        (b'{"text":"\\ud83d"}', "surrogate"),
        (b"{}", "neither `messages` nor `text`"),
        (b'{"text":5}', "text is 5 instead of a string"),
        (b'{"messages":5}', "messages is 5 instead of a list"),
        (b'{"messages":[]}', "messages is empty"),
        (b'{"messages":[],"text":"a"}', "both `messages` and `text`"),
        (b'{"messages":["a"]}', r"messages\[0\] is 'a' instead of an object"),
        (b'{"messages":[{"role":"tool","content":"a"}]}', r"messages\[0\].role is 'tool'"),
        (b'{"messages":[{"role":["user"],"content":"a"}]}', r"role is \['user'\]"),
        (b'{"messages":[{"content":"a"}]}', "role is None"),
        (b'{"messages":[{"role":"user","content":null}]}', "content is None"),
        (b'{"messages":[{"role":"user","content":["a"]}]}', r"content\[0\] is 'a'"),
        (b'{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}', r"content\[0\].text is None"),
        (b'{"messages":[{"role":"user","content":[{"text":"a","weight":true}]}]}', "weight is True"),
        (b'{"messages":[{"role":"user","content":[{"text":"a","weight":1e999}]}]}', "weight is inf"),
        (
            b'{"messages":[{"role":"user","content":[{"text":"a","weight":1' + b"0" * 400 + b"}]}]}",
            "weight is 1000",
        ),
        (b'{"messages":[{"role":"user","content":[{"text":"a","tag":1}]}]}', "tag is 1"),
    ],
)
def test_bad_line_is_named(line: bytes, problem: str) -> None:
    """The error says which line is wrong and what is wrong with it."""
    with pytest.raises(InvalidFileError, match=f"line 2: .*{problem}"):
        check(GOOD + b"\n" + line)


def test_preference_rows() -> None:
    """Each of the three keys is a list of messages."""
    check(PAIR % (MESSAGE, MESSAGE, MESSAGE), "preference")
    for row, problem in {
        PAIR % (MESSAGE, MESSAGE, ""): "rejected is empty",
        '{"prompt":"a","chosen":"b","rejected":"c"}': "prompt is 'a' instead of a list",
        f'{{"prompt":[{MESSAGE}],"chosen":[{MESSAGE}]}}': "has no `rejected`",
        GOOD.decode(): "has no `prompt`",
        "7": "instead of an object",
    }.items():
        with pytest.raises(InvalidFileError, match=problem):
            check(row, "preference")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_file_is_refused(content: bytes) -> None:
    """A file without a row trains nothing."""
    with pytest.raises(InvalidFileError, match="has no rows"):
        check(content)


def test_blank_lines_in_the_middle_are_named() -> None:
    """Blank lines before a row are bad lines, each with its number."""
    with pytest.raises(InvalidFileError, match=r"2 bad lines\.\n  line 2: is blank.*\n  line 3: is blank"):
        check(GOOD + b"\n\n \n" + GOOD + b"\n\n")


def test_first_ten_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    """A file that is all wrong gives an error of a dozen lines."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"{}\n" * 25)
    with pytest.raises(InvalidFileError) as caught:
        validate_jsonl(path, "conversations")
    lines = str(caught.value).splitlines()
    assert (
        lines[0] == f"File {str(path)!r} does not have the format of purpose 'conversations': 25 bad lines."
    )
    assert [line.split(":")[0] for line in lines[1:11]] == [f"  line {number}" for number in range(1, 11)]
    assert lines[11:] == ["  and 15 more"]


def test_other_purposes_pass_unread() -> None:
    """A purpose without a format takes any bytes."""
    check(b"\xff", "result")


def test_text_stream_is_refused() -> None:
    """A file opened without 'b' is named as such."""
    with pytest.raises(InvalidParameterError, match="mode 'rb'"):
        validate_jsonl(io.StringIO("{}"), "conversations")  # type: ignore[arg-type]


def test_long_line_is_named_and_skipped(tmp_path: Path) -> None:
    """A line that is too long to hold is a bad line; the ones after it keep their numbers."""
    path = tmp_path / "long.jsonl"
    with path.open("wb") as stream:
        stream.truncate(2 * MAX_LINE_BYTES + 10)
        stream.seek(0, 2)
        stream.write(b"\n{}\n")
    with pytest.raises(InvalidFileError, match=r"line 1: is longer than 64 MiB\n  line 2: has neither"):
        validate_jsonl(path, "conversations")


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Sixteen MiB of rows, good, bad and blank, are checked in less than one."""
    path = tmp_path / "big.jsonl"
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 16000}]}).encode()
    with path.open("wb") as stream:
        for _ in range(1000):
            stream.write(row + b"\n{}\n\n")
    tracemalloc.start()
    with pytest.raises(InvalidFileError, match="1999 bad lines"):
        validate_jsonl(path, "conversations")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
