"""`ow.secrets`: values that jobs get by name, and that nobody sees in passing."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from openweights_prefect.errors import (
    ConflictError,
    InvalidParameterError,
    InvalidRequestError,
    NotFoundError,
)
from openweights_prefect.jobs.secrets import SECRET_NAME
from openweights_prefect.ledger.envelope import PREFIX
from openweights_prefect.ledger.keyring import FILE_NAME, Keyring
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.resources.session import MAX_ROWS, Session
from openweights_prefect.types.job import parse_time

MAX_VALUE_BYTES = 64 * 1024

_PASSES = 10


@dataclass(frozen=True)
class SecretName:
    """What is shown of a secret."""

    name: str
    created_at: datetime | None
    updated_at: datetime | None


class Secrets:
    """Secrets of the organization: any member may store one, only admins may read one.

    A job that names it (`secrets=["HF_TOKEN"]`) finds the value in the environment of its command; a flow of
    the user's own finds it in `os.environ`. The value never passes through Prefect or the command's
    arguments, and is `***` in the logs and events of that job when it has 8 characters or more. Files that
    a job uploads, and what a flow of the user's own tells Prefect itself, are as the job wrote them.

    On Supabase its Vault keeps the values. Elsewhere they are sealed by a key file, `secrets.key` in the
    home of the installation (`OW_HOME`), before they leave this process; without it they cannot be opened.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._keyring = Keyring(session.settings.home / FILE_NAME)

    def set(self, name: str, value: str) -> None:
        """Store a secret, or give it another value; jobs that run already keep the one they have.

        Raises `InvalidParameterError` for a name or a value that no environment variable can have.
        """
        _check_name(name)
        _check_value(name, value)
        if self._storage == "vault":
            self._call("set_secret", secret_name=name, secret_value=value)
            return
        with self._keyring.lock():
            sealed = self._keyring.seal(self._session.organization_id, name, value)
            self._call("set_secret", secret_name=name, secret_value=sealed)

    def list(self) -> list[SecretName]:
        """The names of all secrets, in order, and when they were changed; never a value."""
        found: builtins.list[SecretName] = []
        while True:
            after = found[-1].name if found else None
            rows = self._call("list_secrets", max_rows=MAX_ROWS, after_name=after)
            found += [
                SecretName(row["name"], parse_time(row["created_at"]), parse_time(row["updated_at"]))
                for row in rows
            ]
            if len(rows) < MAX_ROWS:
                return found

    def get(self, name: str) -> str:
        """The value of a secret; the audit log notes who read it.

        Raises:
            PermissionDeniedError: The caller is no admin.
            NotFoundError: There is no such secret.
            UnreadableSecret: The key file of this machine does not open it.
        """
        _check_name(name)
        with self._keyring.lock():
            rows = self._call("read_secret", secret_name=name)
            if not rows:
                raise NotFoundError(
                    f"No secret {name!r} in this organization; `ow env show` lists the names."
                )
            value = str(rows[0]["value"])
            if self._storage == "vault":
                return value
            return self._keyring.open(self._session.organization_id, name, value)

    def delete(self, name: str) -> bool:
        """Remove a secret; False when there was none. Needs an admin.

        A job that names it, and has not begun yet, fails and says so.
        """
        _check_name(name)
        [answer] = self._call("delete_secret", secret_name=name)
        return bool(answer["outcome"] == "deleted")

    def rotate(self) -> int:
        """Give the organization a new master key, bring all sealed secrets under it, and drop the old key.

        Returns how many there were. Needs an admin and the key file. Cut short, it has lost nothing: call it
        again. A backup of the ledger from before needs a backup of the key file from before.

        Raises:
            InvalidRequestError: Supabase Vault keeps the secrets, and rotates its own key.
            UnreadableSecret: A stored value is damaged; store it again, or delete it, then rotate.
        """
        organization_id = self._session.organization_id
        rows = self._call("list_sealed")  # before there is another key: only an admin gets here
        if self._storage == "vault":
            raise InvalidRequestError(
                "Supabase Vault keeps the secrets of this organization; its key is not ours to rotate."
            )
        with self._keyring.lock():
            self._keyring.rotate(organization_id)
            for _ in range(_PASSES):
                rows = self._call("list_sealed")
                if not any([self._rewrap(organization_id, row) for row in rows]):
                    self._keyring.forget_old_keys(organization_id)
                    return len(rows)
        raise ConflictError(
            "The secrets of the organization change faster than they can be brought under the new key. "
            "Call it again; until then the old key is kept."
        )

    def _rewrap(self, organization_id: str, row: Row) -> bool:
        """Bring one secret under the current key; False when it is there already.

        True whether it was replaced or had changed meanwhile: the next look decides.
        """
        name, old = row["name"], row["sealed"]
        new = self._keyring.rewrap(organization_id, name, old)
        if new == old:
            return False
        self._call("replace_sealed", secret_name=name, old_value=old, new_value=new)
        return True

    @cached_property
    def _storage(self) -> str:
        """'vault' or 'sealed'; asked once."""
        return str(self._call("whoami")[0]["secret_storage"])

    def _call(self, function: str, **arguments: Any) -> builtins.list[Row]:
        return self._session.ledger.call(function, **arguments)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not SECRET_NAME.fullmatch(name):
        raise InvalidParameterError(
            f"{name!r:.120} cannot be the name of a secret: it becomes an environment variable. Use letters, "
            "digits and `_`, at most 100, no digit first."
        )


def _check_value(name: str, value: str) -> None:
    """The value itself is in no message."""
    if not isinstance(value, str):
        raise InvalidParameterError(f"The value of secret {name!r} is a {type(value).__name__}, no string.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidParameterError(f"The value of secret {name!r} is no valid Unicode.") from None
    if not value:
        raise InvalidParameterError(
            f"The value of secret {name!r} is empty. To remove it: `ow env unset {name}`."
        )
    if "\0" in value:
        raise InvalidParameterError(
            f"The value of secret {name!r} holds U+0000, which no environment variable can. "
            "Store it as base64."
        )
    if size > MAX_VALUE_BYTES:
        raise InvalidParameterError(
            f"The value of secret {name!r} has {size} bytes; the most is {MAX_VALUE_BYTES}. "
            "Store a key that opens a file, and the file with `ow.files`."
        )
    if value.startswith(PREFIX):
        raise InvalidParameterError(
            f"The value of secret {name!r} is sealed already; give the plain value, which is sealed here."
        )
