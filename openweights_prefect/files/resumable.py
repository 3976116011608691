"""Uploads to Supabase Storage that go on where a killed process stopped (TUS 1.0.0)."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from filelock import FileLock, Timeout

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.files.hashing import CHUNK_BYTES as HASH_BYTES
from openweights_prefect.files.hashing import Digest, Hasher
from openweights_prefect.files.store import FileStoreError, check_source
from openweights_prefect.files.supabase_service import StorageService

CHUNK_BYTES = 6 * 1024 * 1024
"""What Supabase demands of every piece but the last."""

_TUS = {"Tus-Resumable": "1.0.0"}
_PATH = "/upload/resumable"
_GONE = (404, 410)
_ATTEMPTS = 3


class _UploadGone(Exception):
    """The service does not know the upload any more: it was completed, ended or is older than a day."""


@dataclass(frozen=True)
class _Progress:
    """What an unfinished upload may have sent: the first `reach` bytes, which have this digest."""

    upload: str
    reach: int
    sha256: str


class ProgressFile:
    """Where the progress of one object's upload outlives the process."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        self._owned = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Use the file, unless another process or thread does: then nothing is remembered."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(self._path.with_suffix(".lock"), mode=0o600)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield
            return
        self._owned = True
        try:
            yield
        finally:
            self._owned = False
            lock.release()

    def load(self) -> _Progress | None:
        """The progress, or None when there is none that we may go on with."""
        if not self._owned:
            return None
        try:
            return _Progress(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, progress: _Progress) -> None:
        """Replace the progress as a whole."""
        if self._owned:
            temporary = self._path.with_name(f".{self._path.name}.{uuid4().hex}")
            temporary.write_text(json.dumps(asdict(progress)), encoding="utf-8")
            temporary.replace(self._path)

    def remove(self) -> None:
        """Forget the progress; silent when there is none, or it is another one's."""
        if self._owned:
            self._path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Forget the progress, also another one's: its object is complete."""
        self._path.unlink(missing_ok=True)


class ResumableUpload:
    """One file on its way to one object, which appears when the last piece has arrived."""

    def __init__(
        self, service: StorageService, progress: ProgressFile, *, bucket: str, name: str, organization_id: str
    ) -> None:
        self._service = service
        self._progress = progress
        self._bucket = bucket
        self._name = name
        self._organization_id = organization_id

    def send(self, stream: BinaryIO, size: int, file_id: str) -> None:
        """Send what is left of a seekable stream; does nothing when the object exists already.

        Raises `InvalidParameterError` before the last piece when the content is not that of the id.
        """
        start = stream.tell()
        with self._progress.held():
            for _ in range(_ATTEMPTS):
                stream.seek(start)
                try:
                    self._send(stream, size, file_id)
                except _UploadGone:
                    self._progress.remove()
                    continue
                self._progress.remove()
                return
        raise FileStoreError(
            f"The upload of {file_id!r} was ended by somebody else {_ATTEMPTS} times. Try again."
        )

    def _send(self, stream: BinaryIO, size: int, file_id: str) -> None:
        hasher = Hasher(self._organization_id)
        upload, offset = self._resume(stream, size, hasher) or (self._create(size), 0)
        if upload is None:  # The object exists.
            return
        while offset < size:
            piece = b"".join(_blocks(stream, min(CHUNK_BYTES, size - offset)))
            hasher.update(piece)
            digest = hasher.digest()
            if not piece or digest.bytes == size:  # Its end, or that of a file that became shorter.
                self._check(upload, digest, file_id)
            self._progress.save(_Progress(upload, digest.bytes, digest.sha256))
            if not self._append(upload, offset, piece, is_last=digest.bytes == size):
                return
            offset += len(piece)

    def _resume(self, stream: BinaryIO, size: int, hasher: Hasher) -> tuple[str, int] | None:
        """Go on with an upload of the same bytes: hash what the service has, and read on from there."""
        progress = self._progress.load()
        offset = None if progress is None else self._offset(progress.upload)
        if progress is None or offset is None:
            return None
        start, sent = stream.tell(), Hasher(self._organization_id)
        for block in _blocks(stream, offset):
            hasher.update(block)
            sent.update(block)
        for block in _blocks(stream, progress.reach - offset):
            sent.update(block)
        if offset >= size or offset > progress.reach or sent.digest().sha256 != progress.sha256:
            self._end(progress.upload)
            raise _UploadGone
        stream.seek(start + offset)
        return progress.upload, offset

    def _check(self, upload: str, digest: Digest, file_id: str) -> None:
        try:
            check_source(digest, file_id)
        except OpenWeightsError:
            self._end(upload)
            self._progress.remove()
            raise

    def _create(self, size: int) -> str | None:
        """Begin an upload; None when the object exists."""
        metadata = {
            "bucketName": self._bucket,
            "objectName": self._name,
            "contentType": "application/octet-stream",
        }
        described = ",".join(
            f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in metadata.items()
        )
        headers = {**_TUS, "Upload-Length": str(size), "Upload-Metadata": described, "x-upsert": "false"}
        answer = self._service.ask("POST", _PATH, self._organization_id, headers=headers, expected=(409,))
        if answer.status == 409:
            return None
        # Only its last part: our token is for no other host, wherever the answer points.
        return answer.response.headers["location"].rstrip("/").rpartition("/")[2]

    def _append(self, upload: str, offset: int, piece: bytes, *, is_last: bool) -> bool:
        """Add a piece, of which the service may have a part already; False when the object exists.

        Only the answer to the last piece says that the object exists now: without it the upload is taken for
        lost, and the next one finds out.
        """
        start, end = offset, offset + len(piece)
        view = memoryview(piece)
        while offset < end:
            headers = {
                **_TUS,
                "Upload-Offset": str(offset),
                "Content-Type": "application/offset+octet-stream",
            }
            answer = self._service.ask(
                "PATCH",
                f"{_PATH}/{upload}",
                self._organization_id,
                headers=headers,
                content=view[offset - start :],
                expected=(409, *_GONE),
            )
            if answer.response.is_success:
                offset = int(answer.response.headers["upload-offset"])
                continue
            known = None if answer.status in _GONE else self._offset(upload)
            if known is None or not start <= known <= end or (is_last and known == end):
                raise _UploadGone
            if known == offset:  # No conflict of offsets: the object itself is in the way.
                self._end(upload)
                return False
            offset = known
        return True

    def _offset(self, upload: str) -> int | None:
        answer = self._service.ask(
            "HEAD", f"{_PATH}/{upload}", self._organization_id, headers=_TUS, expected=(400, *_GONE)
        )
        return int(answer.response.headers["upload-offset"]) if answer.response.is_success else None

    def _end(self, upload: str) -> None:
        expected = (400, 403, 409, *_GONE)  # It may have ended already, and ends by itself after a day.
        path = f"{_PATH}/{upload}"
        self._service.ask("DELETE", path, self._organization_id, headers=_TUS, expected=expected)


def _blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The next so many bytes, or fewer when the stream ends."""
    while size > 0 and (block := stream.read(min(HASH_BYTES, size))):
        size -= len(block)
        yield block
