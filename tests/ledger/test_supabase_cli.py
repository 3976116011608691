"""The Supabase CLI applies our migrations, keeps the same books as our migrator, and has no complaint.

It needs neither Docker nor an account for a PostgreSQL that it can reach over TCP. The database is like that
of a new project, and so is the role that migrates it, which is no superuser.
"""

from __future__ import annotations

import shutil
import subprocess
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from openweights_prefect import bundle
from openweights_prefect.ledger import migrator
from tests.loopback_postgres import LoopbackPostgres, loopback_postgres
from tests.npm_packages import npm_program

OWNER = "project_owner"
PROJECT = Path(__file__).parents[1] / "supabase_double"
VERSIONS = [path.name[:14] for path in sorted(bundle.migrations().glob("*.sql"))]


@pytest.fixture(scope="module")
def cli() -> Path:
    return npm_program("supabase", "3.1.0")


@pytest.fixture(scope="module")
def server(cli: Path) -> Iterator[LoopbackPostgres]:
    with loopback_postgres() as started:
        with psycopg.connect(started.url(), autocommit=True) as connection:
            connection.execute((PROJECT / "roles.sql").read_bytes())
            login = sql.SQL("alter role {} login createdb password {}")
            connection.execute(login.format(sql.Identifier(OWNER), sql.Literal(started.password)))
        yield started


@pytest.fixture
def url(server: LoopbackPostgres) -> Iterator[str]:
    """A new project, as its owner reaches it."""
    name = f"project_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        make = sql.SQL("create database {} owner {}")
        connection.execute(make.format(sql.Identifier(name), sql.Identifier(OWNER)))
        with psycopg.connect(server.url(database=name)) as project:
            project.execute((PROJECT / "platform.sql").read_bytes())
        yield server.url(database=name, user=OWNER)
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A checkout's `infrastructure`: the CLI writes notes of its own beside what it reads."""
    shutil.copytree(
        bundle.deploy_root() / "infrastructure" / "supabase", tmp_path / "infrastructure" / "supabase"
    )
    return tmp_path / "infrastructure"


class Supabase:
    """The CLI in one folder against one database."""

    def __init__(self, program: Path, workdir: Path, url: str) -> None:
        self._program = program
        self._workdir = workdir
        self._url = url

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, *arguments, f"--remote={self._url}", f"--workdir={self._workdir}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=self._workdir,
            stdin=subprocess.DEVNULL,
            env={
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "HOME": str(self._workdir.parent),
                "SUPABASE_TELEMETRY_DISABLED": "1",
                "DO_NOT_TRACK": "1",
                "NO_COLOR": "1",
            },
        )

    def push(self) -> subprocess.CompletedProcess[str]:
        return self.run("db", "push", "--yes")


@pytest.fixture
def supabase(cli: Path, workdir: Path, url: str) -> Supabase:
    return Supabase(cli, workdir, url)


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


def test_the_owner_is_no_superuser(url: str) -> None:
    """Else the tests here would show nothing."""
    query = "select rolsuper, rolcreaterole, rolbypassrls from pg_roles where rolname = current_user"
    assert rows(url, query) == [(False, True, True)]


def test_push_then_our_migrator(supabase: Supabase, url: str) -> None:
    """Our migrator takes what the CLI applied for applied, and has nothing to do."""
    done = supabase.push()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN" not in done.stderr, "the CLI does not know all of config.toml"
    assert [(one.version, one.applied) for one in migrator.status(url)] == [(v, True) for v in VERSIONS]
    assert migrator.migrate(url) == []
    again = supabase.push()
    assert again.returncode == 0
    assert "up to date" in again.stdout + again.stderr


def test_our_migrator_then_push(supabase: Supabase, url: str) -> None:
    """The CLI takes what our migrator applied for applied, and has nothing to do."""
    assert migrator.migrate(url) == VERSIONS
    before = rows(
        url, "select version, name, statements from supabase_migrations.schema_migrations order by 1"
    )
    done = supabase.push()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "up to date" in done.stdout + done.stderr
    after = rows(
        url, "select version, name, statements from supabase_migrations.schema_migrations order by 1"
    )
    assert after == before


