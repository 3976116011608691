"""Hostile text in every argument of every function: kept as text or refused, never executed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from openweights_prefect.ledger.embedded import EmbeddedPostgres
from tests.attacks.functions import FUNCTIONS, call_of, may_call
from tests.attacks.world import Attempt, World, build

CORPUS = [
    "'; drop table ledger.jobs; --",
    "' or '1'='1",
    "$$; delete from ledger.runs; $$",
    "\\'; select pg_sleep(10); --",
    "%s %(ow_role)s {} {0} %I %L",
    '"); truncate ledger.events; --',
    '"$.**" ? (@ == 1)',
    "../../../etc/passwd",
    "<script>alert(1)</script>",
    "\u202e\uffff",
    "\uff41\uff07\uff1b",  # full-width letters and signs
    "x" * 100_000,
]
# Data that is refused (22), a constraint (23), not allowed (42501, 28000), too large (54000).
ACCEPTABLE = ("22", "23", "42501", "28000", "54")


@pytest.fixture(scope="module")
def world(postgres: EmbeddedPostgres) -> Iterator[World]:
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("create database injected template ledger_template")
        try:
            yield build(postgres.url(database="injected", user="authenticator"))
        finally:
            connection.execute("drop database injected with (force)")


@pytest.fixture(scope="module")
def connection(world: World) -> Iterator[psycopg.Connection]:
    with psycopg.connect(world.admin_url) as opened:
        opened.execute("set statement_timeout = '5s'")
        opened.commit()
        yield opened


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_hostile_text(world: World, connection: psycopg.Connection, function: str) -> None:
    callers = [name for name in ("admin", "worker", "pod") if may_call(name, function)]
    claims = world.callers[callers[0]] if callers else {"role": "service_role", "aud": "authenticated"}
    for arguments in _variants(connection, function, call_of(world, function)):
        attempt = Attempt(connection, claims, function, arguments)
        state = attempt.error.sqlstate if attempt.error is not None else None
        assert state is None or state.startswith(ACCEPTABLE), (arguments, attempt.error)


_PARAMETERS = """
    select proargnames, proargtypes::regtype[]::text[] from pg_proc
    where pronamespace = 'public'::regnamespace and proname = %s
"""


def _variants(
    connection: psycopg.Connection, function: str, arguments: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Each text parameter in turn, and each text inside the JSON ones, replaced by each line of the corpus."""
    [(names, types)] = connection.execute(_PARAMETERS, [function]).fetchall()
    for name, kind in zip(names or [], types, strict=False):
        for payload in CORPUS:
            if kind == "text":
                yield {**arguments, name: payload}
            elif kind == "text[]":
                yield {**arguments, name: [payload]}
            elif kind == "jsonb":
                yield from (
                    {**arguments, name: value} for value in _planted(arguments.get(name, {}), payload)
                )


def _planted(value: Any, payload: str) -> Iterator[Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        changed = copy.copy(value)
        changed[key] = payload
        yield changed
        for deeper in _planted(inner, payload):
            changed = copy.copy(value)
            changed[key] = deeper
            yield changed
    if isinstance(value, dict):
        yield {**value, payload: payload}
