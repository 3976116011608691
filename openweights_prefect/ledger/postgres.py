"""The ledger over psycopg: embedded PostgreSQL, or any other."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from typing import Any

import psycopg
from psycopg import sql
from psycopg.abc import RV, PQGen
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool, PoolTimeout

from openweights_prefect.errors import (
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    LedgerUnavailable,
    PermissionDeniedError,
)
from openweights_prefect.ledger.identity import (
    Claims,
    Identity,
    LocalIdentity,
    ServiceIdentity,
    TokenIdentity,
    granted,
)
from openweights_prefect.ledger.notifications import JobListener
from openweights_prefect.ledger.protocol import Row

_CONNECTION_LOST = (
    "08",
    "57P",
    "53",
    "55P03",
    "40",
)  # gone, shutting down, out of resources, locks, serialization
_CONNECT_SECONDS = 10
_PROBE_SECONDS = 2
_GRACE_SECONDS = 1.0  # For the server to say itself that time is over; one that is frozen says nothing.
_IDENTIFY = sql.SQL(
    "select set_config('role', %(ow_role)s, true), set_config('request.jwt.claims', %(ow_claims)s, true), "
    "set_config('statement_timeout', %(ow_timeout)s, true); "
)

# Our error says what these warnings say; they reach stderr only where somebody set up logging.
logging.getLogger("psycopg.pool").addHandler(logging.NullHandler())


class PostgresLedger:
    """Calls SQL functions with the rights of one identity; safe to share between threads.

    Does what PostgREST does: each call is a transaction of its own that begins by taking the role and the
    claims of its caller, so a connection keeps nothing of anybody, and poolers may share it.
    """

    def __init__(
        self, url: str, *, identity: Identity, patience_seconds: float = 30.0, connections: int = 4
    ) -> None:
        check_url(url)
        self._url = url
        self._identity = identity
        self._patience_seconds = patience_seconds
        self._listener = JobListener(url)
        self._pool = ConnectionPool(
            url,
            min_size=0,
            max_size=connections,
            open=True,
            check=None,
            connection_class=_Connection,
            kwargs={"autocommit": True, "connect_timeout": _CONNECT_SECONDS},
            timeout=patience_seconds,
            reconnect_timeout=patience_seconds,
            name="ledger",
        )

    @property
    def organization_id(self) -> str:
        """The organization that the identity acts for."""
        return str(self._identity.claims()["organization_id"])

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        """Call a function and return its rows.

        Lost connections are retried until the patience runs out: functions are written so that a
        repeated call has no second effect. `patience_seconds` shortens it for this call.

        Raises:
            LedgerUnavailable: The database did not answer in time.
            AuthenticationError: The identity speaks for no organization (any more).
            PermissionDeniedError: It may not do this.
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
                claims = self._identity.claims()
                with self._pool.connection(timeout=max(0.1, deadline - time.monotonic())) as connection:
                    return _call(connection, claims, statement, values, deadline)
            except psycopg.errors.InvalidAuthorizationSpecification as exc:
                raise AuthenticationError(f"`{function}` was refused: {_reason(exc)}.") from exc
            except (psycopg.OperationalError, PoolTimeout) as exc:
                if not _is_transient(exc) or time.monotonic() + pause > deadline:
                    raise LedgerUnavailable(
                        f"The ledger did not answer `{function}` in {patience:.3g} s ({self._cause(exc)}). "
                        "Is PostgreSQL up? `ow status` says so, `ow up` starts it."
                    ) from exc
            except psycopg.errors.InsufficientPrivilege as exc:
                raise PermissionDeniedError(f"`{function}` was refused: {_reason(exc)}.") from exc
            except psycopg.errors.UndefinedFunction as exc:
                raise ConflictError(
                    f"The ledger has no function `{function}`: its schema is older or newer than this "
                    "package. `ow db status` says which, `ow db migrate` brings it up to date."
                ) from exc
            except (psycopg.DataError, psycopg.IntegrityError) as exc:
                raise InvalidRequestError(
                    f"The ledger refused the arguments of `{function}`: {_reason(exc)}."
                ) from exc
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 2.0)

    def wait_for_change(self, job_id: str, seconds: float) -> None:
        """Sleep, less long when the job has ended meanwhile; a hint only."""
        self._listener.sleep(job_id, seconds)

    def close(self) -> None:
        """Close all connections; silent when already closed."""
        self._pool.close()
        self._listener.close()

    def _cause(self, exc: Exception) -> str:
        """Why there is no answer; the pool keeps the reason of a failed connection to itself."""
        reason = exc
        if isinstance(exc, PoolTimeout):
            try:
                psycopg.connect(self._url, connect_timeout=_PROBE_SECONDS).close()
            except psycopg.Error as failure:
                reason = failure
        return " ".join(str(reason).split())


class _Connection(psycopg.Connection[Any]):
    """Waits for the server until its deadline: one that is frozen, or cut off, never ends a connection."""

    deadline = math.inf

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        return super().wait(self._until_deadline(gen), interval)

    def _until_deadline(self, gen: PQGen[RV]) -> PQGen[RV]:
        """The same exchange with the server; `wait` comes back to it at least every `interval`."""
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if time.monotonic() > self.deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError("the server was silent")
                wanted = gen.send(ready)
        except StopIteration as end:
            answer: RV = end.value
            return answer


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


def local_ledger(url: str, organization_id: str, *, patience_seconds: float = 30.0) -> PostgresLedger:
    """The ledger as the local person sees it: whoever may open the database."""
    return PostgresLedger(url, identity=LocalIdentity(organization_id), patience_seconds=patience_seconds)


def token_identity(url: str, token: str) -> TokenIdentity:
    """The identity of an API token or of a pod's session, exchanged in the database itself."""

    def exchange(token_hash: str) -> Claims:
        service = PostgresLedger(url, identity=ServiceIdentity(), connections=1)
        try:
            return granted(service.call("exchange_token", hash=token_hash, source="local")[0])
        finally:
            service.close()

    return TokenIdentity(token, exchange)


def _call(
    connection: _Connection,
    claims: Claims,
    statement: sql.Composed,
    values: dict[str, Any],
    deadline: float,
) -> list[Row]:
    """Both statements are one request, which PostgreSQL runs as one transaction until the deadline.

    libpq's escaping puts the values in: a request of several statements takes no parameters.
    """
    connection.deadline = deadline + _GRACE_SECONDS
    timeout_ms = max(1, round((deadline - time.monotonic()) * 1000))
    caller = {"ow_role": claims["role"], "ow_claims": json.dumps(dict(claims)), "ow_timeout": str(timeout_ms)}
    cursor = psycopg.ClientCursor(connection).execute(_IDENTIFY + statement, {**values, **caller})
    cursor.nextset()
    return [row[0] for row in cursor]


def _statement(function: str, names: tuple[str, ...]) -> sql.Composed:
    arguments = sql.SQL(", ").join(
        sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in names
    )
    return sql.SQL("select * from public.{}({})").format(sql.Identifier(function), arguments)


def _adapt(value: Any) -> Any:
    """Objects, and lists of them, are jsonb; other lists are arrays."""
    is_json = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict) for v in value))
    return Jsonb(value) if is_json else value


def _reason(exc: psycopg.Error) -> str:
    """PostgreSQL's own sentence, without the lines that show where in a function it arose."""
    return exc.diag.message_primary or " ".join(str(exc).split())


def _is_transient(exc: Exception) -> bool:
    state = getattr(exc, "sqlstate", None)
    return state is None or state.startswith(_CONNECTION_LOST)
