"""What goes wrong in a simulation, and when: everything is drawn from the seed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.world import World

CREATE_FAULTS = ["unclear, made", "unclear, nothing made", "unclear, two made", "two made", "rate limited"]
LIST_FAULTS = ["failed", "truncated", "empty"]
DELETE_FAULTS = ["failed", "failed after it was done", "ignored"]
BOOT_FAULTS = ["never allocated", "pull stuck", "slow pull", "driver too old", "error"]
POD_FAULTS = ["exited", "vanished", "failed", "preempted", "container restarted", "frozen", "cut off"]
PLANE_FAULTS = [
    "ledger away",
    "ledger clock jumps",
    "Prefect away",
    "provider away",
    "key revoked",
    "no funds",
    "no stock",
    "worker killed",
    "worker paused",
    "answers lost",
    "pods hidden",
    "pool paused",
]
PEOPLE = ["cancel", "restart", "shut down", "extend", "cancel in Prefect", "delete in Prefect"]


@dataclass
class Weather:
    """Which faults there are in this seed, and how often."""

    kinds: list[str] = field(default_factory=list)
    mean_seconds: float = 60.0

    @classmethod
    def draw(cls, random: Random) -> Weather:
        """From calm to a storm."""
        every = [
            *(f"create: {f}" for f in CREATE_FAULTS),
            *(f"list: {f}" for f in LIST_FAULTS),
            *(f"delete: {f}" for f in DELETE_FAULTS),
            *(f"boot: {f}" for f in BOOT_FAULTS),
            *(f"pod: {f}" for f in POD_FAULTS),
            *PLANE_FAULTS,
            *PEOPLE,
        ]
        count = random.choice([3, 8, 16, len(every)])
        return cls(random.sample(every, count), random.choice([20.0, 60.0, 180.0]))


async def storm(world: World) -> None:
    """Let things go wrong until it is to be calm."""
    random = world.random
    while world.loop.time() < world.calm_at:
        await asyncio.sleep(random.expovariate(1 / world.weather.mean_seconds))
        if world.loop.time() < world.calm_at:
            strike(world, random.choice(world.weather.kinds))


def strike(world: World, kind: str) -> None:
    """One fault of this kind."""
    random, faults = world.random, world.provider.faults
    family, _, name = kind.partition(": ")
    match family:
        case "create":
            faults.creates.append(name)
        case "list":
            faults.lists += [name] * random.choice([1, 1, 2, 3])
        case "delete":
            faults.deletes += [name] * random.choice([1, 1, 2, 4])
        case "boot":
            faults.boots.append(name)
        case "pod":
            _strike_pod(world, name)
        case _:
            world.watch.note(f"FAULT {kind}")
            _strike_plane(world, kind)


def _strike_pod(world: World, kind: str) -> None:
    random = world.random
    pods = [pod for pod in world.provider.existing() if pod.up]
    if not pods:
        return
    pod = random.choice(pods)
    world.watch.note(f"FAULT {kind} {pod.id} of {pod.request.name}")
    match kind:
        case "exited" | "vanished" | "failed":
            world.provider.die(pod, kind)
        case "preempted":
            world.preempt(pod)
        case "container restarted":
            world.provider.crash_container(pod)
        case "frozen":
            world.freeze(pod, random.choice([5.0, 40.0, 150.0, 400.0]))
        case "cut off":
            world.cut(pod, random.choice([10.0, 60.0, 100.0, 200.0, 600.0]))


def _strike_plane(world: World, kind: str) -> None:  # noqa: C901 - a table
    random = world.random
    world.watch.reached(kind)
    match kind:
        case "ledger away":
            world.for_a_while("ledger_down", random.choice([3.0, 25.0, 70.0, 150.0]))
        case "answers lost":
            world.for_a_while("losing_answers", random.choice([5.0, 60.0]))
        case "Prefect away":
            world.prefect_away(random.choice([5.0, 60.0]))
        case "pool paused":
            world.pause_pool(random.choice([30.0, 300.0]))
        case "provider away":
            world.fault_for("down", random.choice([5.0, 45.0, 120.0]))
        case "key revoked":
            world.fault_for("revoked", random.choice([20.0, 90.0]))
        case "no funds":
            world.fault_for("no_funds", random.choice([60.0, 300.0]))
        case "no stock":
            world.no_stock(random.choice([30.0, 120.0, 600.0]))
        case "pods hidden":
            world.hide_pods(random.choice([5.0, 30.0, 60.0]), random.choice([60.0, 300.0]))
        case "ledger clock jumps":
            world.jump()
        case "worker killed":
            world.kill_worker()
        case "worker paused":
            world.pause_worker(random.choice([3.0, 30.0, 90.0]))
        case _:
            world.people.act(kind)
