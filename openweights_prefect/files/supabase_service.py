"""Requests to the storage service of a Supabase project, and what its answers mean."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal
from urllib.parse import quote

import httpx

from openweights_prefect.errors import (
    ConfigurationError,
    LedgerUnavailable,
    OpenWeightsError,
    PermissionDeniedError,
)
from openweights_prefect.files.store import FileStoreError

# Not httpx's NetworkError alone: a proxy that closes in the middle of an answer breaks the protocol.
TRANSPORT_ERRORS = (httpx.TransportError, httpx.StreamError)
_TRANSIENT = {408, 423, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 530, 544}
_BLOCK_BYTES = 1 << 18
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)

Method = Literal["GET", "HEAD", "POST", "PATCH", "DELETE"]


class Answer:
    """A response with the status that is meant: the service answers 400 and says the real one in the body."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        try:
            body = response.json() if response.is_error else None
        except ValueError:
            body = None
        said: dict[str, Any] = body if isinstance(body, dict) else {}
        status = str(said.get("statusCode", ""))
        self.status = int(status) if status.isdigit() else response.status_code
        self.message = str(said.get("message") or response.text or response.reason_phrase)[:200]


class StorageService:
    """One project's storage, as whoever the bearer says; safe to share between threads."""

    def __init__(
        self, url: str, key: str, *, bearer: Callable[[], str], patience_seconds: float = 60.0
    ) -> None:
        self.url = f"{url.rstrip('/')}/storage/v1"
        self._bearer = bearer
        self._patience_seconds = patience_seconds
        # Plain httpx: storage3 keeps whole files in memory both ways, and cannot resume an upload.
        self._http = httpx.Client(headers={"apikey": key, "Accept-Encoding": "identity"}, timeout=_TIMEOUT)

    def ask(
        self,
        method: Method,
        path: str,
        organization_id: str,
        *,
        headers: dict[str, str] | None = None,
        content: bytes | memoryview = b"",
        json: Any = None,
        expected: tuple[int, ...] = (),
    ) -> Answer:
        """Send until there is an answer that is not transient; statuses that are not expected are raised.

        The request must be one that may be repeated.
        """
        deadline = time.monotonic() + self._patience_seconds
        pause = 0.1
        cause: Exception | None
        while True:
            try:
                answer = self._send(method, path, self._headers(organization_id, headers), content, json)
            except (
                *TRANSPORT_ERRORS,
                LedgerUnavailable,
            ) as exc:  # The latter when there is no token just now.
                reason, cause = f"{type(exc).__name__}: {exc}", exc
            else:
                if answer.response.is_success or answer.status in expected:
                    return answer
                if answer.status not in _TRANSIENT:
                    raise self.failure(method, path, answer)
                reason, cause = f"status {answer.status}: {answer.message}", None
            if time.monotonic() + pause > deadline:
                raise self._unavailable(reason) from cause
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 5.0)

    @contextmanager
    def stream(self, path: str, organization_id: str, *, start: int = 0) -> Iterator[httpx.Response]:
        """An answer whose body is not read yet, from an offset on; not repeated."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._http.stream(
            "GET", self.url + path, headers=self._headers(organization_id, headers)
        ) as response:
            if response.is_error:
                response.read()
            yield response

    def failure(self, method: str, path: str, answer: Answer) -> OpenWeightsError:
        """The error for an answer that nobody expected."""
        what = f"Supabase Storage refused {method} {path!r}: {answer.message} (status {answer.status})."
        if answer.status in (401, 403):
            return PermissionDeniedError(
                f"{what} Is the file of your own organization, and the token still good?"
            )
        if answer.status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            return FileStoreError(f"{what} Raise the upload limit in the project's storage settings.")
        if answer.response.is_redirect or answer.status == httpx.codes.NOT_FOUND:
            return ConfigurationError(
                f"{what} Check `SUPABASE_URL`, and that the migrations made the bucket."
            )
        return FileStoreError(what)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _send(
        self, method: Method, path: str, headers: dict[str, str], content: bytes | memoryview, json: Any
    ) -> Answer:
        """Requests outlive their answers until the garbage collector comes, so they must not hold content."""
        if not content:
            return Answer(self._http.request(method, self.url + path, headers=headers, json=json))
        headers = {**headers, "Content-Length": str(len(content))}
        with closing(_blocks(content)) as blocks:
            return Answer(self._http.request(method, self.url + path, headers=headers, content=blocks))

    def _unavailable(self, reason: str) -> FileStoreError:
        return FileStoreError(
            f"Supabase Storage at {self.url!r} did not answer in {self._patience_seconds:.3g} s ({reason}). "
            "Check the network and try again: an upload goes on where it stopped."
        )

    def _headers(self, organization_id: str, headers: dict[str, str] | None) -> dict[str, str]:
        """A person's token names no organization, hence the header; other tokens are not moved by it."""
        caller = {"Authorization": f"Bearer {self._bearer()}"}
        if organization_id:
            caller["x-organization-id"] = organization_id
        return caller | (headers or {})


def _blocks(content: bytes | memoryview) -> Generator[bytes]:
    view = memoryview(content)
    for start in range(0, len(view), _BLOCK_BYTES):
        yield bytes(view[start : start + _BLOCK_BYTES])


def object_path(bucket: str, name: str) -> str:
    """Bucket and name as the end of a URL."""
    return f"{quote(bucket, safe='')}/{quote(name, safe='/')}"
