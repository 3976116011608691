"""Upload an object to S3 in parts, going on with what a killed upload of the same object had sent."""

from __future__ import annotations

import base64
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from botocore.exceptions import ClientError

_AT_ONCE = 4


class UploadGone(Exception):
    """Somebody else completed or aborted the upload, or put other content into one of its parts."""


class Part(NamedTuple):
    """A part that the service has."""

    bytes: int
    etag: str


@dataclass(frozen=True)
class Upload:
    """One multipart upload; nobody sees its object before `complete`."""

    client: Any
    bucket: str
    key: str
    id: str
    parts: dict[int, Part]
    """What it had when it was found."""
    found: bool

    @classmethod
    def open(cls, client: Any, bucket: str, key: str, *, anew: bool = False) -> Upload:
        """The unfinished upload of the object that has most parts, or a new one."""
        found = [] if anew else list(_unfinished(client, bucket, key))
        if found:
            return max(found, key=lambda upload: len(upload.parts))
        answer = client.create_multipart_upload(Bucket=bucket, Key=key)
        return cls(client, bucket, key, answer["UploadId"], {}, found=False)

    def send(self, pieces: Iterable[bytes]) -> list[str]:
        """Send what is not there yet, some parts at a time; returns the tag of each part.

        Takes the pieces one after the other from the calling thread, at most five of them at a time.
        """
        tags: list[str] = []
        waiting: deque[Future[str]] = deque()
        with _gone_named(), ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload") as pool:
            for number, piece in zip(count(1), pieces):
                if len(waiting) == _AT_ONCE:
                    tags.append(waiting.popleft().result())
                waiting.append(_start(pool, self._send_part, number, piece))
            tags += [future.result() for future in waiting]
        return tags

    def complete(self, tags: list[str]) -> None:
        """Make the object visible, of exactly the parts with these tags."""
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        with _gone_named():
            self.client.complete_multipart_upload(**self.name, MultipartUpload={"Parts": parts})

    def abort(self) -> None:
        """Forget all parts; silent when it is gone."""
        try:
            self.client.abort_multipart_upload(**self.name)
        except ClientError as exc:
            if code_of(exc) != "NoSuchUpload":
                raise

    @property
    def name(self) -> dict[str, str]:
        """How a request names it."""
        return {"Bucket": self.bucket, "Key": self.key, "UploadId": self.id}

    def _send_part(self, number: int, piece: bytes) -> str:
        md5 = hashlib.md5(piece, usedforsecurity=False)
        there = self.parts.get(number)
        # Where the tag is no MD5, as with keys of AWS KMS, nothing matches and all is sent again.
        if there is not None and there.bytes == len(piece) and there.etag.strip('"') == md5.hexdigest():
            return there.etag
        answer = self.client.upload_part(
            **self.name, PartNumber=number, Body=piece, ContentMD5=base64.b64encode(md5.digest()).decode()
        )
        return str(answer["ETag"])


def stale_uploads(client: Any, bucket: str, prefix: str) -> Iterator[tuple[Upload, Any]]:
    """Every unfinished upload below the prefix, and when it was begun."""
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        for each in page.get("Uploads", []):
            upload = Upload(client, bucket, each["Key"], each["UploadId"], {}, found=True)
            yield upload, each["Initiated"]


def code_of(exc: ClientError) -> str:
    """What the service calls the error; of a HEAD request, only the HTTP status."""
    return str(exc.response.get("Error", {}).get("Code", ""))


def _unfinished(client: Any, bucket: str, key: str) -> Iterator[Upload]:
    try:
        uploads = [each for each, _ in stale_uploads(client, bucket, key) if each.key == key]
    except ClientError as exc:
        if code_of(exc) in ("AccessDenied", "NotImplemented"):
            return  # Without the right to list, every upload starts anew.
        raise
    for upload in uploads:
        try:
            upload.parts.update(_parts(upload))
        except ClientError as exc:
            if code_of(exc) != "NoSuchUpload":
                raise
        else:
            yield upload


def _parts(upload: Upload) -> dict[int, Part]:
    pages = upload.client.get_paginator("list_parts").paginate(**upload.name)
    return {
        each["PartNumber"]: Part(each["Size"], each["ETag"])
        for page in pages
        for each in page.get("Parts", [])
    }


def _start(pool: ThreadPoolExecutor, work: Callable[[int, bytes], str], number: int, piece: bytes) -> Any:
    try:
        return pool.submit(work, number, piece)
    except RuntimeError:  # The interpreter is ending and starts no more threads.
        done: Future[str] = Future()
        done.set_result(work(number, piece))
        return done


@contextmanager
def _gone_named() -> Iterator[None]:
    try:
        yield
    except ClientError as exc:
        if code_of(exc) in ("NoSuchUpload", "InvalidPart"):
            raise UploadGone from exc
        raise
