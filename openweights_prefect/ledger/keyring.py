"""The key file: the master keys that seal the secrets of organizations whose ledger has no Vault.

It is the only thing that opens the sealed values of the ledger: a backup of the ledger needs one of it, kept
elsewhere. Each organization has keys of its own, so the rotation of one leaves the others as they are.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import filelock

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.ledger import envelope
from openweights_prefect.ledger.envelope import KEY_BYTES, Owner, unreadable

FILE_NAME = "secrets.key"
"""Of the key file, in the home of the installation."""

_FORMAT = "openweights-keys-v1"
_LOCK_SECONDS = 60.0


@dataclass
class _Keys:
    """The master keys of one organization: `current` seals, the others still open."""

    current: str
    by_id: dict[str, bytes] = field(repr=False)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> _Keys:
        by_id = {name: base64.b64decode(text, validate=True) for name, text in document["keys"].items()}
        if document["current"] not in by_id or any(len(key) != KEY_BYTES for key in by_id.values()):
            raise ValueError
        return cls(document["current"], by_id)

    def to_json(self) -> dict[str, Any]:
        keys = {name: base64.b64encode(key).decode("ascii") for name, key in self.by_id.items()}
        return {"current": self.current, "keys": keys}


class Keyring:
    """Seals and opens secrets with the keys of a file.

    Holds no key itself: the file is read at each use, for it may be rotated meanwhile. Every method raises
    `ConfigurationError`, naming the mend, for a file that others can read or that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = filelock.FileLock(f"{path}.lock", timeout=_LOCK_SECONDS, mode=0o600)

    def seal(self, organization_id: str, name: str, value: str) -> str:
        """Encrypt a value for the organization and name; the first call ever makes the file and the key."""
        owner = Owner(_canonical(organization_id), name)
        keys = self._read().get(owner.organization_id) or self._add_key(owner, only_first=True)
        return envelope.seal(value, owner=owner, key_id=keys.current, master=keys.by_id[keys.current])

    def open(self, organization_id: str, name: str, sealed: str) -> str:
        """The value that was sealed for exactly this organization and name.

        Raises:
            UnreadableSecret: It was changed, cut short, sealed for another one, or its key is not held.
            ConfigurationError: There is no key file.
        """
        owner = Owner(_canonical(organization_id), name)
        return envelope.unseal(sealed, owner=owner, master=self._master(owner, sealed))

    def rotate(self, organization_id: str) -> None:
        """Seal with a new master key from now on; the old ones still open, until `forget_old_keys`."""
        self._add_key(Owner(_canonical(organization_id), ""), only_first=False)

    def rewrap(self, organization_id: str, name: str, sealed: str) -> str:
        """The sealed value under the current master key; the same text if it is that already."""
        owner = Owner(_canonical(organization_id), name)
        master, keys = self._master(owner, sealed), self._read()[owner.organization_id]
        if envelope.key_id_of(sealed, owner) == keys.current:
            return sealed
        new = keys.by_id[keys.current]
        return envelope.rewrap(sealed, owner=owner, master=master, new_key_id=keys.current, new_master=new)

    def forget_old_keys(self, organization_id: str) -> None:
        """Drop all keys of the organization but the current one: what they sealed is lost from here on."""

        def drop(organizations: dict[str, _Keys]) -> None:
            if keys := organizations.get(_canonical(organization_id)):
                keys.by_id = {keys.current: keys.by_id[keys.current]}

        self._change(drop)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep others from rotating: a value must not be sealed by a key that is dropped before it is stored.

        May be taken again by the thread that holds it. Waits for a minute.
        """
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise ConfigurationError(
                f"Another process has held {self._lock.lock_file!r} for {_LOCK_SECONDS:.0f} s. "
                "End it and try again."
            ) from None
        except OSError as exc:
            raise ConfigurationError(f"The folder of {str(self._path)!r} cannot be used: {exc}.") from None
        try:
            yield
        finally:
            self._lock.release()

    def _master(self, owner: Owner, sealed: str) -> bytes:
        key_id = envelope.key_id_of(sealed, owner)
        organizations = self._read()
        if not organizations and not self._path.exists():
            raise ConfigurationError(
                f"The secret {owner.name!r} is sealed, and the key file {str(self._path)!r} is missing. "
                f"Bring it back from a backup, or store the secret again: `ow env set {owner.name}`."
            )
        keys = organizations.get(owner.organization_id)
        if keys is None or key_id not in keys.by_id:
            raise unreadable(owner)
        return keys.by_id[key_id]

    def _add_key(self, owner: Owner, *, only_first: bool) -> _Keys:
        def add(organizations: dict[str, _Keys]) -> None:
            keys = organizations.setdefault(owner.organization_id, _Keys("", {}))
            if not (only_first and keys.by_id):
                keys.current = secrets.token_hex(8)
                keys.by_id[keys.current] = secrets.token_bytes(KEY_BYTES)

        return self._change(add)[owner.organization_id]

    def _change(self, change: Callable[[dict[str, _Keys]], None]) -> dict[str, _Keys]:
        with self.lock():
            organizations = self._read()
            change(organizations)
            self._write(organizations)
            return organizations

    def _read(self) -> dict[str, _Keys]:
        """The keys by organization; none when there is no file."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise ConfigurationError(
                f"The key file {str(self._path)!r} cannot be read: {exc.strerror}."
            ) from None
        with os.fdopen(descriptor, "rb") as stream:
            self._check_mode(os.fstat(descriptor).st_mode)
            content = stream.read()
        try:
            document = json.loads(content)
            if document["format"] != _FORMAT:
                raise ValueError
            return {name: _Keys.from_json(keys) for name, keys in document["organizations"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            # Without its cause, which may quote the content.
            raise ConfigurationError(
                f"The key file {str(self._path)!r} is damaged. Bring it back from a backup; without it the "
                "secrets that it sealed are lost."
            ) from None

    def _check_mode(self, mode: int) -> None:
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigurationError(
                f"Others may read or write the key file {str(self._path)!r} (mode {stat.S_IMODE(mode):04o}). "
                f"Close it: `chmod 600 {self._path}`. If others use this machine, rotate the key after that."
            )

    def _write(self, organizations: dict[str, _Keys]) -> None:
        """Whole or not at all, and on the disk before anything is sealed with it. Needs the lock."""
        document = {
            "format": _FORMAT,
            "organizations": {name: keys.to_json() for name, keys in organizations.items()},
        }
        unfinished = self._path.with_name(f"{self._path.name}.new")
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(document, indent=2) + "\n")
            stream.flush()
            os.fsync(descriptor)
        unfinished.replace(self._path)
        _sync_folder(self._path.parent)


def _canonical(organization_id: str) -> str:
    """The ledger's spelling: a UUID may be given in capitals."""
    try:
        return str(UUID(organization_id))
    except ValueError:
        return organization_id


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
