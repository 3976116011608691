"""Fixtures that every test may use: a real PostgreSQL with the migrations applied, one database a test."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from openweights_prefect.ledger import embedded, migrator
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID

_TEMPLATE = "ledger_template"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL server for the session; not below pytest's own folder, which shuts other accounts out."""
    folder = Path(tempfile.mkdtemp(prefix="ow-test-pg-"))
    folder.chmod(0o755)
    server = embedded.start(folder / "postgres", fsync=False)
    try:
        migrator.ensure_database(server.url(database="postgres"), _TEMPLATE)
        migrator.migrate(server.url(database=_TEMPLATE))
        with psycopg.connect(server.url(database=_TEMPLATE), autocommit=True) as connection:
            connection.execute(
                "insert into organizations (id, name) values (%s, 'local')", (LOCAL_ORGANIZATION_ID,)
            )
        yield server
    finally:
        embedded.remove(folder / "postgres")
        folder.rmdir()


@pytest.fixture
def ledger_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The `authenticator` URL of a fresh ledger that holds the local organization."""
    name = f"ledger_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        make = sql.SQL("create database {} template {}")
        connection.execute(make.format(sql.Identifier(name), sql.Identifier(_TEMPLATE)))
        yield postgres.url(database=name, user="authenticator")
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[PostgresLedger]:
    """A fresh ledger, as the local organization sees it."""
    opened = PostgresLedger(ledger_url, organization_id=LOCAL_ORGANIZATION_ID)
    yield opened
    opened.close()
