"""What the clients did: pods alive, money spent, rules broken."""

from __future__ import annotations

import time
from decimal import Decimal
from typing import Any

from openweights_prefect.simulator.model import Pod
from openweights_prefect.simulator.store import State, Store

_NAME_SECONDS = 600
_DEFAULT_AGENTS = ("python-httpx/", "python-requests/", "curl/", "aiohttp/")


class Watch:
    """Notes what a careful client never does; it stops nothing."""

    def __init__(self, *, state: State, store: Store) -> None:
        self._state = state
        self._store = store
        self._agents: set[str] = set()

    def user_agent(self, agent: str) -> None:
        """A client should send a name of its own."""
        if (not agent or agent.startswith(_DEFAULT_AGENTS)) and agent not in self._agents:
            self._agents.add(agent)
            self._note("default_user_agent", agent)

    def name(self, name: str) -> None:
        """A name should be used in one create only."""
        now = time.time()
        self._state.names = {n: at for n, at in self._state.names.items() if now - at < _NAME_SECONDS}
        if name in self._state.names:
            self._note("same_name_create", name)
        self._state.names[name] = now

    def mutation(self, pod: Pod, operation: str) -> None:
        """Nobody should touch another one's pod."""
        if pod.owner == "foreign":
            self._note("foreign_mutation", f"{operation} {pod.id}")

    def _note(self, kind: str, detail: str) -> None:
        self._state.violations.append({"kind": kind, "detail": detail, "at": round(time.time(), 3)})
        self._store.record("violation", kind=kind, detail=detail)
        self._store.save(self._state)


def spent(state: State, now: float) -> float:
    """USD that the clients' pods have cost."""
    alive = sum((pod.cost(now) for pod in state.pods.values() if pod.owner == "client"), Decimal(0))
    return float(alive + Decimal(str(state.finished_cost)))


def report(state: State) -> dict[str, Any]:
    """The answer of `GET /_sim/report`; `alive` counts every pod that is not terminated, EXITED ones too."""
    now = time.time()
    alive = [pod for pod in state.pods.values() if pod.status != "TERMINATED"]
    clients = [pod for pod in state.pods.values() if pod.owner == "client"]
    return {
        "created": state.created,
        "alive": [pod.id for pod in alive if pod.owner == "client"],
        "alive_by_owner": {
            owner: [pod.id for pod in alive if pod.owner == owner] for owner in ("client", "foreign")
        },
        "cost_total": round(spent(state, now), 6),
        "cost_by_pod": {**state.finished, **{pod.id: round(float(pod.cost(now)), 6) for pod in clients}},
        "violations": state.violations,
    }