def test_half_by_one_and_half_by_the_other(supabase: Supabase, url: str, tmp_path: Path) -> None:
    """A project that was migrated by hand goes on with `ow db migrate`, and the other way round."""
    first = tmp_path / "first"
    first.mkdir()
    for path in sorted(bundle.migrations().glob("*.sql"))[:2]:
        shutil.copy(path, first)
    migrator.migrate(url, folder=first)
    done = supabase.push()
    assert done.returncode == 0, done.stdout + done.stderr
    assert migrator.migrate(url) == []


def test_the_configuration() -> None:
    """The API exposes functions and no tables, and the exchange asks nobody for a JWT."""
    path = bundle.migrations().parent / "config.toml"
    config = tomllib.loads(path.read_text(encoding="utf-8"))
    assert config["api"] == {"schemas": ["public"], "extra_search_path": ["public"], "max_rows": 1000}
    assert config["functions"] == {"exchange": {"verify_jwt": False}}
    assert (path.parent / "functions" / "exchange" / "index.ts").is_file()


def test_migration_list(supabase: Supabase, url: str) -> None:
    """`migration list` shows each of ours as local and remote."""
    migrator.migrate(url)
    done = supabase.run("migration", "list")
    assert done.returncode == 0, done.stderr
    assert all(done.stdout.count(version) == 2 for version in VERSIONS), done.stdout


def test_the_advisors_find_nothing(supabase: Supabase, url: str) -> None:
    """No warning about security or performance, and surely no error."""
    migrator.migrate(url)
    done = supabase.run("db", "advisors", "--type", "all", "--level", "warn", "--fail-on", "error")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout + done.stderr


def test_the_advisors_can_find_something(supabase: Supabase, url: str) -> None:
    """A table that everybody may read is an error: the test above is not blind."""
    migrator.migrate(url)
    with psycopg.connect(url) as connection:
        connection.execute("create table public.careless (n int)")
        connection.execute("grant all on public.careless to anon")
    done = supabase.run("db", "advisors", "--type", "all", "--level", "warn", "--fail-on", "error")
    assert done.returncode != 0
    assert "careless" in done.stdout + done.stderr


def test_both_ways_make_the_same_schema(supabase: Supabase, server: LoopbackPostgres, url: str) -> None:
    """Functions, policies, grants and columns: whoever applied them."""
    assert supabase.push().returncode == 0
    mine = f"project_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("create database {} owner {}").format(sql.Identifier(mine), sql.Identifier(OWNER))
        )
        with psycopg.connect(server.url(database=mine)) as project:
            project.execute((PROJECT / "platform.sql").read_bytes())
        ours = server.url(database=mine, user=OWNER)
        migrator.migrate(ours)
        try:
            for query in (FUNCTIONS, POLICIES, RELATIONS, COLUMNS):
                assert rows(ours, query) == rows(url, query)
                assert len(rows(ours, query)) > 5
        finally:
            connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(mine)))


FUNCTIONS = """
    select oid::regprocedure::text, md5(prosrc), prosecdef, proconfig::text, proacl::text,
           proowner::regrole::text
    from pg_proc where pronamespace in ('public'::regnamespace, 'private'::regnamespace) order by 1
"""
POLICIES = """
    select schemaname, tablename, policyname, roles::text, cmd, qual, with_check from pg_policies
    order by 1, 2, 3
"""
RELATIONS = """
    select oid::regclass::text, relkind::text, relacl::text, relrowsecurity, relforcerowsecurity from pg_class
    where relnamespace in ('public'::regnamespace, 'private'::regnamespace, 'ledger'::regnamespace) order by 1
"""
COLUMNS = """
    select table_schema, table_name, column_name, data_type, column_default, is_nullable
    from information_schema.columns where table_schema in ('ledger', 'private', 'public') order by 1, 2, 3
"""
