"""The objects of a Supabase bucket by their path: read, write, list."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx

from openweights_prefect.errors import NotFoundError
from openweights_prefect.files.store import FileStoreError
from openweights_prefect.files.supabase_service import TRANSPORT_ERRORS, Answer, StorageService, object_path
from openweights_prefect.types.paths import safe_relative_path

_ATTEMPTS = 4
_FIRST_PAUSE_SECONDS = 0.1
_PAGE = 1000
_NOT_THERE = httpx.codes.NOT_FOUND
# The caller's token names its organization.
_NO_ORGANIZATION = ""


class SupabaseObjects:
    """One bucket, with the rights of the service's bearer. Raises `PermissionDeniedError` beyond those."""

    def __init__(self, service: StorageService, bucket: str) -> None:
        self._service = service
        self._bucket = bucket

    def read(self, path: str) -> bytes:
        """The content; raises `NotFoundError`."""
        answer = self._service.ask("GET", self._download_path(path), _NO_ORGANIZATION, expected=(_NOT_THERE,))
        if answer.status == _NOT_THERE:
            raise self._not_found(path)
        return answer.response.content

    def write(self, path: str, content: bytes) -> None:
        """Store the content; what is there is replaced."""
        self._service.ask(
            "POST",
            f"/object/{object_path(self._bucket, str(safe_relative_path(path)))}",
            _NO_ORGANIZATION,
            headers={"x-upsert": "true", "Content-Type": "application/octet-stream"},
            content=content,
        )

    def download(self, path: str, target: Path) -> None:
        """Copy the content to `target`, which is replaced as a whole or, on any error, left as it was."""
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{uuid4().hex}.partial")
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    self._stream(path, unfinished)
                    break
                except TRANSPORT_ERRORS as exc:
                    if attempt == _ATTEMPTS:
                        raise FileStoreError(
                            f"Supabase Storage broke off {path!r} {attempt} times ({exc!r}). Try again."
                        ) from exc
                time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def list(self, folder: str = "") -> Iterator[str]:
        """The paths of all objects in a folder and the folders in it, relative to the folder."""
        folders = [""]
        while folders:
            inner = folders.pop()
            for entry in self._entries("/".join(part for part in (folder, inner) if part)):
                path = f"{inner}/{entry['name']}" if inner else str(entry["name"])
                if entry.get("id") is None:  # A folder is only a part of the names of objects.
                    folders.append(path)
                else:
                    yield path

    def _entries(self, folder: str) -> Iterator[dict[str, Any]]:
        offset = 0
        while True:
            page = {"prefix": folder, "limit": _PAGE, "offset": offset}
            body = {**page, "sortBy": {"column": "name", "order": "asc"}}
            path = f"/object/list/{quote(self._bucket, safe='')}"
            entries = self._service.ask("POST", path, _NO_ORGANIZATION, json=body).response.json()
            yield from entries
            if len(entries) < _PAGE:
                return
            offset += len(entries)

    def _stream(self, path: str, target: Path) -> None:
        address = self._download_path(path)
        with self._service.stream(address, _NO_ORGANIZATION) as response:
            if response.is_success:
                with target.open("wb") as sink:
                    for block in response.iter_bytes():
                        sink.write(block)
                return
        answer = Answer(response)
        raise (
            self._not_found(path)
            if answer.status == _NOT_THERE
            else self._service.failure("GET", address, answer)
        )

    def _download_path(self, path: str) -> str:
        return f"/object/authenticated/{object_path(self._bucket, str(safe_relative_path(path)))}"

    def _not_found(self, path: str) -> NotFoundError:
        return NotFoundError(f"There is no {path!r} in the bucket {self._bucket!r}, or not for this token.")
