"""Where file contents live: content-addressed blobs, complete or not there at all."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import uuid4

from openweights_prefect.errors import InvalidParameterError, NotFoundError, OpenWeightsError
from openweights_prefect.files.hashing import Digest, digest_stream, open_file
from openweights_prefect.files.layout import file_path, result_path
from openweights_prefect.types.identity import parse_file_id

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DAY_SECONDS = 24 * 3600
_WRITEBACK_BYTES = 8 << 20


class FileStoreError(OpenWeightsError):
    """The file store cannot read or write: no space, no permission, a broken disk."""


class CorruptFileError(FileStoreError):
    """Stored bytes no longer have the digest of their file id."""


class FileStore(Protocol):
    """Blobs by file id and organization; one organization never reaches the blobs of another."""

    def put(self, file_id: str, organization_id: str, source: Path | BinaryIO) -> None:
        """Store the content, idempotently; raises `InvalidParameterError` when it does not match the id."""

    def open(self, file_id: str, organization_id: str) -> BinaryIO:
        """Stream the content, unchecked; raises `NotFoundError`. The caller closes the stream."""

    def fetch(self, file_id: str, organization_id: str, target: Path) -> None:
        """Copy the content over `target`; raises `CorruptFileError` or `NotFoundError`."""

    def exists(self, file_id: str, organization_id: str) -> bool:
        """Say whether the content is there, without reading it."""

    def delete(self, file_id: str, organization_id: str) -> None:
        """Remove the content; silent when there is none."""

    def write_result(self, key: str, organization_id: str, data: bytes) -> None:
        """Keep what a flow returned under its key, in place of what was there."""

    def read_result(self, key: str, organization_id: str) -> bytes | None:
        """What was kept under the key; None when there is nothing."""


class LocalFileStore:
    """A `FileStore` in a folder, laid out as `files.layout` says.

    Any number of processes may use one folder: blobs appear by an atomic rename, after they are on the disk.
    An upload that was killed is not resumed: reading what it had copied would cost as much as copying it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._incoming = self._root / "incoming"

    def put(self, file_id: str, organization_id: str, source: Path | BinaryIO) -> None:
        """Store the content once; a stored blob of another size is damaged and is replaced.

        Raises `InvalidParameterError` when the content does not match the id, `FileStoreError` when the disk
        is full; nothing is left behind then. A stream is read from its current position.
        """
        blob = self._blob(file_id, organization_id)
        if isinstance(source, Path):
            with open_file(source) as stream:
                self._put_stream(file_id, organization_id, stream, blob)
        else:
            self._put_stream(file_id, organization_id, source, blob)

    def open(self, file_id: str, organization_id: str) -> BinaryIO:
        """Stream the content, unchecked; raises `NotFoundError`. The caller closes the stream."""
        blob = self._blob(file_id, organization_id)
        with _errors_named("read", blob):
            try:
                return blob.open("rb")
            except FileNotFoundError as exc:
                raise no_content(file_id, organization_id) from exc

    def fetch(self, file_id: str, organization_id: str, target: Path) -> None:
        """Copy the content to `target`, which is replaced as a whole or, on any error, left as it was.

        It is a copy, never a link: jobs may write into theirs. Raises `CorruptFileError` when the stored
        bytes no longer match the id, `NotFoundError` when there are none.
        """
        with self.open(file_id, organization_id) as stream:
            copy_verified(stream, file_id, organization_id, target)

    def exists(self, file_id: str, organization_id: str) -> bool:
        """Say whether the content is there, without reading it."""
        return self._blob(file_id, organization_id).is_file()

    def delete(self, file_id: str, organization_id: str) -> None:
        """Remove the content; silent when there is none."""
        blob = self._blob(file_id, organization_id)
        with _errors_named("delete", blob):
            blob.unlink(missing_ok=True)

    def write_result(self, key: str, organization_id: str, data: bytes) -> None:
        """Keep what a flow returned under its key, in place of what was there; as a whole or not at all."""
        path = self._root / result_path(key, organization_id)
        with _errors_named("write", path), self._incoming_file(path) as sink:
            sink.write(data)

    def read_result(self, key: str, organization_id: str) -> bytes | None:
        """What was kept under the key; None when there is nothing."""
        path = self._root / result_path(key, organization_id)
        with _errors_named("read", path):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def sweep(self, *, older_than_seconds: float = _DAY_SECONDS) -> int:
        """Remove what killed writers left half-written; returns how many files. Safe at any time."""
        removed = 0
        for path in self._incoming.glob("*.partial"):
            # A file may be finished or swept by another process in between.
            with _errors_named("sweep", path), contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= older_than_seconds:
                    path.unlink()
                    removed += 1
        return removed

    def _blob(self, file_id: str, organization_id: str) -> Path:
        return self._root / file_path(file_id, organization_id)

    def _put_stream(self, file_id: str, organization_id: str, stream: BinaryIO, blob: Path) -> None:
        with _errors_named("write", blob):
            if _same_size(stream, blob):
                return
            with self._incoming_file(blob) as sink:
                digest = digest_stream(stream, organization_id, sink=_EagerWriter(sink))
                check_source(digest, file_id)

    @contextlib.contextmanager
    def _incoming_file(self, target: Path) -> Iterator[BinaryIO]:
        """A file to fill, which takes the place of `target` when nothing was raised, and stays there."""
        self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_file(self._incoming) as (path, sink):
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
            sink.close()
            path.replace(target)
        self._sync_folders(target.parent)

    def _sync_folders(self, folder: Path) -> None:
        """Make the rename last: a folder that was new is an entry of its parent, up to the root."""
        while folder.is_relative_to(self._root):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            folder = folder.parent


