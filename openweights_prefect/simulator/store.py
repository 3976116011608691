"""What the simulator must still know after it was killed: `state.json` and `journal.jsonl`."""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from openweights_prefect.simulator.model import Pod

_FINISHED_KEPT = 500


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
    finished: dict[str, float] = field(default_factory=dict)
    """Cost of the latest pods that are gone."""
    finished_cost: float = 0.0
    """Cost of all client pods that are gone."""
    violations: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, float] = field(default_factory=dict)
    """When each name was last used in a create."""


class Store:
    """The state folder: readable by its owner alone, since pods' environments hold tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._state_file = folder / "state.json"
        self._journal = folder / "journal.jsonl"

    def load(self) -> State:
        """The state that was saved last, or an empty one."""
        try:
            document = json.loads(self._state_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State()
        document["pods"] = {pod["id"]: Pod.from_json(pod) for pod in document["pods"]}
        return State(**document)

    def save(self, state: State) -> None:
        """Replace the state file as a whole; a reader sees the old one or the new one."""
        document = {**vars(state), "pods": [pod.to_json() for pod in state.pods.values()]}
        temporary = self._state_file.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(document), encoding="utf-8")
        temporary.replace(self._state_file)

    def record(self, event: str, **facts: object) -> None:
        """Append to the journal; environments never go in here."""
        line = json.dumps({"at": round(time.time(), 3), "event": event, **facts})
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(line + "\n")

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


def finish(state: State, pod: Pod) -> None:
    """Move a pod that is gone from the pods to the ledger."""
    state.pods.pop(pod.id, None)
    cost = float(pod.cost(pod.billed_until or pod.created_at))
    if pod.owner == "client":
        state.finished_cost = float(Decimal(str(state.finished_cost)) + Decimal(str(cost)))
        state.finished[pod.id] = cost
    for oldest in list(state.finished)[:-_FINISHED_KEPT]:
        del state.finished[oldest]
