"""What happens to pods, as events of Prefect: in its feed, and for automations to match."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import NAMESPACE_URL, uuid5

from prefect.client.orchestration import PrefectClient
from prefect.events import Event, RelatedResource, Resource

logger = logging.getLogger(__name__)

PREFIX = "openweights.pod"
_SHOWN = ("runpod_id", "hardware", "offer", "price_per_hour", "job", "reason")
"""Details that an event may carry; a pod's environment and its tokens are never among them."""

_MOST_WAITING = 200
_LONGEST = 500
_CLOSE_SECONDS = 5.0


class _Note(NamedTuple):
    """An event that is still to be sent."""

    kind: str
    worker_id: str
    shown: dict[str, str]
    at: datetime


class PodEvents:
    """Emits in the background, in order. A Prefect that is slow or down costs events, never anything else."""

    def __init__(self, client: PrefectClient, *, work_pool: str, organization_id: str) -> None:
        self._client = client
        self._work_pool = work_pool
        self._organization_id = organization_id
        self._work_pool_id = ""
        self._waiting: asyncio.Queue[_Note] = asyncio.Queue(_MOST_WAITING)
        self._sending: asyncio.Task[None] | None = None
        self._warned = False

    def emit(self, kind: str, worker_id: str, details: Mapping[str, str]) -> None:
        """Note that a pod is `created`, `adopted`, `active`, `lost`, `ended`...; returns at once.

        Called from the event loop; raises nothing.
        """
        try:
            shown = {name: str(details[name])[:_LONGEST] for name in _SHOWN if details.get(name)}
            self._waiting.put_nowait(_Note(kind, worker_id, shown, datetime.now(UTC)))
        except asyncio.QueueFull as exc:
            self._warn(exc)
            return
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send())

    async def close(self) -> None:
        """Give what waits a moment to be sent."""
        if self._sending is not None and not self._sending.done():
            await asyncio.wait([self._sending], timeout=_CLOSE_SECONDS)
            self._sending.cancel()

    def _event(self, note: _Note) -> Event:
        shown = note.shown
        related = [_related("work-pool", f"prefect.work-pool.{self._work_pool_id}", self._work_pool)]
        if job := shown.get("job"):
            related.append(_related("job", f"openweights.job.{job}", job))
        return Event(
            occurred=note.at,
            event=f"{PREFIX}.{note.kind}",
            resource=Resource(
                {
                    "prefect.resource.id": f"{PREFIX}.{note.worker_id}",
                    "prefect.resource.name": note.worker_id,
                    "openweights.organization": self._organization_id,
                    **{f"openweights.{name}": value for name, value in shown.items()},
                }
            ),
            related=related,
            payload=shown,
            # Two workers that saw the same thing tell it once.
            id=uuid5(NAMESPACE_URL, f"{PREFIX}.{note.worker_id}/{note.kind}"),
        )

    async def _send(self) -> None:
        while not self._waiting.empty():
            notes = [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]
            try:
                if not self._work_pool_id:
                    self._work_pool_id = str((await self._client.read_work_pool(self._work_pool)).id)
                content = [self._event(note).model_dump(mode="json") for note in notes]
                answer = await self._client._client.post("/events", json=content)
                answer.raise_for_status()
                self._warned = False
            except Exception as exc:
                # The edge of a side show: say so once, and let the events go.
                self._warn(exc)

    def _warn(self, exc: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Events of pods do not reach Prefect: %s", type(exc).__name__)


def _related(role: str, resource_id: str, name: str) -> RelatedResource:
    return RelatedResource(
        {"prefect.resource.id": resource_id, "prefect.resource.role": role, "prefect.resource.name": name}
    )
