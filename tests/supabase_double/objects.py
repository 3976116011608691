"""`/storage/v1/object/*`: one bucket's objects, bytes in a folder and rows in `storage.objects`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.rows import dict_row
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.supabase_double.database import Database
from tests.supabase_double.keys import RefusedToken, TrustedIssuers

_KEY = re.compile(r"[A-Za-z0-9_/!.*'() &$@=;:+,?-]+")
_PIECE = 1 << 18
_ADMIN = "supabase_storage_admin"


class StorageError(Exception):
    """An error of the storage service; its HTTP status is 400 but for the resumable uploads."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = error

    def response(self) -> Response:
        content = {"statusCode": str(self.status), "error": self.error, "message": str(self)}
        return JSONResponse(content, status_code=500 if self.status == 500 else 400)


class ObjectStore:
    """What objects and resumable uploads share: permissions, rows and bytes."""

    def __init__(self, database: Database, issuers: TrustedIssuers, folder: Path) -> None:
        self.folder = folder
        self._database = database
        self._issuers = issuers

    def caller(self, request: Request) -> dict[str, Any]:
        """The claims; unlike PostgREST, the storage service allows no clock skew."""
        try:
            return self._issuers.caller(
                request.headers.get("authorization", ""), request.headers["apikey"], leeway_seconds=0
            )
        except RefusedToken as exc:
            raise StorageError(403, "Unauthorized", str(exc)) from exc

    async def may_create(self, request: Request, bucket: str, name: str, *, upsert: bool) -> None:
        """Try the insert as the caller and roll it back; raises what forbids it."""
        if not _KEY.fullmatch(name):
            raise StorageError(400, "InvalidKey", f"Invalid key: {name}")
        statement = (
            "insert into storage.objects (bucket_id, name, version, owner_id) values (%s, %s, '1', %s)"
        )
        if upsert:
            statement += " on conflict (bucket_id, name) do update set version = excluded.version"
        claims = self.caller(request)
        with _errors():
            async with self._database.as_caller(request, claims, storage=True) as connection:
                await connection.execute(statement.encode(), [bucket, name, claims.get("sub")])
                raise psycopg.Rollback

    async def complete(self, bucket: str, name: str, content: Path) -> str:
        """Make the bytes the object's, as the service itself; returns the object's id."""
        version, size = uuid4().hex, content.stat().st_size
        content.replace(self.folder / version)
        with (self.folder / version).open("rb") as stream:
            etag = hashlib.file_digest(stream, "md5").hexdigest()
        metadata = {"size": size, "eTag": f'"{etag}"', "contentLength": size, "httpStatusCode": 200}
        async with self._database.as_service(_ADMIN) as connection:
            cursor = await connection.execute(
                "insert into storage.objects (bucket_id, name, version, metadata) values (%s, %s, %s, %s) "
                "on conflict (bucket_id, name) do update set version = excluded.version, "
                "metadata = excluded.metadata, updated_at = now() returning id",
                [bucket, name, version, json.dumps(metadata)],
            )
            row = await cursor.fetchone()
        assert row is not None
        return str(row[0])

    async def find(self, request: Request, bucket: str, name: str) -> dict[str, Any]:
        rows = await self.rows(request, "bucket_id = %s and name = %s", bucket, name)
        if not rows:
            raise StorageError(404, "not_found", "Object not found")
        return rows[0]

    async def rows(self, request: Request, condition: str, *values: Any) -> list[dict[str, Any]]:
        return await self._query(request, f"select * from storage.objects where {condition}", *values)

    async def remove(self, request: Request, bucket: str, names: list[str]) -> list[dict[str, Any]]:
        statement = "delete from storage.objects where bucket_id = %s and name = any(%s) returning *"
        rows = await self._query(request, statement, bucket, names)
        for row in rows:
            (self.folder / row["version"]).unlink(missing_ok=True)
        return rows

    async def _query(self, request: Request, statement: str, *values: Any) -> list[dict[str, Any]]:
        claims = self.caller(request)
        with _errors():
            async with (
                self._database.as_caller(request, claims, storage=True) as connection,
                connection.cursor(row_factory=dict_row) as cursor,
            ):
                await cursor.execute(statement.encode(), values)
                return await cursor.fetchall()


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.UniqueViolation as exc:
        raise StorageError(409, "Duplicate", "The resource already exists") from exc
    except psycopg.errors.ForeignKeyViolation as exc:
        raise StorageError(404, "Bucket not found", "Bucket not found") from exc
    except psycopg.errors.InsufficientPrivilege as exc:
        raise StorageError(403, "Unauthorized", str(exc).splitlines()[0]) from exc
    except psycopg.Error as exc:
        raise StorageError(500, "DatabaseError", f"database error, code: {exc.sqlstate}") from exc


