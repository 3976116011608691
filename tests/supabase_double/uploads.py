"""`/storage/v1/upload/resumable`: the TUS 1.0.0 protocol as the storage service speaks it."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from pathlib import Path
from uuid import uuid4

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tests.supabase_double.objects import ObjectStore, StorageError

_PATH = "/storage/v1/upload/resumable"
_CHUNK = 6 * 1024 * 1024
_TUS = {"Tus-Resumable": "1.0.0"}


class ResumableUploads:
    """Uploads that have not ended: one file with the bytes, one with what they are to become."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._locks: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)

    def routes(self) -> list[Route]:
        return [
            Route(_PATH, self._guarded, methods=["POST"]),
            Route(_PATH + "/{upload}", self._guarded, methods=["HEAD", "PATCH", "DELETE"]),
        ]

    async def _guarded(self, request: Request) -> Response:
        """TUS errors are plain text with their own status, unlike the rest of the storage service."""
        answer = {
            "POST": self._create,
            "HEAD": self._offset,
            "PATCH": self._append,
            "DELETE": self._terminate,
        }
        try:
            if request.method != "HEAD" and request.headers.get("tus-resumable") != "1.0.0":
                raise StorageError(412, "TusError", "Tus-Resumable Required")
            response = await answer[request.method](request)
        except StorageError as exc:
            response = Response(str(exc), status_code=exc.status)
        except ClientDisconnect:
            response = Response(status_code=499)
        response.headers.update(_TUS)
        return response

    async def _create(self, request: Request) -> Response:
        metadata = _metadata(request.headers.get("upload-metadata", ""))
        length = request.headers.get("upload-length", "")
        if not length.isdigit() or not {"bucketName", "objectName"} <= metadata.keys():
            raise StorageError(400, "InvalidRequest", "Metadata header is required")
        bucket, name = metadata["bucketName"], metadata["objectName"]
        upsert = request.headers.get("x-upsert") == "true"
        await self._store.may_create(request, bucket, name, upsert=upsert)
        upload = base64.urlsafe_b64encode(f"{bucket}/{name}/{uuid4()}".encode()).decode().rstrip("=")
        content = self._content(upload)
        content.touch()
        described = {"bucket": bucket, "name": name, "length": int(length), "upsert": upsert}
        content.with_suffix(".info").write_text(json.dumps(described))
        location = str(request.url.replace(path=f"{_PATH}/{upload}", query=""))
        return Response(status_code=201, headers={"Location": location, "Upload-Offset": "0"})

    async def _offset(self, request: Request) -> Response:
        content, length = self._found(request.path_params["upload"])
        headers = {
            "Upload-Offset": str(content.stat().st_size),
            "Upload-Length": str(length),
            "Cache-Control": "no-store",
        }
        return Response(status_code=200, headers=headers)

    async def _append(self, request: Request) -> Response:
        upload = request.path_params["upload"]
        content, length = self._found(upload)
        described = json.loads(content.with_suffix(".info").read_text())
        bucket, name = described["bucket"], described["name"]
        await self._store.may_create(request, bucket, name, upsert=described["upsert"])
        if request.headers.get("content-type") != "application/offset+octet-stream":
            raise StorageError(415, "TusError", "Content-Type must be application/offset+octet-stream")
        lock = self._locks[upload]
        if lock.locked():
            raise StorageError(423, "ResourceLocked", "The resource is locked")
        async with lock:
            offset = content.stat().st_size
            if request.headers.get("upload-offset") != str(offset):
                raise StorageError(409, "TusError", "Upload-Offset conflict")
            await self._receive(request, content, limit=length - offset)
            offset = content.stat().st_size
            if offset == length:
                await self._store.complete(bucket, name, content)
                content.with_suffix(".info").unlink()
        return Response(status_code=204, headers={"Upload-Offset": str(offset)})

    async def _receive(self, request: Request, content: Path, *, limit: int) -> None:
        """Keep what arrives, also of a request that breaks off; only the last piece may be a short one."""
        declared = int(request.headers.get("content-length", 0))
        if declared > _CHUNK:
            raise StorageError(413, "TusError", "Maximum size exceeded")
        with content.open("ab") as sink:
            async for piece in request.stream():
                limit -= len(piece)
                if limit < 0:
                    raise StorageError(413, "TusError", "Maximum size exceeded")
                sink.write(piece)
                sink.flush()

    async def _terminate(self, request: Request) -> Response:
        content, _ = self._found(request.path_params["upload"])
        content.unlink()
        content.with_suffix(".info").unlink()
        return Response(status_code=204)

    def _content(self, upload: str) -> Path:
        name = base64.urlsafe_b64decode(upload + "=" * (-len(upload) % 4)).decode().rpartition("/")[2]
        return self._store.folder / f"upload-{name}"

    def _found(self, upload: str) -> tuple[Path, int]:
        content = self._content(upload)
        try:
            return content, int(json.loads(content.with_suffix(".info").read_text())["length"])
        except FileNotFoundError:
            raise StorageError(404, "NoSuchUpload", "The file for this url was not found") from None


def _metadata(header: str) -> dict[str, str]:
    pairs = (pair.partition(" ") for pair in header.split(",") if pair)
    return {name: base64.b64decode(value).decode() for name, _, value in pairs}
