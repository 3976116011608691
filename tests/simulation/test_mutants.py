"""The simulation finds out a control plane or an agent that is broken in one place."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest

from openweights_prefect.pod.agent import Agent
from openweights_prefect.provisioning import placement
from openweights_prefect.provisioning.provider import Ambiguous
from openweights_prefect.worker.fleet import Fleet
from tests.simulation.chaos import Weather
from tests.simulation.world import World

SEEDS = 50


class NeverFences(Agent):
    """Goes on when it cannot renew its lease."""

    async def _watch(self) -> None:
        await asyncio.Event().wait()


class TrustsEveryList(Fleet):
    """What one list leaves out is gone."""

    async def _count_missing(self, pod: Any) -> None:
        await self._close(pod, "gone from RunPod")


class EndsWhatLooksLikeOurs(Fleet):
    """A name with the right beginning is enough."""

    async def _end_orphans(self, pods: Any, listed: Any) -> None:
        alive = {self._name(pod.id) for pod in pods}
        for each in listed:
            if each.name.startswith(self._name("pod-")) and each.name not in alive:
                await self._provider.terminate(each.id)


class LeavesDuplicates(Fleet):
    """The second pod of one create is nobody's."""

    async def _end_duplicate(self, pod: Any, extra: Any) -> None:
        return


class Retrying:
    """A provider whose create is asked again when the answer was unclear."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    async def create(self, request: Any) -> Any:
        try:
            return await self._provider.create(request)
        except Ambiguous:
            return await self._provider.create(request)


class Mutant(World):
    """A world with one thing broken."""

    retries = False

    def provider_of_worker(self) -> Any:
        return Retrying(self.provider) if self.retries else self.provider


def _blind(waiting: Any, pods: Sequence[placement.Pod], **rest: Any) -> placement.Plan:
    """Buys as if nothing were on its way."""
    return placement.place(waiting, [pod for pod in pods if pod.status != "starting"], **rest)


MUTANTS: dict[str, tuple[dict[str, Any], list[str], Any]] = {
    "retries a create": ({"retries": True}, ["create: unclear, made"], nullcontext()),
    "never fences itself": ({"agent_class": NeverFences}, ["pod: cut off"], nullcontext()),
    "trusts every list": (
        {"fleet_class": TrustsEveryList},
        ["list: truncated", "list: empty"],
        nullcontext(),
    ),
    "ends what looks like ours": ({"fleet_class": EndsWhatLooksLikeOurs}, ["list: failed"], nullcontext()),
    "leaves duplicates": ({"fleet_class": LeavesDuplicates}, ["create: two made"], nullcontext()),
    "ignores starting pods": (
        {},
        ["list: failed"],
        mock.patch("openweights_prefect.worker.observer.place", _blind),
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_part_is_found_out(name: str) -> None:
    """With one thing broken some seed of a few fails."""
    changes, kinds, broken = MUTANTS[name]
    mutant = type("Broken", (Mutant,), changes)
    context: AbstractContextManager[Any] = broken
    with context:
        for seed in range(SEEDS):
            world = mutant(seed, weather=Weather(kinds, 30.0), hours=0.5, workers=1)
            try:
                world.run()
            except AssertionError:
                return
    pytest.fail(f"{SEEDS} seeds see nothing wrong with a part that {name}")
