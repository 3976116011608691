"""A file store in a Supabase project: `{organization_id}/{purpose}/{file-...}` in one private bucket."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import httpx

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.files.hashing import CHUNK_BYTES as HASH_BYTES
from openweights_prefect.files.hashing import digest_stream, open_file, read_blocks
from openweights_prefect.files.layout import file_path, result_path
from openweights_prefect.files.resumable import CHUNK_BYTES, ProgressFile, ResumableUpload
from openweights_prefect.files.store import FileStoreError, check_source, copy_verified, no_content
from openweights_prefect.files.supabase_service import TRANSPORT_ERRORS, Answer, StorageService, object_path

_NOT_THERE = httpx.codes.NOT_FOUND
_THERE_ALREADY = httpx.codes.CONFLICT
_READ_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.1
_OCTETS = {"Content-Type": "application/octet-stream"}


class SupabaseFileStore:
    """A `FileStore` in Supabase Storage, whose policies decide what the bearer reaches.

    Safe to share between threads. A file of more than 6 MB is sent in pieces; a process that is killed leaves
    word in `uploads_folder`, and the next one goes on from there.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        bearer: Callable[[], str],
        uploads_folder: Path,
        bucket: str = "files",
        patience_seconds: float = 60.0,
    ) -> None:
        """`bearer` gives a JWT that is still good for a while, at every call."""
        self._service = StorageService(url, key, bearer=bearer, patience_seconds=patience_seconds)
        self._uploads_folder = uploads_folder
        self._bucket = bucket

    def put(self, file_id: str, organization_id: str, source: Path | BinaryIO) -> None:
        """Store the content once; an object of another size is damaged and is replaced.

        Raises `InvalidParameterError` when the content does not match the id, `PermissionDeniedError` for
        another organization's; nobody ever sees an object that is not whole.
        """
        name = _object_name(file_path(file_id, organization_id))
        with self._opened(source) as stream:
            size = _size_left(stream)
            stored = self._size(name, organization_id)
            progress = ProgressFile(self._uploads_folder, f"{self._service.url}/{self._bucket}/{name}")
            if stored == size:
                progress.forget()
                return
            if stored is not None:
                self._remove(name, organization_id)
            if size > CHUNK_BYTES:
                upload = ResumableUpload(
                    self._service, progress, bucket=self._bucket, name=name, organization_id=organization_id
                )
                upload.send(stream, size, file_id)
            else:
                data = b"".join(read_blocks(stream, HASH_BYTES))
                check_source(digest_stream(io.BytesIO(data), organization_id), file_id)
                self._create(name, organization_id, data)
            self._check_stored(name, organization_id, size)

    def open(self, file_id: str, organization_id: str) -> BinaryIO:
        """Stream the content, unchecked; raises `NotFoundError`. The caller closes the stream.

        A connection that breaks is made again, where it broke.
        """
        name = _object_name(file_path(file_id, organization_id))
        if self._size(name, organization_id) is None:
            raise no_content(file_id, organization_id)
        reader = _Reader(self._service, f"/object/authenticated/{self._path(name)}", organization_id)
        return io.BufferedReader(reader, HASH_BYTES)

    def fetch(self, file_id: str, organization_id: str, target: Path) -> None:
        """Copy the content to `target`, which is replaced as a whole or, on any error, left as it was."""
        with self.open(file_id, organization_id) as stream:
            copy_verified(stream, file_id, organization_id, target)

    def exists(self, file_id: str, organization_id: str) -> bool:
        """Say whether the content is there and the bearer may read it."""
        return self._size(_object_name(file_path(file_id, organization_id)), organization_id) is not None

    def delete(self, file_id: str, organization_id: str) -> None:
        """Remove the content; silent when there is none that the bearer may delete."""
        self._remove(_object_name(file_path(file_id, organization_id)), organization_id)

    def write_result(self, key: str, organization_id: str, data: bytes) -> None:
        """Keep what a flow returned under its key, in place of what was there; as a whole or not at all."""
        name = _object_name(result_path(key, organization_id))
        # To replace takes more rights than a pod has, and is seldom needed.
        if not self._create(name, organization_id, data):
            self._create(name, organization_id, data, replace=True)

    def read_result(self, key: str, organization_id: str) -> bytes | None:
        """What was kept under the key; None when there is nothing."""
        path = f"/object/authenticated/{self._path(_object_name(result_path(key, organization_id)))}"
        answer = self._service.ask("GET", path, organization_id, expected=(_NOT_THERE,))
        return None if answer.status == _NOT_THERE else answer.response.content

    def close(self) -> None:
        """Close all connections."""
        self._service.close()

    def _path(self, name: str) -> str:
        return object_path(self._bucket, name)

    def _size(self, name: str, organization_id: str) -> int | None:
        path = f"/object/info/{self._path(name)}"
        answer = self._service.ask("GET", path, organization_id, expected=(_NOT_THERE,))
        return None if answer.status == _NOT_THERE else int(answer.response.json()["size"])

    def _create(self, name: str, organization_id: str, data: bytes, *, replace: bool = False) -> bool:
        """Send a small object; False when there is one and it is not to be replaced."""
        headers = {**_OCTETS, "x-upsert": str(replace).lower()}
        answer = self._service.ask(
            "POST",
            f"/object/{self._path(name)}",
            organization_id,
            headers=headers,
            content=data,
            expected=(_THERE_ALREADY,),
        )
        return answer.status != _THERE_ALREADY

    def _remove(self, name: str, organization_id: str) -> None:
        path = f"/object/{quote(self._bucket, safe='')}"
        self._service.ask("DELETE", path, organization_id, json={"prefixes": [name]})

    def _check_stored(self, name: str, organization_id: str, size: int) -> None:
        """Compare sizes; a pod sees its own upload only when it is registered, and has the answer instead."""
        stored = self._size(name, organization_id)
        if stored not in (None, size):
            raise FileStoreError(
                f"Supabase Storage kept {stored} of the {size} bytes of {name!r}. Upload it again."
            )

    @contextmanager
    def _opened(self, source: Path | BinaryIO) -> Iterator[BinaryIO]:
        """A stream that can tell its size and be read again; another one is copied to the disk first."""
        with ExitStack() as stack:
            stream = stack.enter_context(open_file(source)) if isinstance(source, Path) else source
            if not stream.seekable():
                self._uploads_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                copy = stack.enter_context(tempfile.TemporaryFile(dir=self._uploads_folder))
                for block in read_blocks(stream, HASH_BYTES):
                    copy.write(block)
                copy.seek(0)
                stream = copy
            list(read_blocks(stream, 0))  # Refuses a stream of text.
            try:
                yield stream
            except OpenWeightsError:  # Some are an OSError too.
                raise
            except OSError as exc:
                raise FileStoreError(
                    f"Cannot read {source!r} to the end, or write to {str(self._uploads_folder)!r}: {exc}. "
                    "Check both and try again."
                ) from exc


