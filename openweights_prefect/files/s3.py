"""Files in a bucket of S3 or a service like it; a `prefect_aws.S3Bucket` block sees the same objects."""

from __future__ import annotations

import base64
import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.files.hashing import CHUNK_BYTES, Hasher, open_file, read_blocks
from openweights_prefect.files.layout import file_path, result_path
from openweights_prefect.files.multipart import Upload, UploadGone, code_of, stale_uploads
from openweights_prefect.files.s3_errors import s3_error
from openweights_prefect.files.store import FileStoreError, check_source, copy_verified, no_content

PART_BYTES = 32 << 20
"""Larger objects are sent in parts of this size, several at a time."""

_MOST_PARTS = 10_000
_CONNECT_SECONDS = 10.0
_CONNECTIONS = 32
_UPLOAD_ATTEMPTS = 3
_READ_ATTEMPTS = 5
_DAY_SECONDS = 24 * 3600
_MISSING = ("404", "NoSuchKey", "NotFound")


class S3FileStore:
    """A `FileStore` in a bucket, laid out as `files.layout` says below `prefix`.

    Makes no request and loads no credentials before it is used; those come from where boto3 looks for them.
    Any number of processes and threads may use one bucket. An upload that was killed is resumed by the next
    one of the same file.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        region: str | None = None,
        part_bytes: int = PART_BYTES,
        timeout_seconds: float = 60.0,
        attempts: int = 5,
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._part_bytes = part_bytes
        self._connection = {"endpoint_url": endpoint_url, "region_name": region}
        self._timeout_seconds = timeout_seconds
        self._attempts = attempts
        self._lock = threading.Lock()
        self._made: Any = None

    def put(self, file_id: str, organization_id: str, source: Path | BinaryIO) -> None:
        """Store the content once; an object of another size is damaged and is replaced.

        Raises `InvalidParameterError` when the content does not match the id, `FileStoreError` when the
        service does not take it; nobody ever sees an object that is not whole.
        """
        key = self._prefix + file_path(file_id, organization_id)
        if isinstance(source, Path):
            with open_file(source) as stream:
                self._put_stream(key, file_id, organization_id, stream)
        else:
            self._put_stream(key, file_id, organization_id, source)

    def open(self, file_id: str, organization_id: str) -> BinaryIO:
        """Stream the content, unchecked; raises `NotFoundError`. The caller closes the stream.

        A connection that breaks is made again, where it broke.
        """
        key = self._prefix + file_path(file_id, organization_id)
        with self._errors_named("read", key):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=key)
            except ClientError as exc:
                if code_of(exc) in _MISSING:
                    raise no_content(file_id, organization_id) from exc
                raise
        reader = _Reader(answer, lambda start: self._rest_of(key, answer["ETag"], start))
        return io.BufferedReader(reader, CHUNK_BYTES)

    def fetch(self, file_id: str, organization_id: str, target: Path) -> None:
        """Copy the content to `target`, which is replaced as a whole or, on any error, left as it was."""
        with self.open(file_id, organization_id) as stream:
            copy_verified(stream, file_id, organization_id, target)

    def exists(self, file_id: str, organization_id: str) -> bool:
        """Say whether the content is there, without reading it."""
        return self._size(self._prefix + file_path(file_id, organization_id)) is not None

    def delete(self, file_id: str, organization_id: str) -> None:
        """Remove the content; silent when there is none."""
        key = self._prefix + file_path(file_id, organization_id)
        with self._errors_named("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=key)

    def write_result(self, key: str, organization_id: str, data: bytes) -> None:
        """Keep what a flow returned under its key, in place of what was there; as a whole or not at all."""
        self._put_bytes(self._prefix + result_path(key, organization_id), data)

    def read_result(self, key: str, organization_id: str) -> bytes | None:
        """What was kept under the key; None when there is nothing."""
        name = self._prefix + result_path(key, organization_id)
        with self._errors_named("read", name):
            try:
                return bytes(self._client.get_object(Bucket=self._bucket, Key=name)["Body"].read())
            except ClientError as exc:
                if code_of(exc) in _MISSING:
                    return None
                raise

    def sweep(self, *, older_than_seconds: float = _DAY_SECONDS) -> int:
        """Abort uploads that nobody went on with; returns how many. The parts of such uploads are billed."""
        aborted = 0
        with self._errors_named("sweep", self._prefix):
            for upload, begun_at in stale_uploads(self._client, self._bucket, self._prefix):
                if time.time() - begun_at.timestamp() >= older_than_seconds:
                    upload.abort()
                    aborted += 1
        return aborted

    @property
    def _client(self) -> Any:
        # Clients may be shared between threads, but not made at the same time.
        with self._lock:
            if self._made is None:
                config = Config(
                    connect_timeout=min(_CONNECT_SECONDS, self._timeout_seconds),
                    read_timeout=self._timeout_seconds,
                    retries={"mode": "standard", "total_max_attempts": self._attempts},
                    max_pool_connections=_CONNECTIONS,
                    # Not every compatible service knows the newer checksums; MD5 is checked by all of them.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    s3={"addressing_style": "path" if self._connection["endpoint_url"] else "auto"},
                )
                self._made = boto3.session.Session().client("s3", config=config, **self._connection)
            return self._made

    def _put_stream(self, key: str, file_id: str, organization_id: str, stream: BinaryIO) -> None:
        size = _size_of(stream)
        if size is not None and self._size(key) == size:
            return
        start = stream.tell() if size is not None else None
        for attempt in range(_UPLOAD_ATTEMPTS):
            if start is not None:
                stream.seek(start)
            try:
                self._send(key, file_id, organization_id, stream, size=size, anew=attempt > 0)
            except UploadGone:
                if size is not None and self._size(key) == size:
                    return
                if start is None:
                    break
            else:
                return
        raise FileStoreError(
            f"Cannot store object {key!r} in bucket {self._bucket!r}: "
            "its upload was ended by somebody else. Try again."
        )

    def _send(
        self, key: str, file_id: str, organization_id: str, stream: BinaryIO, *, size: int | None, anew: bool
    ) -> None:
        hasher = Hasher(organization_id)
        part_bytes = self._part_size(size)
        pieces = _hashed_pieces(stream, part_bytes, hasher)
        with self._errors_named("store", key):
            first = next(pieces)
            if len(first) < part_bytes:
                check_source(hasher.digest(), file_id)
                self._put_bytes(key, first)
                return
            upload = Upload.open(self._client, self._bucket, key, anew=anew)
            tags = upload.send(chain([first], pieces))
            try:
                check_source(hasher.digest(), file_id)
            except OpenWeightsError:
                if not upload.found:  # Others may be going on with one that was there before.
                    upload.abort()
                raise
            try:
                upload.complete(tags)
            except (UploadGone, ClientError):
                # Another writer of the same file may have completed it, or the answer was lost.
                if self._size(key) != hasher.digest().bytes:
                    raise

    def _put_bytes(self, key: str, data: bytes) -> None:
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        with self._errors_named("store", key):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=data, ContentMD5=md5)

    def _part_size(self, size: int | None) -> int:
        """The same for the same size, or a resumed upload would have to start anew."""
        least = -(-(size or 0) // _MOST_PARTS)
        return self._part_bytes if least <= self._part_bytes else -(-least // CHUNK_BYTES) * CHUNK_BYTES

    def _size(self, key: str) -> int | None:
        with self._errors_named("look up", key):
            try:
                return int(self._client.head_object(Bucket=self._bucket, Key=key)["ContentLength"])
            except ClientError as exc:
                if code_of(exc) in _MISSING:
                    return None
                raise

    def _rest_of(self, key: str, etag: str, start: int) -> Any:
        with self._errors_named("read", key):
            return self._client.get_object(
                Bucket=self._bucket, Key=key, IfMatch=etag, Range=f"bytes={start}-"
            )["Body"]

    @contextmanager
    def _errors_named(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except OpenWeightsError:
            raise
        except (ClientError, BotoCoreError, OSError, ValueError) as exc:
            raise s3_error(f"{action} object {key!r} in bucket {self._bucket!r}", exc) from exc


class _Reader(io.RawIOBase):
    """The body of an object; asks for the rest of it when the connection breaks."""

    def __init__(self, answer: dict[str, Any], rest_from: Callable[[int], Any]) -> None:
        self._body = answer["Body"]
        self._size = int(answer["ContentLength"])
        self._rest_from = rest_from
        self._position = 0
        self._failures = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._position == self._size:
            return 0
        while True:
            try:
                data = self._body.read(len(buffer))
            except (BotoCoreError, OSError) as exc:
                self._body.close()
                self._failures += 1
                if self._failures == _READ_ATTEMPTS:
                    raise s3_error(f"read on after {self._position} bytes", exc) from exc
                self._body = self._rest_from(self._position)
                continue
            buffer[: len(data)] = data
            self._position += len(data)
            return len(data)

    def close(self) -> None:
        self._body.close()
        super().close()


def _hashed_pieces(stream: BinaryIO, size: int, hasher: Hasher) -> Iterator[bytes]:
    """The content in pieces of that size and a shorter one; at least one piece, of an empty stream too."""
    piece, given = bytearray(), False
    try:
        for block in read_blocks(stream, min(size, CHUNK_BYTES)):
            hasher.update(block)
            piece += block
            while len(piece) >= size:
                yield bytes(piece[:size])
                given = True
                del piece[:size]
    except OSError as exc:
        raise FileStoreError(f"Cannot read the content that is to be stored: {exc}. Try again.") from exc
    if piece or not given:
        yield bytes(piece)


def _size_of(stream: BinaryIO) -> int | None:
    """How much is left of it; None when it cannot tell."""
    if not stream.seekable():
        return None
    position = stream.tell()
    size = stream.seek(0, io.SEEK_END) - position
    stream.seek(position)
    return size
