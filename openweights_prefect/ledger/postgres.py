"""The ledger over psycopg: embedded PostgreSQL, or any other."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool, PoolTimeout

from openweights_prefect.errors import ConflictError, InvalidRequestError, LedgerUnavailable
from openweights_prefect.ledger.protocol import Row

_CONNECTION_LOST = (
    "08",
    "57P",
    "53",
    "55P03",
    "40",
)  # gone, shutting down, out of resources, locks, serialization


class PostgresLedger:
    """Calls SQL functions as `authenticated` for one organization; safe to share between threads."""

    def __init__(
        self, url: str, *, organization_id: str, patience_seconds: float = 30.0, connections: int = 4
    ) -> None:
        self._organization_id = organization_id
        self._patience_seconds = patience_seconds
        self._pool = ConnectionPool(
            url,
            min_size=0,
            max_size=connections,
            open=True,
            configure=self._configure,
            check=None,
            kwargs={"autocommit": True},
            timeout=patience_seconds,
            reconnect_timeout=patience_seconds,
            name="ledger",
        )

    def call(self, function: str, **arguments: Any) -> list[Row]:
        """Call a function and return its rows.

        Lost connections are retried until the patience runs out: functions are written so that a
        repeated call has no second effect.

        Raises:
            LedgerUnavailable: The database did not answer in time.
            InvalidRequestError: The database refused the arguments.
        """
        statement = _statement(function, tuple(arguments))
        values = {name: _adapt(value) for name, value in arguments.items()}
        deadline = time.monotonic() + self._patience_seconds
        pause = 0.05
        while True:
            try:
                with self._connection(deadline) as connection:
                    return [row[0] for row in connection.execute(statement, values)]
            except (psycopg.OperationalError, PoolTimeout) as exc:
                if not _is_transient(exc) or time.monotonic() + pause > deadline:
                    raise LedgerUnavailable(
                        f"The ledger did not answer `{function}` in {self._patience_seconds:g} s ({exc}). "
                        "Is PostgreSQL up? `ow status` says so, `ow up` starts it."
                    ) from exc
            except psycopg.errors.UndefinedFunction as exc:
                raise ConflictError(
                    f"The ledger has no function `{function}`: its schema is older or newer than this "
                    "package. `ow db status` says which, `ow db migrate` brings it up to date."
                ) from exc
            except psycopg.DataError as exc:
                raise InvalidRequestError(f"The ledger refused the arguments of `{function}`: {exc}") from exc
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 2.0)

    def close(self) -> None:
        """Close all connections; silent when already closed."""
        self._pool.close()

    @contextmanager
    def _connection(self, deadline: float) -> Iterator[psycopg.Connection]:
        with self._pool.connection(timeout=max(0.1, deadline - time.monotonic())) as connection:
            yield connection

    def _configure(self, connection: psycopg.Connection) -> None:
        identify(connection, self._organization_id)


def identify(connection: psycopg.Connection, organization_id: str) -> None:
    """Give a connection the rights of one organization's caller, as PostgREST would."""
    claims = json.dumps({"role": "authenticated", "organization_id": organization_id})
    connection.execute(
        "select set_config('role', 'authenticated', false), set_config('request.jwt.claims', %s, false)",
        (claims,),
    )


def _statement(function: str, names: tuple[str, ...]) -> sql.Composed:
    arguments = sql.SQL(", ").join(
        sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in names
    )
    return sql.SQL("select * from public.{}({})").format(sql.Identifier(function), arguments)


def _adapt(value: Any) -> Any:
    """Objects, and lists of them, are jsonb; other lists are arrays."""
    is_json = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
    return Jsonb(value) if is_json else value


def _is_transient(exc: Exception) -> bool:
    state = getattr(exc, "sqlstate", None)
    return state is None or state.startswith(_CONNECTION_LOST)
