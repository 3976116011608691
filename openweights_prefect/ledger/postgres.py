"""The ledger over psycopg: embedded PostgreSQL, or any other."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool, PoolTimeout

from openweights_prefect.errors import (
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    LedgerUnavailable,
)
from openweights_prefect.ledger.protocol import Row

_CONNECTION_LOST = (
    "08",
    "57P",
    "53",
    "55P03",
    "40",
)  # gone, shutting down, out of resources, locks, serialization
_PROBE_SECONDS = 2

# Our error says what these warnings say; they reach stderr only where somebody set up logging.
logging.getLogger("psycopg.pool").addHandler(logging.NullHandler())


class PostgresLedger:
    """Calls SQL functions as `authenticated` for one organization; safe to share between threads."""

    def __init__(
        self, url: str, *, organization_id: str, patience_seconds: float = 30.0, connections: int = 4
    ) -> None:
        check_url(url)
        self._url = url
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

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        """Call a function and return its rows.

        Lost connections are retried until the patience runs out: functions are written so that a
        repeated call has no second effect. `patience_seconds` shortens it for this call.

        Raises:
            LedgerUnavailable: The database did not answer in time.
            InvalidRequestError: The database refused the arguments.
        """
        statement = _statement(function, tuple(arguments))
        values = {name: _adapt(value) for name, value in arguments.items()}
        own = self._patience_seconds
        patience = own if patience_seconds is None else min(own, patience_seconds)
        deadline = time.monotonic() + patience
        pause = 0.05
        while True:
            try:
                with self._connection(deadline) as connection:
                    return [row[0] for row in connection.execute(statement, values)]
            except (psycopg.OperationalError, PoolTimeout) as exc:
                if not _is_transient(exc) or time.monotonic() + pause > deadline:
                    raise LedgerUnavailable(
                        f"The ledger did not answer `{function}` in {patience:.3g} s ({self._cause(exc)}). "
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

    def _cause(self, exc: Exception) -> str:
        """Why there is no answer; the pool keeps the reason of a failed connection to itself."""
        reason = exc
        if isinstance(exc, PoolTimeout):
            try:
                psycopg.connect(self._url, connect_timeout=_PROBE_SECONDS).close()
            except psycopg.Error as failure:
                reason = failure
        return " ".join(str(reason).split())

    @contextmanager
    def _connection(self, deadline: float) -> Iterator[psycopg.Connection]:
        with self._pool.connection(timeout=max(0.1, deadline - time.monotonic())) as connection:
            yield connection

    def _configure(self, connection: psycopg.Connection) -> None:
        identify(connection, self._organization_id)


def check_url(url: str) -> None:
    """Raise `ConfigurationError` for what is no URL of a PostgreSQL database; it may hold a password."""
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        valid = False
    else:
        valid = url.startswith(("postgresql://", "postgres://"))
    if not valid:
        raise ConfigurationError(
            "The address of the ledger (`OW_DATABASE_URL`) is not a PostgreSQL URL. "
            "Write it like postgresql://user:password@host:5432/database."
        )


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
