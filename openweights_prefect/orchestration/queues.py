"""The work queues of the pool: which one a job belongs to, what one means, and who may not start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import WorkQueue
from prefect.exceptions import ObjectAlreadyExists

HIGH, DEFAULT, LOW = "high", "default", "low"
QUEUE_PRIORITY = 10
"""What a job without a priority gains in a queue before `default`, and loses in one behind it."""


class PoolState(NamedTuple):
    """What somebody set in Prefect; the worker respects it."""

    paused: bool
    paused_queues: frozenset[str]
    concurrency_limit: int | None
    """Most flow runs of the pool at once."""

    def reason(self, queue: str | None) -> str | None:
        """Why a flow run of this queue may not start, or None."""
        if self.paused:
            return "the work pool is paused"
        if queue in self.paused_queues:
            return f"the work queue {queue!r} is paused"
        return None


def queue_of(priority: int) -> str:
    """The queue that shows a job's priority."""
    if priority == 0:
        return DEFAULT
    return HIGH if priority > 0 else LOW


def priority_in(queue: str | None, queues: Sequence[WorkQueue]) -> int:
    """What it means to be in a queue: its place before or behind `default`, whatever it is called."""
    places = {each.name: each.priority for each in queues}
    if queue not in places or DEFAULT not in places:
        return 0
    if places[queue] == places[DEFAULT]:
        return 0
    return QUEUE_PRIORITY if places[queue] < places[DEFAULT] else -QUEUE_PRIORITY


async def ensure_queues(client: PrefectClient, pool: str) -> None:
    """Create `high` before `default` and `low` behind it, where missing; those that exist stay."""
    queues = {each.name: each for each in await client.read_work_queues(work_pool_name=pool)}
    first = queues[DEFAULT].priority if DEFAULT in queues else 1
    # Prefect makes room: the new queue takes the place, and those from there on move back by one.
    if HIGH not in queues:
        await _create(client, pool, HIGH, first, "Jobs with a priority above 0.")
        first += 1
    if LOW not in queues:
        await _create(client, pool, LOW, first + 1, "Jobs with a priority below 0.")


async def pool_state(client: PrefectClient, pool: str) -> PoolState:
    """As it is in Prefect now."""
    held = await client.read_work_pool(pool)
    queues = await client.read_work_queues(work_pool_name=pool)
    paused = frozenset(each.name for each in queues if each.is_paused)
    return PoolState(held.is_paused, paused, held.concurrency_limit)


async def _create(client: PrefectClient, pool: str, name: str, priority: int, description: str) -> None:
    try:
        await client.create_work_queue(
            name=name, description=description, priority=priority, work_pool_name=pool
        )
    except ObjectAlreadyExists:  # Another worker was quicker.
        return
