"""Brings a database to the schema of this package, with the bookkeeping of the Supabase CLI.

The CLI's `db push` and `migrate()` read and write the same table, so either may follow the other.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from openweights_prefect import bundle
from openweights_prefect.errors import ConflictError, LedgerUnavailable

_FILE_NAME = re.compile(r"(\d{14})_(\w[\w-]*)\.sql")
_INSIGNIFICANT = re.compile(r"[\s;]+")
_LOCK_KEY = 0x6F77_6D69_6772_6174  # "owmigrat": one migrator at a time in a database.
_CONNECT_SECONDS = 10
_LOCK_TIMEOUT = "120s"

_PREPARE_BOOKKEEPING = """
    create schema if not exists supabase_migrations;
    create table if not exists supabase_migrations.schema_migrations (
        version text not null primary key, statements text[], name text
    )
"""


class MigrationError(ConflictError):
    """The database and the migration files do not fit together."""


@dataclass(frozen=True)
class MigrationStatus:
    """Whether the database has one migration."""

    version: str
    name: str
    applied: bool


@dataclass(frozen=True)
class _Migration:
    version: str
    name: str
    path: Path
    text: str


@dataclass(frozen=True)
class _Record:
    name: str
    statements: tuple[str, ...]


def migrate(url: str, *, folder: Path | None = None) -> list[str]:
    """Apply the migrations that the database lacks, oldest first; returns their versions.

    Idempotent and safe to call from several processes. Each migration is one transaction together with its
    record, so a failure leaves the earlier ones applied and itself not at all. Before anything is changed,
    raises `MigrationError` when the database has a version that the files lack, or had another text for one
    of them.
    """
    migrations = _read_migrations(folder)
    with _connect(url) as connection:
        _check(migrations, _records(connection))
        if not _is_supabase(connection):
            with _locked_transaction(connection):
                connection.execute(_read(bundle.migrations().parent / "shim.sql"))
        with _locked_transaction(connection):
            if not _has_bookkeeping(connection):
                connection.execute(_PREPARE_BOOKKEEPING)
        return [migration.version for migration in migrations if _apply(connection, migration)]


def status(url: str, *, folder: Path | None = None) -> list[MigrationStatus]:
    """Every migration of the files and of the database, oldest first; changes nothing."""
    files = {migration.version: migration.name for migration in _read_migrations(folder)}
    with _connect(url) as connection:
        records = _records(connection)
    names = {version: record.name for version, record in records.items()} | files
    return [MigrationStatus(version, names[version], version in records) for version in sorted(names)]


def ensure_database(url_of_postgres_db: str, name: str, *, owner: str | None = None) -> None:
    """Create the database `name`, and the login role `owner` for it, where they are missing.

    Safe to call from several processes. What exists is left as it is, its owner included.
    """
    with _connect(url_of_postgres_db) as connection:
        connection.autocommit = True  # PostgreSQL creates no database inside a transaction.
        connection.execute("select set_config('lock_timeout', %s, false)", [_LOCK_TIMEOUT])
        connection.execute("select pg_advisory_lock(%s)", [_LOCK_KEY])
        if owner is not None and not _exists(connection, "select from pg_roles where rolname = %s", owner):
            with contextlib.suppress(psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
                connection.execute(sql.SQL("create role {} login").format(sql.Identifier(owner)))
        if not _exists(connection, "select from pg_database where datname = %s", name):
            statement = sql.SQL("create database {} template template0 encoding 'UTF8'").format(
                sql.Identifier(name)
            )
            if owner is not None:
                statement += sql.SQL(" owner {}").format(sql.Identifier(owner))
            with contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                connection.execute(statement)


def _read_migrations(folder: Path | None) -> list[_Migration]:
    folder = bundle.migrations() if folder is None else folder
    found: dict[str, _Migration] = {}
    for path in sorted(folder.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise MigrationError(
                f"{str(path)!r} is not named like a migration. Name it `<yyyymmddhhmmss>_<name>.sql`."
            )
        migration = _Migration(match[1], match[2], path, _read(path))
        other = found.setdefault(migration.version, migration)
        if other is not migration:
            raise MigrationError(
                f"{other.path.name!r} and {path.name!r} have the same version. Rename one of them."
            )
    if not found:
        raise MigrationError(f"There are no migrations in {str(folder)!r}. Install the package again.")
    return list(found.values())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@contextlib.contextmanager
def _connect(url: str) -> Iterator[psycopg.Connection]:
    try:
        with psycopg.connect(url, connect_timeout=_CONNECT_SECONDS, autocommit=True) as connection:
            yield connection
    except psycopg.OperationalError as exc:
        raise LedgerUnavailable(
            f"The ledger's PostgreSQL server cannot be used: {exc}. Start it with `ow up`, or check "
            "`OW_DATABASE_URL`."
        ) from exc
    except psycopg.Error as exc:
        raise MigrationError(
            f"The ledger's PostgreSQL server refused: {exc}. The first migration of a plain PostgreSQL "
            "needs a superuser."
        ) from exc


@contextlib.contextmanager
def _locked_transaction(connection: psycopg.Connection) -> Iterator[None]:
    """A transaction that excludes other migrators; a lock of the session would not survive a pooler."""
    with connection.transaction():
        connection.execute("select set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
        connection.execute("select pg_advisory_xact_lock(%s)", [_LOCK_KEY])
        yield


def _exists(connection: psycopg.Connection, query: str, *values: str) -> bool:
    return connection.execute(query, values).fetchone() is not None


def _is_supabase(connection: psycopg.Connection) -> bool:
    """Whether the schema `auth` is somebody else's; the shim's own belongs to whoever migrates."""
    return _exists(
        connection,
        "select from pg_namespace where nspname = %s and nspowner <> current_user::regrole",
        "auth",
    )


def _has_bookkeeping(connection: psycopg.Connection) -> bool:
    return _exists(
        connection, "select where to_regclass(%s) is not null", "supabase_migrations.schema_migrations"
    )


def _records(connection: psycopg.Connection) -> dict[str, _Record]:
    if not _has_bookkeeping(connection):
        return {}
    rows = connection.execute("select version, name, statements from supabase_migrations.schema_migrations")
    return {version: _Record(name or "", tuple(statements or ())) for version, name, statements in rows}


def _check(migrations: list[_Migration], records: dict[str, _Record]) -> None:
    unknown = sorted(records.keys() - {migration.version for migration in migrations})
    if unknown:
        raise MigrationError(
            f"The database has migrations that this package lacks: {', '.join(unknown)}. A newer version "
            "made them. Run `pip install --upgrade openweights-prefect`, or use another database."
        )
    for migration in migrations:
        record = records.get(migration.version)
        if record is not None and not _same_text(migration.text, record):
            raise MigrationError(
                f"{str(migration.path)!r} was changed after it was applied. Restore its text, and put the "
                "change into a new migration."
            )


def _same_text(text: str, record: _Record) -> bool:
    """We record the whole file; the CLI records its statements, without the space and `;` between them."""
    if not record.statements:  # `supabase migration repair` may record none.
        return True
    return _INSIGNIFICANT.sub("", text) == _INSIGNIFICANT.sub("", "".join(record.statements))


def _apply(connection: psycopg.Connection, migration: _Migration) -> bool:
    """Apply one migration; False when it is applied already."""
    try:
        with _locked_transaction(connection):
            added = connection.execute(
                "insert into supabase_migrations.schema_migrations (version, name, statements) values (%s, "
                "%s, %s) "
                "on conflict (version) do nothing returning version",
                [migration.version, migration.name, [migration.text]],
            ).fetchone()
            if added is not None:
                connection.execute(migration.text)
        connection.execute("reset all")  # What one migration sets must not reach the next.
    except psycopg.OperationalError:
        raise
    except psycopg.Error as exc:
        raise MigrationError(_describe(exc, migration)) from exc
    return added is not None


def _describe(exc: psycopg.Error, migration: _Migration) -> str:
    position = exc.diag.statement_position
    line = f", line {migration.text.count(chr(10), 0, int(position)) + 1}" if position else ""
    return (
        f"{str(migration.path)!r}{line} cannot be applied: {exc}. Nothing of it was kept; mend it and "
        "migrate again."
    )
