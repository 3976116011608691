"""What the simulator must still know after it was killed: its state, the bills, and the journal."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from openweights_prefect.simulator.bills import Charge, total
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.model import Pod

_FORMAT = 2


@dataclass
class FinishedPod:
    """What stays of a pod that is gone."""

    account: str
    bill: list[Charge]
    orphan_seconds: float


@dataclass
class State:
    """Everything that is kept."""

    instance: str = ""
    """Mark of the simulator process that wrote this, and of its pods' processes."""
    ids: int = 0
    """Pod ids given so far."""
    created: int = 0
    """Pods that clients have created."""
    seeded: bool = False
    """The foreign pods have been put in once."""
    pods: dict[str, Pod] = field(default_factory=dict)
    violations: list[dict[str, Any]] = field(default_factory=list)
    credits: dict[str, str] = field(default_factory=dict)
    """USD ever paid in, of accounts whose balance was set."""
    spend_limits: dict[str, float] = field(default_factory=dict)
    """USD an hour, of accounts whose limit was set."""
    revoked: list[str] = field(default_factory=list)
    """Keys that are no longer valid."""
    requests: dict[str, int] = field(default_factory=dict)
    """How many requests there were of each operation."""
    rate_limited: int = 0
    format: int = _FORMAT


class Store:
    """The state folder: readable by its owner alone, since pods' environments hold tokens."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.folder = folder
        self.finished: dict[str, FinishedPod] = {}
        """Pods of clients that are gone."""
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._clock = clock
        self._state_file = folder / "state.json"
        self._bills_file = folder / "bills.jsonl"
        self._journal = folder / "journal.jsonl"

    def load(self) -> State:
        """The state that was saved last, or an empty one; one of another version is empty too."""
        try:
            document = json.loads(self._state_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State()
        if document.get("format") != _FORMAT:
            return State()
        if self._bills_file.exists():
            for line in self._bills_file.read_text(encoding="utf-8").splitlines():
                self._load_bill(line)
        document["pods"] = {pod["id"]: Pod.from_json(pod) for pod in document["pods"]}
        return State(**document)

    def save(self, state: State) -> None:
        """Replace the state file as a whole; a reader sees the old one or the new one."""
        document = {**vars(state), "pods": [pod.to_json() for pod in state.pods.values()]}
        temporary = self._state_file.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(document), encoding="utf-8")
        temporary.replace(self._state_file)

    def finish(self, state: State, pod: Pod) -> None:
        """Move a pod that is gone from the pods to the bills."""
        state.pods.pop(pod.id, None)
        if pod.owner != "client" or pod.id in self.finished:
            return
        self.finished[pod.id] = FinishedPod(pod.account, pod.bill, pod.orphan_seconds)
        bill = [vars(charge) for charge in pod.bill]
        line = {"pod": pod.id, "account": pod.account, "bill": bill, "orphan_seconds": pod.orphan_seconds}
        with self._bills_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def bills(self, state: State, account: str | None = None) -> dict[str, list[Charge]]:
        """The charges of every pod that clients ever had, of one account or of all."""
        gone = {id_: pod.bill for id_, pod in self.finished.items() if account in (None, pod.account)}
        here = {
            pod.id: pod.bill
            for pod in state.pods.values()
            if pod.owner == "client" and account in (None, pod.account)
        }
        return {**gone, **here}

    def spent(self, state: State, account: str | None, now: float) -> Decimal:
        """USD that clients' pods have cost."""
        bills = self.bills(state, account)
        return sum((total(charges, now) for charges in bills.values()), Decimal(0))

    def record(self, event: str, **facts: object) -> None:
        """Append to the journal; environments never go in here."""
        line = json.dumps({"at": round(self._clock.now(), 3), "event": event, **facts})
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")

    def journal(self, after: int) -> list[dict[str, Any]]:
        """The lines of the journal from number `after` on, with their numbers from 1."""
        if not self._journal.exists():
            return []
        lines = self._journal.read_text(encoding="utf-8").splitlines()
        return [{"seq": n, **json.loads(line)} for n, line in enumerate(lines, start=1) if n > after]

    def control_token(self, configured: str) -> str:
        """The token of `/_sim`, made at the first start and kept in the file `control_token`."""
        file = self.folder / "control_token"
        if not configured and file.exists():
            return file.read_text(encoding="utf-8").strip()
        token = configured or secrets.token_urlsafe(24)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as output:
            output.write(token)
        return token

    def pod_folder(self, pod_id: str) -> Path:
        """Where the container's log and disk are."""
        return self.folder / "pods" / pod_id

    def _load_bill(self, line: str) -> None:
        document = json.loads(line)
        charges = [Charge(**charge) for charge in document["bill"]]
        self.finished[document["pod"]] = FinishedPod(document["account"], charges, document["orphan_seconds"])
