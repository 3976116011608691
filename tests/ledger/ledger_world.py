"""The real ledger of the state-machine tests: its callers in one organization, and what its tables hold."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.ledger.identity import Claims, hash_secret
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.protocol import Row
from tests.ledger.ledger_model import MOST_PODS, Call, Model

_FOLDER = Path(__file__).parent
_SNAPSHOT = (_FOLDER / "ledger_snapshot.sql").read_bytes()
_INVARIANTS = (_FOLDER / "ledger_invariants.sql").read_bytes()


class Site:
    """One ledger for all sequences: its callers share a few connections, and a superuser looks on."""

    def __init__(self, url: str) -> None:
        admin = url.replace("authenticator@", "postgres@")
        self._claims = threading.local()
        self._ledger = PostgresLedger(url, identity=self, connections=4)
        self._admin = psycopg.connect(admin, autocommit=True)
        self._gate = psycopg.connect(admin)

    def claims(self) -> Claims:
        """Those of the call that this thread makes."""
        claims: Claims = self._claims.current
        return claims

    def call(self, claims: Claims, function: str, **arguments: Any) -> list[Row]:
        self._claims.current = claims
        return self._ledger.call(function, **arguments)

    def let_leases_end(self, organization_id: str, pod: str) -> None:
        """As if a minute more than the lease of the pod had passed, and nothing were logged meanwhile."""
        self._admin.execute(
            "update ledger.runs set logged_at = null where organization_id = %s and worker_id = %s",
            [organization_id, pod],
        )
        self._admin.execute(
            "update ledger.worker set lease_expires_at = now() - interval '1 minute' "
            "where organization_id = %s and id = %s",
            [organization_id, pod],
        )

    def let_scripts_end(self, run: uuid.UUID) -> None:
        """As if a minute more than the lease of the script's run had passed."""
        self._admin.execute(
            "update ledger.runs set lease_expires_at = now() - interval '1 minute' where id = %s", [run]
        )

    def let_hints_age(self, organization_id: str) -> None:
        """As if nobody had been hinted for a minute."""
        self._admin.execute(
            "update ledger.runs set hinted_at = now() - interval '1 minute' where organization_id = %s",
            [organization_id],
        )

    def keep_hints_fresh(self, organization_id: str) -> None:
        """Whatever time the machine takes."""
        self._admin.execute(
            "update ledger.runs set hinted_at = now() + interval '1 hour' "
            "where organization_id = %s and hinted_at > now() - interval '30 seconds'",
            [organization_id],
        )

    def snapshot(self, organization_id: str) -> dict[str, Any]:
        [(shown,)] = self._admin.execute(_SNAPSHOT, {"org": organization_id})
        found: dict[str, Any] = shown
        return found

    def broken(self, organization_ids: list[str]) -> list[str]:
        """The names of the invariants that do not hold."""
        found = self._admin.execute(_INVARIANTS, {"orgs": organization_ids, "most": MOST_PODS})
        return [name for (name,) in found]

    def at_once(self, calls: list[Callable[[], str]], locked: str | None) -> list[str]:
        """Make calls at the same time, and return what they return.

        With the name of a table, nobody can write it or lock its rows before all have come as far as they
        get: what one has read by then the other has not changed yet.
        """
        futures: list[Future[str]] = []
        with ThreadPoolExecutor(len(calls)) as threads:
            with self._locked(locked):
                for call in calls:
                    futures.append(threads.submit(call))
                    if locked is not None:
                        self._await_standstill(futures)
            return [future.result() for future in futures]

    def close(self) -> None:
        self._ledger.close()
        self._admin.close()
        self._gate.close()

    @contextmanager
    def _locked(self, table: str | None) -> Iterator[None]:
        with self._gate.transaction():
            if table is not None:
                lock = sql.SQL("lock table ledger.{} in exclusive mode")
                self._gate.execute(lock.format(sql.Identifier(table)))
            yield

    def _await_standstill(self, futures: list[Future[str]]) -> None:
        """Return when each call has ended or waits for a lock; one that does neither is not waited for."""
        waiting = ("select count(*) from pg_stat_activity where datname = current_database() "
                   "and usename = 'authenticator' and wait_event_type = 'Lock'")  # fmt: skip
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            running = sum(not future.done() for future in futures)
            [(count,)] = self._admin.execute(waiting)
            if count >= running:
                return
            time.sleep(0.001)


class Focus(NamedTuple):
    """What calls at the same moment are mostly about; otherwise they would seldom meet."""

    pod: str | None = None
    run: uuid.UUID | None = None
    job: str | None = None
    file: str | None = None


class World:
    """One organization: its model, and the way to its real tables."""

    def __init__(self, site: Site, name: str) -> None:
        self.site = site
        self.model = Model()
        self.organization_id = str(uuid.uuid4())
        self.boots: dict[str, list[uuid.UUID]] = {}
        self.focus = Focus()
        self._numbers = itertools.count()
        self._name = name
        self._namespace = uuid.UUID(self.organization_id)
        self._person = str(uuid.uuid5(self._namespace, "person"))
        claims = {"role": "authenticated", "aud": "authenticated", "sub": self._person}
        site.call(claims, "create_organization", organization_id=self.organization_id, name=name)

    def __repr__(self) -> str:
        return self._name

    def number(self) -> int:
        return next(self._numbers)

    def new_id(self) -> uuid.UUID:
        """Unique on the whole server, as a random one would be."""
        return uuid.uuid5(self._namespace, str(self.number()))

    def token(self, pod: str) -> str:
        """The hash of the one-time token that the pod was given."""
        return hash_secret(f"owb/{self.organization_id}/{pod}")

    def secret(self, pod: str) -> str:
        """The hash of the session secret that the pod's agent made."""
        return hash_secret(f"owp/{self.organization_id}/{pod}")

    def make(self, call: Call) -> str:
        """Make the call at the real ledger; returns the word of the answer."""
        try:
            rows = self.site.call(self.claims(call.speaker), call.function, **call.arguments)
        except OpenWeightsError as exc:
            return f"{type(exc).__name__}: {exc}"
        return _word(call.function, rows)

    def claims(self, speaker: str) -> Claims:
        """Who speaks: a person and the control plane have the same account; a pod has its session."""
        if speaker == "service":
            return {"role": "service_role", "aud": "authenticated"}
        claims = {"aud": "authenticated", "organization_id": self.organization_id}
        if speaker in ("person", "control"):
            role = "authenticated" if speaker == "person" else "ow_worker"
            return {**claims, "role": role, "sub": self._person}
        return {**claims, "role": "ow_pod", "worker_id": speaker, "session": self.secret(speaker)}


def _word(function: str, rows: list[Row]) -> str:
    if function in ("renew_lease", "renew_script"):
        return "fenced" if rows[0]["fenced"] else "renewed"
    if function == "register_file":
        return "registered"
    if function in ("expire_leases", "expire_scripts"):
        return " ".join(sorted(row.get("worker_id") or row["job_id"] for row in rows))
    return str(rows[0]["outcome"])
