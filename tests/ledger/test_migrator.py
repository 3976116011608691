from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from openweights_prefect import bundle
from openweights_prefect.errors import LedgerUnavailable
from openweights_prefect.ledger import embedded
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.migrator import (
    MigrationError,
    MigrationStatus,
    ensure_database,
    migrate,
    status,
)

FIRST = "-- The first.\ncreate table public.one (n int);\ninsert into public.one values (1);\n"
SECOND = "set search_path = '';\ncreate function public.two() returns int language sql as $$ select 2; $$;\n"

MIGRATE = """
import sys
from pathlib import Path
from openweights_prefect.ledger.migrator import ensure_database, migrate
maintenance, name, url, folder = sys.argv[1:]
ensure_database(maintenance, name, owner="prefect")
print(*migrate(url, folder=Path(folder)))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    folder = Path(tempfile.mkdtemp(prefix="ow-test-"))
    yield embedded.start(folder, fsync=False)
    embedded.remove(folder)


@pytest.fixture
def url(server: EmbeddedPostgres) -> str:
    name = f"test_{secrets.token_hex(4)}"
    ensure_database(server.url(database="postgres"), name)
    return server.url(database=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "20260101000000_first.sql").write_text(FIRST)
    (tmp_path / "20260102000000_second.sql").write_text(SECOND)
    return tmp_path


def rows(url: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


def test_migrations_are_applied_once(url: str, folder: Path) -> None:
    """The first call applies all in order, the second none; records are the Supabase CLI's."""
    assert migrate(url, folder=folder) == ["20260101000000", "20260102000000"]
    assert migrate(url, folder=folder) == []
    assert rows(url, "select n, public.two() from public.one") == [(1, 2)]
    assert rows(
        url, "select version, name, statements from supabase_migrations.schema_migrations order by 1"
    ) == [
        ("20260101000000", "first", [FIRST]),
        ("20260102000000", "second", [SECOND]),
    ]


def test_only_the_missing_ones_are_applied(url: str, folder: Path) -> None:
    """A migration that arrives later is applied alone, and `status` shows it before."""
    migrate(url, folder=folder)
    (folder / "20260103000000_third.sql").write_text("create table three (n int)")
    assert status(url, folder=folder)[-1] == MigrationStatus("20260103000000", "third", applied=False)
    assert migrate(url, folder=folder) == ["20260103000000"]
    assert all(migration.applied for migration in status(url, folder=folder))
    assert rows(url, "select to_regclass('public.three') is not null") == [(True,)]


def test_status_changes_nothing(url: str, folder: Path) -> None:
    """`status` of an empty database creates no table."""
    assert [migration.applied for migration in status(url, folder=folder)] == [False, False]
    assert rows(url, "select to_regnamespace('supabase_migrations')::text") == [(None,)]


def test_failing_migration_leaves_no_trace(url: str, folder: Path) -> None:
    """The error names the file and the line; what came before stays, and a mended file is applied."""
    third = folder / "20260103000000_third.sql"
    third.write_text("create table three (n int);\n\nselect no_such_column from three;\n")
    with pytest.raises(MigrationError, match=r"third\.sql', line 3 .*no_such_column"):
        migrate(url, folder=folder)
    assert [migration.applied for migration in status(url, folder=folder)] == [True, True, False]
    assert rows(url, "select to_regclass('public.three')::text") == [(None,)]
    third.write_text("create table three (n int);\n")
    assert migrate(url, folder=folder) == ["20260103000000"]


def test_changed_file_is_refused(url: str, folder: Path) -> None:
    """A file whose statements changed after it was applied stops everything that comes later."""
    migrate(url, folder=folder)
    (folder / "20260101000000_first.sql").write_text(FIRST.replace("(1)", "(9)"))
    (folder / "20260103000000_third.sql").write_text("create table three (n int)")
    with pytest.raises(MigrationError, match=r"first\.sql' was changed after"):
        migrate(url, folder=folder)
    assert rows(url, "select to_regclass('public.three')::text") == [(None,)]


def test_unknown_version_is_refused(url: str, folder: Path) -> None:
    """A database of a newer package is not touched, and `status` shows what it has."""
    migrate(url, folder=folder)
    (folder / "20260102000000_second.sql").unlink()
    with pytest.raises(MigrationError, match=r"this package lacks: 20260102000000.*--upgrade"):
        migrate(url, folder=folder)
    assert status(url, folder=folder)[-1] == MigrationStatus("20260102000000", "second", applied=True)


