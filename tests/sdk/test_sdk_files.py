from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from datetime import UTC
from pathlib import Path

import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import (
    ConflictError,
    InvalidFileError,
    InvalidParameterError,
    NotFoundError,
)
from openweights_prefect.files.store import CorruptFileError
from openweights_prefect.settings import Settings


def test_every_way_to_a_file_gives_one_shape(ow: OpenWeights, conversations: Callable[..., Path]) -> None:
    """Upload, upload again, create, get and list all give the same description."""
    path = conversations()
    first = ow.files.upload(path, purpose="conversations")
    with path.open("rb") as stream:
        assert ow.files.create(stream, purpose="conversations") == first
    assert ow.files.upload(str(path), "conversations") == first == ow.files.get_by_id(first["id"])
    assert ow.files.list() == [first]
    assert set(first) == {"id", "bytes", "filename", "purpose", "created_at"}
    assert first["filename"] == "train.jsonl"
    assert first["bytes"] == path.stat().st_size
    assert first["created_at"] is not None
    assert first["created_at"].tzinfo is UTC


def test_the_known_id_of_openweights(ow: OpenWeights) -> None:
    """Ids are those that OpenWeights gives to the same bytes."""
    content = b'{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"yo"}]}'
    file = ow.files.create(io.BytesIO(content), purpose="conversations")
    assert file["id"] == "conversations:file-af2f6d4f2b9d"
    assert ow.files.content(file["id"]) == content


def test_bad_lines_are_named_and_nothing_is_stored(ow: OpenWeights, tmp_path: Path) -> None:
    """A file without the format of its purpose is refused with the numbers of its bad lines."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"messages": 5}\nnot json\n')
    with pytest.raises(InvalidFileError, match=r"(?s)bad\.jsonl.*line 2: .*line 3: "):
        ow.files.upload(path, purpose="conversations")
    assert ow.files.list() == []


def test_a_pipe_is_uploaded_whole(ow: OpenWeights) -> None:
    """A stream that cannot be rewound is stored too."""
    reader, writer = os.pipe()
    content = b"x" * 300_000

    def write() -> None:
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(content)

    thread = threading.Thread(target=write)
    thread.start()
    with os.fdopen(reader, "rb") as pipe:
        file = ow.files.create(pipe, purpose="result")
    thread.join(10)
    assert ow.files.content(file["id"]) == content


def test_text_streams_are_refused(ow: OpenWeights) -> None:
    """A file that was opened as text says how to open it."""
    with pytest.raises(InvalidParameterError, match="'rb'"):
        ow.files.create(io.StringIO("text"), purpose="result")  # type: ignore[arg-type]


def test_download_into_a_folder_or_to_a_path(ow: OpenWeights, tmp_path: Path) -> None:
    """A folder takes the file under its own name."""
    source = tmp_path / "notes.txt"
    source.write_bytes(b"notes")
    file = ow.files.upload(source, purpose="result")
    target = tmp_path / "downloads"
    target.mkdir()
    assert ow.files.download(file["id"], target) == target / "notes.txt"
    assert ow.files.download(file["id"], target / "new" / "name").read_bytes() == b"notes"


def test_damaged_content_is_never_handed_out(ow: OpenWeights, settings: Settings, tmp_path: Path) -> None:
    """Bytes that do not match their id raise, whichever way they are read."""
    file = ow.files.create(io.BytesIO(b"good"), purpose="result")
    [blob] = (path for path in settings.files_folder.rglob("file-*") if path.is_file())
    blob.write_bytes(b"evil")
    with pytest.raises(CorruptFileError):
        ow.files.content(file["id"])
    with pytest.raises(CorruptFileError):
        ow.files.download(file["id"], tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_list_pages_by_purpose(ow: OpenWeights) -> None:
    """`limit` and `after` walk through the files of one purpose, newest first."""
    ids = [ow.files.create(io.BytesIO(bytes([number])), purpose="result")["id"] for number in range(5)]
    ow.files.create(io.BytesIO(b"other"), purpose="log")
    first = ow.files.list(purpose="result", limit=3)
    rest = ow.files.list(purpose="result", limit=3, after=first[-1]["id"])
    assert [file["id"] for file in first + rest] == ids[::-1]
    with pytest.raises(InvalidParameterError, match="limit=0"):
        ow.files.list(limit=0)


def test_delete_removes_row_and_content(ow: OpenWeights) -> None:
    """A deleted file is gone; deleting it again is no error."""
    file = ow.files.create(io.BytesIO(b"gone"), purpose="result")
    assert ow.files.delete(file["id"]) is True
    assert ow.files.delete(file["id"]) is False
    with pytest.raises(NotFoundError, match=file["id"]):
        ow.files.get_by_id(file["id"])
    with pytest.raises(NotFoundError):
        ow.files.content(file["id"])


def test_a_file_that_a_job_reads_stays(ow: OpenWeights, conversations: Callable[..., Path]) -> None:
    """Deleting the input of an open job is refused, naming the job."""
    job = ow.fine_tuning.create(model="org/tiny-1B", training_file=str(conversations()), loss="sft")
    [file_id] = job.mounts.values()
    with pytest.raises(ConflictError, match=job.id):
        ow.files.delete(file_id)
    job.cancel()
    assert ow.files.delete(file_id)


def test_what_is_no_file_id(ow: OpenWeights) -> None:
    """A mistyped id says what one looks like."""
    with pytest.raises(InvalidParameterError, match="not a file id"):
        ow.files.get_by_id("../../etc/passwd")
