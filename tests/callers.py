"""The ledger as its three kinds of callers use it, for tests that play them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

from openweights_prefect.ledger.identity import Claims, LocalIdentity, ServiceIdentity, granted, hash_secret
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID

CONTROL = [
    "control_snapshot",
    "record_flow_run",
    "adopt_flow_run",
    "hint_runs",
    "set_ceilings",
    "set_pending_reasons",
    "intend_pod",
    "record_pod",
    "lose_pod",
    "expire_leases",
    "end_pod",
    "mark_mirrored",
    "known_runs",
    "expire_scripts",
    "expire_events",
    "fail_job",
    "known_pods",
    "note_refusal",
    "clear_refusal",
    "publish_catalogue",
    "pod_of_proxy",
    "record_duplicate",
]
POD = ["reject_pod", "register_pod", "renew_lease", "open_run", "release_pod", "job_secrets", "abandon_run"]


def bootstrap_hash(worker_id: str) -> str:
    """The hash of the one-time token that tests give to a pod."""
    return hash_secret(f"owb_{worker_id}")


class FixedIdentity:
    """Claims as they are."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def claims(self) -> Claims:
        return self._claims


class Callers:
    """Calls each function as whoever calls it in production: a person, the control plane, or a pod.

    `open_as` gives the ledger for claims, over whatever transport; the exchange is always asked directly.
    """

    def __init__(
        self,
        url: str,
        organization_id: str = LOCAL_ORGANIZATION_ID,
        *,
        open_as: Callable[[Claims], Ledger] | None = None,
        connections: int = 4,
    ) -> None:
        def direct(claims: Claims) -> Ledger:
            return PostgresLedger(url, identity=FixedIdentity(claims), connections=connections)

        self.url = url
        self.organization_id = organization_id
        self.open_as = open_as or direct
        self.person = self.open_as(LocalIdentity(organization_id).claims())
        self.control = self.open_as(LocalIdentity(organization_id, "ow_worker").claims())
        self.service = PostgresLedger(url, identity=ServiceIdentity(), connections=1)
        self._pods: dict[str, Ledger] = {}
        self._boots: dict[str, str] = {}

    def pod(self, worker_id: str) -> Ledger:
        """The pod's own view; its one-time token is redeemed at first use."""
        if worker_id not in self._pods:
            session = hash_secret(f"owp_{worker_id}")
            self.service.call("redeem_bootstrap", hash=bootstrap_hash(worker_id), session_hash=session)
            claims = granted(self.service.call("exchange_token", hash=session)[0])
            self._pods[worker_id] = self.open_as(claims)
        return self._pods[worker_id]

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        if function == "register_pod":
            self._boots[str(arguments["as_boot"])] = arguments["for_worker"]
        caller = self._caller(function, arguments)
        return caller.call(function, patience_seconds=patience_seconds, **arguments)

    def _caller(self, function: str, arguments: dict[str, Any]) -> Ledger:
        boot: UUID | str | None = arguments.get("as_boot")
        holder = arguments.get("for_worker") or self._boots.get(str(boot))
        if function in CONTROL:
            return self.control
        if function in POD or (boot is not None and holder is not None):
            return self.pod(holder) if holder else self.control
        return self.person

    def close(self) -> None:
        for opened in (self.person, self.control, self.service, *self._pods.values()):
            opened.close()