def test_records_of_the_supabase_cli_are_accepted(url: str, folder: Path) -> None:
    """The CLI records trimmed single statements; they are the same migration."""
    migrate(url, folder=folder)
    statements = [statement.strip() for statement in FIRST.split(";") if statement.strip()]
    with psycopg.connect(url) as connection:
        query = "update supabase_migrations.schema_migrations set statements = %s where name = 'first'"
        connection.execute(query, [statements])
    assert migrate(url, folder=folder) == []


def test_concurrent_migrators(server: EmbeddedPostgres, folder: Path) -> None:
    """Processes that create and migrate the same two databases at once apply each migration once."""
    maintenance = server.url(database="postgres")
    processes = []
    for name in ("left", "right", "left", "right"):
        address = server.url(database=name, user="postgres")
        command = [sys.executable, "-c", MIGRATE, maintenance, name, address, str(folder)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    for name, parts in {"left": answers[::2], "right": answers[1::2]}.items():
        assert sorted(version for part in parts for version in part) == ["20260101000000", "20260102000000"]
        assert rows(server.url(database=name), "select count(*) from public.one") == [(1,)]


def test_shim_gives_the_roles_and_claims_of_supabase(url: str, folder: Path) -> None:
    """`authenticator` may become a user with claims, and has no right of its own."""
    migrate(url, folder=folder)
    as_authenticator = url.replace("//postgres@", "//authenticator@")
    claims = '{"sub": "00000000-0000-0000-0000-00000000000a", "role": "authenticated"}'
    with psycopg.connect(as_authenticator) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select auth.uid()")
        connection.rollback()
        connection.execute("set local role authenticated")
        assert connection.execute("select auth.uid()").fetchone() == (None,)
        connection.execute("select set_config('request.jwt.claims', %s, true)", [claims])
        query = "select auth.uid()::text, auth.jwt() ->> 'role'"
        assert connection.execute(query).fetchone() == (
            "00000000-0000-0000-0000-00000000000a",
            "authenticated",
        )
    flags = rows(
        url, "select rolname, rolcanlogin, rolinherit, rolbypassrls from pg_roles where rolname ~ '^(a|s)'"
    )
    assert sorted(flags) == [
        ("anon", False, False, False),
        ("authenticated", False, False, False),
        ("authenticator", True, False, False),
        ("service_role", False, False, True),
    ]


def test_shim_stays_away_from_supabase(url: str, folder: Path) -> None:
    """Where somebody else owns the schema `auth`, nothing is added to it."""
    with psycopg.connect(url) as connection:
        connection.execute("create role supabase_auth_admin")
        connection.execute("create schema auth authorization supabase_auth_admin")
    migrate(url, folder=folder)
    assert rows(url, "select to_regprocedure('auth.uid()')::text") == [(None,)]


def test_ensure_database_is_idempotent(server: EmbeddedPostgres) -> None:
    """The owner may use its database at once; a second call changes nothing."""
    for _ in range(2):
        ensure_database(server.url(database="postgres"), 'odd "name"', owner="prefect")
    theirs = server.url(database='odd "name"', user="prefect")
    with psycopg.connect(theirs) as connection:
        connection.execute("create table if not exists public.theirs (n int)")
        assert connection.execute("show server_encoding").fetchone() == ("UTF8",)


def test_folders_that_hold_no_migrations(url: str, tmp_path: Path) -> None:
    """An empty folder, a bad name and a doubled version are errors, not an empty success."""
    with pytest.raises(MigrationError, match="no migrations"):
        migrate(url, folder=tmp_path)
    (tmp_path / "20260101000000_a.sql").write_text("select 1")
    (tmp_path / "20260101000000_b.sql").write_text("select 1")
    with pytest.raises(MigrationError, match="same version"):
        migrate(url, folder=tmp_path)
    (tmp_path / "1_short.sql").write_text("select 1")
    with pytest.raises(MigrationError, match="not named like"):
        migrate(url, folder=tmp_path)


def test_unreachable_server(tmp_path: Path, folder: Path) -> None:
    """A server that does not answer is `LedgerUnavailable`, and the message says what to do."""
    with pytest.raises(LedgerUnavailable, match="ow up"):
        migrate(f"postgresql://postgres@/openweights?host={tmp_path}", folder=folder)


def test_migrations_of_the_package(url: str) -> None:
    """The package's own migrations apply to an empty database."""
    versions = [path.name[:14] for path in sorted(bundle.migrations().glob("*.sql"))]
    assert migrate(url) == versions
    assert migrate(url) == []
