"""What `ow db verify` looks at: whether the ledger and the file store are whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from uuid import UUID

import psycopg

from openweights_prefect.errors import LedgerUnavailable, OpenWeightsError, PermissionDeniedError
from openweights_prefect.files.hashing import digest_stream
from openweights_prefect.files.selection import open_store
from openweights_prefect.files.store import FileStore
from openweights_prefect.ledger import migrator
from openweights_prefect.ledger.connect import access_tokens, connect
from openweights_prefect.settings import Settings
from openweights_prefect.stack.checks import Check
from openweights_prefect.stack.integrity import QUERIES, Integrity

_CONNECT_SECONDS = 10
_SHOWN = 5
_PAGE_ROWS = 1000


class _File(NamedTuple):
    organization_id: str
    id: str
    bytes: int
    sha256: str


def verify(url: str, settings: Settings, *, deep: bool = False) -> Iterator[Check]:
    """Check that the ledger at `url`, that of its owner, is whole; with `deep` every file is hashed again.

    Changes nothing, and may run while everything else does. Raises `PermissionDeniedError` for a login that
    does not see every row.
    """
    yield _migrations(url)
    with _snapshot(url) as connection:
        for query in QUERIES:
            yield _check(query, [row[0] for row in connection.execute(query.text)])
        yield _files(connection, settings, deep=deep)


def _migrations(url: str) -> Check:
    missing = [each.version for each in migrator.status(url) if not each.applied]
    detail = f"{len(missing)} are missing, the first is {missing[0]}" if missing else "all applied"
    return Check("migrations", not missing, detail, "Run `ow db migrate`.")


def _check(query: Integrity, problems: list[str]) -> Check:
    return Check(query.name, not problems, _listed(problems) or query.whole, query.mend)


def _listed(problems: list[str]) -> str:
    rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + rest


def _files(connection: psycopg.Connection, settings: Settings, *, deep: bool) -> Check:
    mend = "Upload the file again with `ow.files.upload`, or bring it back from a backup of the store."
    try:
        store, only = _store(settings)
    except OpenWeightsError as exc:
        return Check("files", False, str(exc), "Give the settings that reach the file store.")
    count, problems = 0, []
    for file in _file_rows(connection, only):
        count += 1
        problem = _problem(store, file, deep=deep)
        if problem:
            problems.append(f"{file.id} of organization {file.organization_id} {problem}")
    whole = f"{count} are in the store" + (" with the right content" if deep else "")
    return Check("files", not problems, _listed(problems) or whole, mend)


def _store(settings: Settings) -> tuple[FileStore, str | None]:
    """The file store, and the one organization whose files it shows us; None for all."""
    access = access_tokens(settings)
    store = open_store(settings, bearer=access.bearer if access else None)
    if access is None or settings.file_store:
        return store, None
    return store, connect(settings, access=access).organization_id


def _problem(store: FileStore, file: _File, *, deep: bool) -> str | None:
    try:
        if not deep:
            return None if store.exists(file.id, file.organization_id) else "is not in the store"
        with store.open(file.id, file.organization_id) as stream:
            digest = digest_stream(stream, file.organization_id)
    except OpenWeightsError as exc:
        return f"cannot be read: {exc}"
    if (digest.bytes, digest.sha256) != (file.bytes, file.sha256):
        return f"has other content in the store ({digest.bytes} bytes instead of {file.bytes})"
    return None


def _file_rows(connection: psycopg.Connection, only: str | None) -> Iterable[_File]:
    """Page by page: a ledger may hold more files than the memory."""
    after: tuple[UUID | str, str] = ("00000000-0000-0000-0000-000000000000", "")
    while True:
        rows = connection.execute(
            "select f.organization_id, f.id, f.bytes, f.sha256 from ledger.files f "
            "where (f.organization_id, f.id) > (%s::uuid, %s) "
            "and (%s::uuid is null or f.organization_id = %s::uuid) "
            "order by f.organization_id, f.id limit %s",
            [*after, only, only, _PAGE_ROWS],
        ).fetchall()
        yield from (_File(str(organization), *rest) for organization, *rest in rows)
        if len(rows) < _PAGE_ROWS:
            return
        after = (rows[-1][0], rows[-1][1])


@contextmanager
def _snapshot(url: str) -> Iterator[psycopg.Connection]:
    """One moment of the ledger, as somebody who sees every row."""
    try:
        with psycopg.connect(url, connect_timeout=_CONNECT_SECONDS) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            sees_all = connection.execute(
                "select rolsuper or rolbypassrls from pg_roles where rolname = current_user"
            ).fetchone()
            if not sees_all or not sees_all[0]:
                raise PermissionDeniedError(
                    f"The login {connection.info.user!r} does not see every row of the ledger. Set "
                    "`OW_DATABASE_URL` to that of its owner (on Supabase, `postgres`)."
                )
            yield connection
    except psycopg.OperationalError as exc:
        raise LedgerUnavailable(
            f"The ledger's PostgreSQL server cannot be used: {exc}. Start it with `ow up`, or check "
            "`OW_DATABASE_URL`."
        ) from exc