class Objects:
    """The routes of whole objects."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        return [
            Route("/storage/v1/object/list/{bucket}", _guarded(self._list), methods=["POST"]),
            Route("/storage/v1/object/info/{bucket}/{name:path}", _guarded(self._info), methods=["GET"]),
            Route("/storage/v1/object/authenticated/{bucket}/{name:path}", _guarded(self._download)),
            Route("/storage/v1/object/{bucket}", _guarded(self._remove), methods=["DELETE"]),
            Route("/storage/v1/object/{bucket}/{name:path}", _guarded(self._upload), methods=["POST", "PUT"]),
            Route("/storage/v1/object/{bucket}/{name:path}", _guarded(self._download)),
        ]

    async def _upload(self, request: Request) -> Response:
        bucket, name = request.path_params["bucket"], request.path_params["name"]
        upsert = request.method == "PUT" or request.headers.get("x-upsert") == "true"
        await self._store.may_create(request, bucket, name, upsert=upsert)
        incoming = self._store.folder / f"incoming-{uuid4().hex}"
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            form = await request.form()
            upload = next(value for value in form.values() if not isinstance(value, str))
            incoming.write_bytes(await upload.read())
        else:
            with incoming.open("wb") as sink:
                async for piece in request.stream():
                    sink.write(piece)
        object_id = await self._store.complete(bucket, name, incoming)
        return JSONResponse({"Key": f"{bucket}/{name}", "Id": object_id})

    async def _download(self, request: Request) -> Response:
        row = await self._store.find(request, request.path_params["bucket"], request.path_params["name"])
        size = row["metadata"]["size"]
        headers = {"etag": row["metadata"]["eTag"], "accept-ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        start = int(wanted[1]) if wanted else 0
        if start >= size > 0:
            return StorageError(416, "InvalidRange", "The requested range is not satisfiable").response()
        if wanted:
            headers["content-range"] = f"bytes {start}-{size - 1}/{size}"
        headers["content-length"] = str(size - start)
        status = 206 if wanted else 200
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        return StreamingResponse(_pieces(self._store.folder / row["version"], start), status, headers)

    async def _info(self, request: Request) -> Response:
        name = request.path_params["name"].removeprefix(f"{request.path_params['bucket']}/")
        bucket = request.path_params["bucket"]
        if bucket == "authenticated":
            bucket, _, name = name.partition("/")
        row = await self._store.find(request, bucket, name)
        metadata = row["metadata"]
        return JSONResponse(
            {"id": str(row["id"]), "name": row["name"], "version": row["version"], "bucket_id": bucket,
             "size": metadata["size"], "etag": metadata["eTag"], "metadata": row["user_metadata"] or {}}
        )  # fmt: skip

    async def _list(self, request: Request) -> Response:
        body = await request.json()
        folder = body.get("prefix", "").rstrip("/")
        prefix = f"{folder}/" if folder else ""
        rows = await self._store.rows(
            request,
            "bucket_id = %s and starts_with(name, %s) order by name",
            request.path_params["bucket"],
            prefix,
        )
        children: dict[str, Any] = {}
        for row in rows:
            child, _, deeper = row["name"].removeprefix(prefix).partition("/")
            children[child] = {
                "name": child,
                "id": None if deeper else str(row["id"]),
                "metadata": None if deeper else row["metadata"],
            }
        start = body.get("offset", 0)
        return JSONResponse(list(children.values())[start : start + body.get("limit", 100)])

    async def _remove(self, request: Request) -> Response:
        names = (await request.json())["prefixes"]
        rows = await self._store.remove(request, request.path_params["bucket"], names)
        return JSONResponse([{"name": row["name"], "bucket_id": row["bucket_id"]} for row in rows])


def _guarded(answer: Any) -> Any:
    async def endpoint(request: Request) -> Response:
        try:
            response: Response = await answer(request)
        except StorageError as exc:
            return exc.response()
        return response

    return endpoint


async def _pieces(path: Path, start: int) -> AsyncIterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        while piece := stream.read(_PIECE):
            yield piece
