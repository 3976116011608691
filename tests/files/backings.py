"""A store of each kind, with its raw objects in reach, for the tests of all and of each."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote
from uuid import uuid4

from openweights_prefect.files.connect import connect
from openweights_prefect.files.hashing import digest_stream
from openweights_prefect.files.store import FileStore, LocalFileStore
from openweights_prefect.types.identity import file_id

ORGANIZATION = "00000000-0000-0000-0000-000000000001"
OTHER = "00000000-0000-0000-0000-000000000002"
CONTENT = bytes(range(256)) * 5000


def id_of(content: bytes, purpose: str = "result") -> str:
    return file_id(purpose, digest_stream(io.BytesIO(content), ORGANIZATION).id_hex12)


ID = id_of(CONTENT)
PATH = f"organizations/{ORGANIZATION}/result/{ID.split(':')[1]}"

PART_BYTES = 256 << 10
"""Small, so that a test has many parts of little content."""


class Backing(Protocol):
    """A store and what it keeps its objects in."""

    setting: str
    """What `OW_FILE_STORE` would be: makes the store in another process."""
    store: FileStore

    def objects(self) -> dict[str, bytes]:
        """What is visible, by path in the store."""

    def overwrite(self, path: str, data: bytes) -> None:
        """Change an object behind the store's back."""


class Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.setting = str(root)
        self.store = LocalFileStore(root)

    def objects(self) -> dict[str, bytes]:
        paths = self.root.glob("organizations/**/*")
        return {str(path.relative_to(self.root)): path.read_bytes() for path in paths if path.is_file()}

    def overwrite(self, path: str, data: bytes) -> None:
        (self.root / path).write_bytes(data)


class Bucket:
    """A bucket of its own on the server, and our prefix in it."""

    prefix = "some/prefix"

    def __init__(self, endpoint_url: str) -> None:
        import boto3

        from openweights_prefect.files.s3 import S3FileStore

        self.name = f"bucket-{uuid4().hex[:12]}"
        self.endpoint_url = endpoint_url
        self.setting = (
            f"s3://{self.name}/{self.prefix}?region=us-east-1&endpoint_url={quote(endpoint_url, safe='')}"
        )
        self.client: Any = boto3.client("s3", endpoint_url=endpoint_url, region_name="us-east-1")
        self.client.create_bucket(Bucket=self.name)
        self.store = S3FileStore(
            self.name, self.prefix, endpoint_url=endpoint_url, region="us-east-1", part_bytes=PART_BYTES
        )

    def objects(self) -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
        bodies = {key: self.client.get_object(Bucket=self.name, Key=key)["Body"].read() for key in keys}
        return {key.removeprefix(f"{self.prefix}/"): body for key, body in bodies.items()}

    def overwrite(self, path: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"{self.prefix}/{path}", Body=data)

    def uploads(self) -> dict[str, list[int]]:
        """The numbers of the parts of each unfinished upload, by its id."""
        found: dict[str, list[int]] = {}
        for upload in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", []):
            parts = self.client.list_parts(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])
            found[upload["UploadId"]] = [part["PartNumber"] for part in parts.get("Parts", [])]
        return found


class CuttingProxy:
    """Forwards connections to a server, and cuts as many of its answers after so many bytes."""

    def __init__(self, server: str, *, after_bytes: int, times: int) -> None:
        host, port = server.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self._after_bytes = after_bytes
        self.cuts_left = times
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        sent = 0
        try:
            while data := server.recv(1 << 16):
                if self.cuts_left and sent + len(data) > self._after_bytes:
                    self.cuts_left -= 1
                    client.sendall(data[: self._after_bytes - sent])
                    break
                client.sendall(data)
                sent += len(data)
        except OSError:
            pass
        for each in (client, server):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # A close alone waits for the thread that reads from it.
            each.close()


def store_of(setting: str) -> FileStore:
    """A store in another process."""
    return connect(setting, Path("not-used"))