def check_source(digest: Digest, file_id: str) -> None:
    """Raise `InvalidParameterError` unless content with this digest is that of the file id."""
    if digest.id_hex12 != parse_file_id(file_id).digest:
        raise InvalidParameterError(
            f"The content ({digest.bytes} bytes, digest {digest.id_hex12!r}) is not that of {file_id!r}: "
            "it changed while it was read, or the id is of another organization. Upload it again."
        )


def copy_verified(stream: BinaryIO, file_id: str, organization_id: str, target: Path) -> None:
    """Copy stored content over `target`, as a whole; raises `CorruptFileError` when it is not the id's."""
    with _errors_named("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_file(target.parent) as (path, sink):
            digest = digest_stream(stream, organization_id, sink=sink)
            if digest.id_hex12 != parse_file_id(file_id).digest:
                raise CorruptFileError(
                    f"File {file_id!r} is damaged in the store (its {digest.bytes} bytes have the digest "
                    f"{digest.id_hex12!r}). Delete it there and upload it again."
                )
            sink.close()
            path.replace(target)


def no_content(file_id: str, organization_id: str) -> NotFoundError:
    """The error for a file that the store does not have."""
    return NotFoundError(
        f"The store has no content for file {file_id!r} of organization {organization_id!r}; upload it again."
    )


class _EagerWriter:
    """Has the disk write while the next blocks are hashed, so that the final sync finds little to do."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._written = 0
        self._started = 0

    def write(self, block: bytes, /) -> None:
        self._written += self._file.write(block)
        if self._written - self._started >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            # Starts the writing of dirty pages; only clean ones are dropped, and these are not clean yet.
            fresh = self._written - self._started
            os.posix_fadvise(self._file.fileno(), self._started, fresh, os.POSIX_FADV_DONTNEED)
            self._started = self._written


@contextlib.contextmanager
def _temporary_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file that is gone afterwards, unless it was renamed."""
    path = folder / f".{uuid4().hex}.partial"
    try:
        with path.open("xb") as sink:
            yield path, sink
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _errors_named(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OpenWeightsError:  # Some are an OSError too.
        raise
    except OSError as exc:
        if exc.errno in _NO_SPACE:
            raise FileStoreError(
                f"Cannot {action} {str(path)!r}: no space is left ({exc.strerror}). Free some and try again."
            ) from exc
        raise FileStoreError(
            f"Cannot {action} {str(path)!r}: {exc}. Check the disk and the permissions."
        ) from exc


def _same_size(stream: BinaryIO, blob: Path) -> bool:
    """Say whether the blob is there in full; a stream that cannot tell its size is copied to find out."""
    if not blob.is_file() or not stream.seekable():
        return False
    position = stream.tell()
    size = stream.seek(0, os.SEEK_END) - position
    stream.seek(position)
    return size == blob.stat().st_size