class _Reader(io.RawIOBase):
    """The body of an object; asks for the rest of it when the connection breaks."""

    def __init__(self, service: StorageService, path: str, organization_id: str) -> None:
        self._service = service
        self._path = path
        self._organization_id = organization_id
        self._position = 0
        self._failures = 0
        self._rest = b""
        self._stack = ExitStack()
        self._blocks: Iterator[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = self._next_block()
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        self._position += count
        return count

    def close(self) -> None:
        self._stack.close()
        super().close()

    def _next_block(self) -> bytes:
        while True:
            try:
                if self._blocks is None:
                    self._blocks = self._open()
                return next(self._blocks, b"")
            except TRANSPORT_ERRORS as exc:
                self._stack.close()
                self._blocks = None
                self._failures += 1
                if self._failures == _READ_ATTEMPTS:
                    raise FileStoreError(
                        f"Supabase Storage broke off {self._path!r} after {self._position} bytes, "
                        f"{self._failures} times ({exc!r}). Try again."
                    ) from exc
            time.sleep(_FIRST_PAUSE_SECONDS * 2**self._failures)

    def _open(self) -> Iterator[bytes]:
        """The blocks from our position on."""
        response = self._stack.enter_context(
            self._service.stream(self._path, self._organization_id, start=self._position)
        )
        if response.status_code != (httpx.codes.PARTIAL_CONTENT if self._position else httpx.codes.OK):
            response.read()
            raise self._service.failure("GET", self._path, Answer(response))
        return response.iter_raw(HASH_BYTES)


def _object_name(path: str) -> str:
    """In the bucket the folder of an organization is the first one, as is usual in storage policies."""
    return path.removeprefix("organizations/")


def _size_left(stream: BinaryIO) -> int:
    position = stream.tell()
    size = stream.seek(0, os.SEEK_END) - position
    stream.seek(position)
    return size
