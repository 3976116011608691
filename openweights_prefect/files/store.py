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
from openweights_prefect.files.hashing import digest_stream, open_file
from openweights_prefect.types.identity import checked_organization_id, parse_file_id

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DAY_SECONDS = 24 * 3600


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


class LocalFileStore:
    """A `FileStore` in a folder: `organizations/{organization_id}/{purpose}/{file-...}`.

    Any number of processes may use one folder: blobs appear by an atomic rename, after they are on the disk.
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
                raise NotFoundError(
                    f"The store has no content for file {file_id!r} of organization {organization_id!r}; "
                    "upload it again."
                ) from exc

    def fetch(self, file_id: str, organization_id: str, target: Path) -> None:
        """Copy the content to `target`, which is replaced as a whole or, on any error, left as it was.

        It is a copy, never a link: jobs may write into theirs. Raises `CorruptFileError` when the stored
        bytes no longer match the id, `NotFoundError` when there are none.
        """
        with self.open(file_id, organization_id) as stream, _errors_named("write", target):
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

    def exists(self, file_id: str, organization_id: str) -> bool:
        """Say whether the content is there, without reading it."""
        return self._blob(file_id, organization_id).is_file()

    def delete(self, file_id: str, organization_id: str) -> None:
        """Remove the content; silent when there is none."""
        blob = self._blob(file_id, organization_id)
        with _errors_named("delete", blob):
            blob.unlink(missing_ok=True)

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
        parsed = parse_file_id(file_id)
        return (
            self._root
            / "organizations"
            / checked_organization_id(organization_id)
            / parsed.purpose
            / parsed.name
        )

    def _put_stream(self, file_id: str, organization_id: str, stream: BinaryIO, blob: Path) -> None:
        with _errors_named("write", blob):
            if _same_size(stream, blob):
                return
            self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
            blob.parent.mkdir(parents=True, exist_ok=True)
            with _temporary_file(self._incoming) as (path, sink):
                digest = digest_stream(stream, organization_id, sink=sink)
                if digest.id_hex12 != parse_file_id(file_id).digest:
                    raise InvalidParameterError(
                        f"The content ({digest.bytes} bytes, digest {digest.id_hex12!r}) is not that of "
                        f"{file_id!r}: it changed while it was read, or the id is of another organization. "
                        "Upload it again."
                    )
                sink.flush()
                os.fsync(sink.fileno())
                sink.close()
                path.replace(blob)
            self._sync_folders(blob.parent)

    def _sync_folders(self, folder: Path) -> None:
        """Make the rename last: a folder that was new is an entry of its parent, up to the root."""
        while folder.is_relative_to(self._root):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            folder = folder.parent


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
