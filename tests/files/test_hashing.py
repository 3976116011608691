from __future__ import annotations

import hashlib
import io
import os
import tracemalloc
from pathlib import Path

import pytest

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.files.hashing import digest_path, digest_stream
from openweights_prefect.types.identity import file_id

ORGANIZATION = "00000000-0000-0000-0000-000000000001"
CONTENT = b'{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yo"}]}'


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_golden_file_id(chunk: int) -> None:
    """The id is the one that OpenWeights gives the same content."""
    digest = digest_stream(io.BytesIO(CONTENT), ORGANIZATION, chunk=chunk)
    assert file_id("conversations", digest.id_hex12) == "conversations:file-af2f6d4f2b9d"
    assert digest.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert digest.bytes == len(CONTENT)


def test_path_and_copy(tmp_path: Path) -> None:
    """A path gives the same digest; a sink gets the same bytes."""
    path, sink = tmp_path / "a.jsonl", io.BytesIO()
    path.write_bytes(CONTENT)
    assert digest_path(path, ORGANIZATION) == digest_stream(io.BytesIO(CONTENT), ORGANIZATION, sink=sink)
    assert sink.getvalue() == CONTENT


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """A file of 64 MiB is digested in a few blocks of memory."""
    path = tmp_path / "big"
    with path.open("wb") as stream:
        stream.truncate(64 << 20)
    tracemalloc.start()
    digest_path(path, ORGANIZATION)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_text_stream_is_refused() -> None:
    """A file opened without 'b' is named as such."""
    with pytest.raises(InvalidParameterError, match="mode 'rb'"):
        digest_stream(io.StringIO("a"), ORGANIZATION)  # type: ignore[arg-type]


def test_pipe_without_data_is_not_an_empty_file() -> None:
    """A non-blocking stream with nothing to give yet is an error, never a file cut short."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with (
        os.fdopen(reading, "rb", buffering=0) as stream,
        os.fdopen(writing, "wb"),
        pytest.raises(InvalidParameterError, match="gave NoneType"),
    ):
        digest_stream(stream, ORGANIZATION)


def test_bad_paths_are_refused(tmp_path: Path) -> None:
    """A missing file, a folder and a FIFO are errors that name the path."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", ".", "fifo"):
        with pytest.raises(InvalidParameterError, match=r"does not exist|not a regular file"):
            digest_path(tmp_path / name, ORGANIZATION)


def test_bad_organization_is_refused() -> None:
    """An organization id that could not be a folder is refused before it is hashed."""
    with pytest.raises(InvalidParameterError, match=r"organization_id='\.\./x'"):
        digest_stream(io.BytesIO(b""), "../x")
