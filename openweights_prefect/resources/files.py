"""`ow.files`: bytes that are stored once per organization."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, TypedDict

from openweights_prefect.errors import ConflictError, InvalidParameterError, NotFoundError
from openweights_prefect.files.hashing import Digest, digest_path, digest_stream
from openweights_prefect.files.store import CorruptFileError
from openweights_prefect.files.validation import validate_jsonl
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.resources.session import Session, check_limit
from openweights_prefect.types.identity import file_id, parse_file_id
from openweights_prefect.types.job import parse_time
from openweights_prefect.types.paths import safe_relative_path

PathLike = str | os.PathLike[str]


class File(TypedDict):
    """What the ledger knows of a file."""

    id: str
    bytes: int
    filename: str
    purpose: str
    created_at: datetime | None


class Files:
    """Upload, look up, read and delete files; contents are streamed, whatever their size."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def upload(self, path: PathLike, purpose: str) -> File:
        """Store a local file and return its description; the same bytes give the same file.

        Raises `InvalidFileError` naming the bad lines of `conversations` and `preference` files.
        """
        source = Path(path).expanduser()
        digest = digest_path(source, self._session.organization_id)
        validate_jsonl(source, purpose)
        return store_file(self._session, source, purpose, digest, filename=source.name)

    def create(self, file: BinaryIO, purpose: str) -> File:
        """Store what is left of an open binary file, as `upload` does."""
        name = getattr(file, "name", None)
        filename = Path(name).name if isinstance(name, str) and Path(name).name else "file"
        with _rewindable(file) as stream:
            start = stream.tell()
            digest = digest_stream(stream, self._session.organization_id)
            stream.seek(start)
            validate_jsonl(stream, purpose)
            stream.seek(start)
            return store_file(self._session, stream, purpose, digest, filename=filename)

    def content(self, file_id: str) -> bytes:
        """The bytes of a file, checked against its id; for large files, use `download`."""
        content = io.BytesIO()
        with self._session.store.open(file_id, self._session.organization_id) as stream:
            digest = digest_stream(stream, self._session.organization_id, sink=content)
        if digest.id_hex12 != parse_file_id(file_id).digest:
            raise CorruptFileError(
                f"File {file_id!r} is damaged in the store. Delete it there and upload it again."
            )
        return content.getvalue()

    def download(self, file_id: str, path: PathLike) -> Path:
        """Copy a file to `path`, or into the folder `path` under its own name; returns where it is."""
        target = Path(path).expanduser()
        if target.is_dir():
            target /= safe_relative_path(self.get_by_id(file_id)["filename"]).name
        self._session.store.fetch(file_id, self._session.organization_id, target)
        return target

    def get_by_id(self, file_id: str) -> File:
        """Describe a file; raises `NotFoundError`."""
        rows = self._session.ledger.call("get_files", ids=[str(parse_file_id(file_id))])
        if not rows:
            raise NotFoundError(
                f"No file {file_id!r} in this organization; `ow.files.list()` shows those that exist."
            )
        return _file(rows[0])

    def list(self, purpose: str | None = None, limit: int = 100, after: str | None = None) -> list[File]:
        """The newest files first; `after` goes on behind that file id."""
        rows = self._session.ledger.call(
            "list_files", for_purpose=purpose, max_rows=check_limit(limit), after_id=after
        )
        return [_file(row) for row in rows]

    def delete(self, file_id: str) -> bool:
        """Remove a file; False when there was none. Raises `ConflictError` while an open job reads it."""
        [answer] = self._session.ledger.call("delete_file", file_id=str(parse_file_id(file_id)))
        if answer["outcome"] == "in_use":
            raise ConflictError(
                f"File {file_id!r} is read by job {answer['job_id']!r}, which has not finished. "
                "Wait for it or cancel it, then delete the file."
            )
        if answer["outcome"] == "deleted":
            self._session.store.delete(file_id, self._session.organization_id)
        return bool(answer["outcome"] == "deleted")


def store_file(
    session: Session, source: Path | BinaryIO, purpose: str, digest: Digest, *, filename: str
) -> File:
    """Store content of a known digest, then its row: a row exists only for a file that is complete."""
    identity = file_id(purpose, digest.id_hex12)
    name = str(safe_relative_path(filename))
    session.store.put(identity, session.organization_id, source)
    description = {
        "id": identity,
        "purpose": purpose,
        "filename": name,
        "bytes": digest.bytes,
        "sha256": digest.sha256,
    }
    rows = session.ledger.call("register_file", file=description)
    if not rows or rows[0]["sha256"] != digest.sha256:
        raise ConflictError(
            f"File id {identity!r} already belongs to other content (a collision of its 48 bits). "
            "Change the file, a blank line at its end is enough, and upload it again."
        )
    return _file(rows[0])


@contextmanager
def _rewindable(file: BinaryIO) -> Iterator[BinaryIO]:
    """A pipe can be read only once; its content is read twice."""
    if isinstance(file, io.TextIOBase) or not hasattr(file, "read"):
        raise InvalidParameterError(f"file={file!r} is not an open binary file; use open(path, 'rb').")
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy)
        copy.seek(0)
        yield copy


def _file(row: Row) -> File:
    return File(
        id=row["id"],
        bytes=row["bytes"],
        filename=row["filename"],
        purpose=row["purpose"],
        created_at=parse_time(row["created_at"]),
    )
