"""What the clients did: pods alive, money spent, rules broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openweights_prefect.simulator.bills import total
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.model import Phase, Pod
from openweights_prefect.simulator.store import State, Store

VIOLATIONS = {
    "foreign_mutation": "a change of somebody else's pod",
    "foreign_env_logged": "the environment of somebody else's pod in a file of the client",
    "same_name_create": "a name that was used in a create of the last ten minutes",
    "create_retry_after_ambiguous": "the same create again after an unclear answer, without a list first",
    "ssh_keys_replaced": "PUT of the account's ssh keys, which replaces those of everybody",
    "registry_deleted_foreign": "somebody else's registry credential deleted",
    "key_in_url": "an API key in an address, where logs keep it",
    "default_user_agent": "no User-Agent of the client's own",
    "get_storm": "one pod asked for more than once in five seconds; the list has them all",
    "ignored_retry_after": "a request before the time that a 429 named",
    "spot_field_used": "spot pods, which are withdrawn",
    "ttl_field_used": "stopAfter or terminateAfter, which do nothing",
}
"""The rules that a careful client keeps."""

_NAME_SECONDS = 600
_AMBIGUOUS_SECONDS = 60
_STORM_SECONDS = 5
_SLACK_SECONDS = 0.5
"""A request that was on its way when the 429 was sent."""
_MOST = 1000
_DEFAULT_AGENTS = ("python-httpx/", "python-requests/", "curl/", "aiohttp/")


class Watch:
    """Notes what a careful client never does; it stops nothing."""

    def __init__(self, *, state: State, store: Store, clock: Clock) -> None:
        self._state = state
        self._store = store
        self._clock = clock
        self._agents: set[str] = set()
        self._names: dict[str, float] = {}
        self._unclear: dict[str, tuple[str, float]] = {}
        self._asked: dict[str, float] = {}
        self._told_to_wait: dict[str, tuple[float, float]] = {}

    def request(self, operation: str, agent: str, account: str) -> None:
        """A request that was let in; a client should send a name of its own and keep to `Retry-After`."""
        self._state.requests[operation] = self._state.requests.get(operation, 0) + 1
        if (not agent or agent.startswith(_DEFAULT_AGENTS)) and agent not in self._agents:
            self._agents.add(agent)
            self.note("default_user_agent", agent)
        told, until = self._told_to_wait.get(account, (0.0, 0.0))
        if told + _SLACK_SECONDS < self._clock.now() < until - _SLACK_SECONDS:
            del self._told_to_wait[account]
            self.note("ignored_retry_after", operation)

    def refused(self, account: str, retry_after_seconds: float) -> None:
        """A 429 was sent."""
        now = self._clock.now()
        self._state.rate_limited += 1
        self._told_to_wait[account] = (now, now + retry_after_seconds)

    def create(self, account: str, body: object, name: str) -> None:
        """A create: its name should be new, and it no repetition of one whose outcome is unclear."""
        now = self._clock.now()
        self._names = {n: at for n, at in self._names.items() if now - at < _NAME_SECONDS}
        if name in self._names:
            self.note("same_name_create", name)
        self._names[name] = now
        before, at = self._unclear.get(account, ("", 0.0))
        if before == _canonical(body) and now - at < _AMBIGUOUS_SECONDS:
            self.note("create_retry_after_ambiguous", name)

    def unclear(self, account: str, body: object) -> None:
        """A create was not answered as it ended."""
        self._unclear[account] = (_canonical(body), self._clock.now())

    def listed(self, account: str) -> None:
        """The client has looked at what there is."""
        self._unclear.pop(account, None)

    def asked(self, pod_id: str) -> None:
        """A single pod was asked for."""
        now = self._clock.now()
        last = self._asked.get(pod_id)
        self._asked[pod_id] = now
        if last is not None and now - last < _STORM_SECONDS:
            self._asked[pod_id] = now + _NAME_SECONDS  # Noted once in a while, not at every request.
            self.note("get_storm", pod_id)

    def mutation(self, pod: Pod, operation: str) -> None:
        """Nobody should touch another one's pod."""
        if pod.owner == "foreign":
            self.note("foreign_mutation", f"{operation} {pod.id}")

    def scan(self, paths: list[str]) -> list[str]:
        """The files that hold a secret of a foreign pod; each is a violation."""
        secrets = [
            value.encode()
            for pod in self._state.pods.values()
            if pod.owner == "foreign"
            for value in pod.env.values()
            if value.startswith("SIM_CANARY")
        ]
        leaks = []
        for path in paths:
            for file in [Path(path)] if Path(path).is_file() else sorted(Path(path).rglob("*")):
                if file.is_file() and any(secret in file.read_bytes() for secret in secrets):
                    leaks.append(str(file))
                    self.note("foreign_env_logged", str(file))
        return leaks

    def note(self, kind: str, detail: str) -> None:
        """Put a violation on record."""
        assert kind in VIOLATIONS, kind
        if len(self._state.violations) < _MOST:
            at = round(self._clock.now(), 3)
            self._state.violations.append({"kind": kind, "detail": detail, "at": at})
            self._store.save(self._state)
        self._store.record("violation", kind=kind, detail=detail)


def report(state: State, store: Store, clock: Clock) -> dict[str, Any]:
    """The answer of `GET /_sim/report`; `alive` counts every pod that is not terminated, EXITED ones too."""
    now = clock.now()
    alive = [pod for pod in state.pods.values() if pod.phase is not Phase.TERMINATED]
    bills = store.bills(state)
    orphans = {pod_id: pod.orphan_seconds for pod_id, pod in store.finished.items()}
    orphans |= {pod.id: _orphan_seconds(pod, now) for pod in state.pods.values() if pod.owner == "client"}
    return {
        "created": state.created,
        "alive": [pod.id for pod in alive if pod.owner == "client"],
        "alive_by_owner": {
            owner: [pod.id for pod in alive if pod.owner == owner] for owner in ("client", "foreign")
        },
        "cost_total": round(float(store.spent(state, None, now)), 6),
        "cost_by_pod": {pod_id: round(float(total(bill, now)), 6) for pod_id, bill in bills.items()},
        "requests_by_op": dict(sorted(state.requests.items())),
        "rate_limited": state.rate_limited,
        "violations": state.violations,
        "orphan_seconds": round(sum(orphans.values()), 3),
        "orphans": {pod_id: round(seconds, 3) for pod_id, seconds in orphans.items() if seconds},
    }


def _orphan_seconds(pod: Pod, now: float) -> float:
    until = pod.billed_until or now
    if pod.duplicate:
        return until - pod.created_at
    return pod.orphan_seconds + (0.0 if pod.untold_since is None else max(0.0, until - pod.untold_since))


def _canonical(body: object) -> str:
    return json.dumps(body, sort_keys=True)
