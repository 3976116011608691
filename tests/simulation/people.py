"""People of a simulation: they submit jobs, and change their minds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from tests.simulation.model_ledger import Speaker
from tests.simulation.model_provider import MISSING_IMAGE
from tests.simulation.model_rows import Row

if TYPE_CHECKING:
    from tests.simulation.world import World

IMAGES = ["openweights/a:1", "openweights/b:1"]
CLASSES: list[dict[str, Any]] = [
    {"requires_vram_gb": 16},
    {"requires_vram_gb": 16, "docker_image": IMAGES[1]},
    {"requires_vram_gb": 70},
    {"allowed_hardware": ["2x A100"]},
    {"requires_vram_gb": 40, "cloud": "SECURE", "max_price_per_hour": 3.0},
    {"requires_vram_gb": 16, "min_cuda": "12.9"},
    {"requires_vram_gb": 16, "docker_image": MISSING_IMAGE},
    {"requires_vram_gb": 5000},
    {"requires_vram_gb": 70, "max_price_per_hour": 0.05},
]
IMPOSSIBLE = (7, 8)


@dataclass(frozen=True)
class Plan:
    """What an attempt does when it runs."""

    seconds: float
    result: str = "completed"
    why: str | None = None
    stops_after: float | None = 1.0
    """After SIGTERM; None: never."""
    talks: bool = True
    """It logs: a sign of life."""
    agent_breaks: bool = False


class People:
    """The users of the organization."""

    def __init__(self, world: World, random: Random) -> None:
        self._world = world
        self._random = random
        self.plans: dict[str, list[Plan]] = {}
        self.kinds: dict[str, int] = {}
        self._users = [f"user-{n}" for n in range(random.randint(1, 4))]

    async def submit_jobs(self, count: int, within_seconds: float) -> None:
        """In bursts, and some of them again."""
        random = self._random
        classes = random.sample(range(IMPOSSIBLE[0]), random.randint(1, 4))
        impossible = random.random() < 0.4
        while len(self.plans) < count:
            await asyncio.sleep(random.expovariate(count / within_seconds / 3))
            for _ in range(random.choice([1, 1, 1, 4, 8])):
                self._submit(random.choice(classes))
            if impossible and random.random() < 0.05:
                self._submit(random.choice(IMPOSSIBLE))

    def act(self, kind: str) -> None:
        """Something that somebody does by hand."""
        random, ledger = self._random, self._world.ledger
        user = Speaker("person", random.choice(self._users))
        if kind in ("cancel", "restart") and self.plans:
            job = random.choice(list(self.plans))
            function = "cancel_job" if kind == "cancel" else "restart_job"
            ledger.call(user, function, {"job_id": job})
        elif kind in ("shut down", "extend") and ledger.alive:
            pod = random.choice(list(ledger.alive))
            if kind == "shut down":
                ledger.call(user, "request_shutdown", {"for_worker": pod})
            else:
                seconds = random.choice([600.0, 3600.0])
                ledger.call(user, "extend_pod", {"for_worker": pod, "deadline_seconds": seconds})
        elif kind in ("cancel in Prefect", "delete in Prefect"):
            self._act_in_prefect(kind)

    def plan_of(self, job_id: str, attempt: int) -> Plan:
        """The same for the same attempt, whoever asks."""
        plans = self.plans[job_id]
        return plans[(attempt - 1) % len(plans)]

    def submit(self, name: str) -> None:
        """A job of the first class, as it is."""
        job: Row = {
            "id": name,
            "type": "custom_job",
            "entrypoint": "python train.py",
            "docker_image": IMAGES[0],
            "params": {"validated_params": {}},
            **CLASSES[0],
        }
        self._world.ledger.call(Speaker("person", "user-0"), "submit_job", {"job": job})

    def _act_in_prefect(self, kind: str) -> None:
        flow_runs = self._world.flow_runs
        open_runs = [run for run in flow_runs.flow_runs.values() if run.state in ("scheduled", "pending")]
        if not open_runs:
            return
        flow_run = self._random.choice(open_runs)
        if kind == "cancel in Prefect":
            flow_run.state = "canceled"
        else:
            del flow_runs.flow_runs[flow_run.id]

    def _submit(self, number: int) -> None:
        random, world = self._random, self._world
        user = Speaker("person", random.choice(self._users))
        name = f"job-{len(self.plans):03d}"
        if self.plans and random.random() < 0.1:
            name = random.choice(list(self.plans))  # somebody submits the same again
            number = self.kinds[name]
        job: Row = {
            "id": name,
            "type": "custom_job",
            "entrypoint": "python train.py",
            "docker_image": IMAGES[0],
            "params": {"validated_params": {}},
            "model": random.choice([None, "m1", "m2"]),
            "priority": random.choice([0, 0, 0, 1, 5]),
            "retries": random.choice([0, 0, 1, 2]),
        }
        if name not in self.plans:
            self.plans[name] = [self._plan() for _ in range(3)]
            self.kinds[name] = number
        world.ledger.call(user, "submit_job", {"job": {**job, **CLASSES[number]}})

    def _plan(self) -> Plan:
        random = self._random
        seconds = random.choice([2.0, 30.0, 120.0, 600.0, 1500.0]) * random.uniform(0.5, 1.5)
        drawn = random.random()
        if drawn < 0.15:
            return Plan(seconds / 4, "failed", "its own fault")
        if drawn < 0.18:
            return Plan(seconds / 4, agent_breaks=True)
        stops = random.choice([0.2, 2.0, None])
        return Plan(seconds, stops_after=stops, talks=random.random() < 0.8)
