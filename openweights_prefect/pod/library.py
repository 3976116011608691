"""The agent's files: brings them in verified, and stores what a run produces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openweights_prefect.errors import NotFoundError
from openweights_prefect.files.hashing import digest_path
from openweights_prefect.files.store import FileStore
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.types.identity import file_id as make_file_id
from openweights_prefect.types.paths import safe_relative_path


class Library:
    """Files of one organization, by id."""

    def __init__(self, *, ledger: Ledger, store: FileStore, organization_id: str) -> None:
        self._ledger = ledger
        self._store = store
        self._organization_id = organization_id

    def fetch(self, file_id: str, target: Path) -> None:
        """Copy a file to `target`, re-checking its hash; nothing is left there when it is damaged."""
        self._store.fetch(file_id, self._organization_id, target)

    def upload(self, path: str, *, purpose: str, name: str) -> dict[str, Any]:
        """Store a file and register it; the same content is stored once."""
        filename = str(safe_relative_path(name))
        digest = digest_path(Path(path), self._organization_id)
        file_id = make_file_id(purpose, digest.id_hex12)
        self._store.put(file_id, self._organization_id, Path(path))
        row = {
            "id": file_id,
            "purpose": purpose,
            "filename": filename,
            "bytes": digest.bytes,
            "sha256": digest.sha256,
        }
        return self._ledger.call("register_file", file=row)[0]

    def write_result(self, key: str, data: bytes) -> None:
        """Keep what a flow returned."""
        self._store.write_result(key, self._organization_id, data)

    def read_result(self, key: str) -> bytes | None:
        """What a flow returned; None when there is nothing under this key."""
        return self._store.read_result(key, self._organization_id)

    def describe(self, file_id: str) -> dict[str, Any]:
        """The ledger's row of a file; raises `NotFoundError`."""
        rows = self._ledger.call("get_files", ids=[file_id])
        if not rows:
            raise NotFoundError(f"There is no file {file_id!r} in this organization.")
        return rows[0]
