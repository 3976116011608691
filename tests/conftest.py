"""Fixtures that every test may use: a real PostgreSQL with the migrations applied, one database a test.

With `transport` "supabase" the database is a Supabase project's and the ledger is reached over HTTP.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psycopg
import pytest
from psycopg import sql

from openweights_prefect.ledger import embedded, migrator
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from openweights_prefect.stack.databases import create_organization
from tests.callers import Callers
from tests.postgres_versions import server_binaries

if TYPE_CHECKING:
    from tests.supabase_double import SupabaseDouble

collect_ignore = ["training"]  # The job interpreter runs these: `make test` does it.

_TEMPLATE = "ledger_template"
_SUPABASE_TEMPLATE = "supabase_template"
_numbers = itertools.count()


class OpenLedger(Protocol):
    """What the fixture `open_ledger` gives."""

    def __call__(self, organization_id: str = ..., *, connections: int = ...) -> Callers: ...


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL server for the session; not below pytest's own folder, which shuts other accounts out."""
    folder = Path(tempfile.mkdtemp(prefix="ow-test-pg-"))
    folder.chmod(0o755)
    server = embedded.start(folder / "postgres", fsync=False, binaries=server_binaries())
    try:
        migrator.ensure_database(server.url(database="postgres"), _TEMPLATE)
        migrator.migrate(server.url(database=_TEMPLATE))
        create_organization(server.url(database=_TEMPLATE, user="authenticator"), LOCAL_ORGANIZATION_ID)
        yield server
    finally:
        embedded.remove(folder / "postgres")
        folder.rmdir()


@pytest.fixture(scope="session")
def supabase_template(postgres: EmbeddedPostgres) -> str:
    """The name of a database like that of a Supabase project, migrated by its owner, who is no superuser."""
    from tests import supabase_double  # Needs the extra `supabase`, and so do only the tests that ask for it.

    server, project = postgres.url(database="postgres"), postgres.url(database=_SUPABASE_TEMPLATE)
    supabase_double.prepare_server(server)
    migrator.ensure_database(server, _SUPABASE_TEMPLATE, owner="project_owner")
    migrator.migrate(supabase_double.prepare_project(project))
    create_organization(
        postgres.url(database=_SUPABASE_TEMPLATE, user="authenticator"), LOCAL_ORGANIZATION_ID
    )
    return _SUPABASE_TEMPLATE


@pytest.fixture
def transport() -> str:
    """How the ledger is reached, "psycopg" or "supabase"; folders and files of tests override it."""
    return "psycopg"


@pytest.fixture
def ledger_url(postgres: EmbeddedPostgres, transport: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The `authenticator` URL of a fresh ledger that holds the local organization."""
    template = _TEMPLATE if transport == "psycopg" else request.getfixturevalue("supabase_template")
    name = f"ledger_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        make = sql.SQL("create database {} template {}")
        connection.execute(make.format(sql.Identifier(name), sql.Identifier(template)))
        yield postgres.url(database=name, user="authenticator")
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def supabase(ledger_url: str, tmp_path: Path) -> Iterator[SupabaseDouble]:
    """A Supabase project over the test's database; needs the transport "supabase"."""
    from tests.supabase_double import SupabaseDouble

    admin_url = ledger_url.replace("authenticator@", "postgres@")
    with SupabaseDouble(database_url=ledger_url, admin_url=admin_url, folder=tmp_path / "supabase") as double:
        yield double


@pytest.fixture
def open_ledger(ledger_url: str, transport: str, request: pytest.FixtureRequest) -> Iterator[OpenLedger]:
    """Opens the ledger for the callers of an organization, by the test's transport."""
    opened: list[Callers] = []

    def open_one(organization_id: str = LOCAL_ORGANIZATION_ID, *, connections: int = 4) -> Callers:
        open_as = None
        if transport == "supabase":
            double: SupabaseDouble = request.getfixturevalue("supabase")
            open_as = double.ledger
        opened.append(Callers(ledger_url, organization_id, open_as=open_as, connections=connections))
        return opened[-1]

    yield open_one
    for callers in opened:
        callers.close()


@pytest.fixture
def ledger(open_ledger: OpenLedger) -> Callers:
    """A fresh ledger, as the callers of the local organization see it."""
    return open_ledger()
