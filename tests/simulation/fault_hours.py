"""Many pods under faults that must cost nothing: false kills, and how soon a death is noticed."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.simulation.chaos import Weather
from tests.simulation.model_provider import SimPod
from tests.simulation.people import Plan
from tests.simulation.world import World

APART_SECONDS = 180.0
DEATH_KINDS = ("exited", "vanished")
_SLOWER = [
    ("worker.observer", "_PASS_SECONDS", 15.0),
    ("worker.observer", "_AGREE_SECONDS", 60.0),
    ("pod.agent", "_WATCH_SECONDS", 5.0),
]


@dataclass
class Measured:
    """What a stretch of pod-hours showed."""

    pod_hours: float = 0.0
    false_kills: int = 0
    deaths: int = 0
    noticed_seconds: list[float] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)
    """Of the false kills."""

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        told = {key: value for key, value in asdict(self).items() if key != "noticed_seconds"}
        seconds = sorted(self.noticed_seconds)
        if seconds:
            told |= {
                "noticed_median_s": statistics.median(seconds),
                "noticed_max_s": seconds[-1],
                "noticed_p95_s": seconds[int(0.95 * (len(seconds) - 1))],
            }
        return told


class FaultHours(World):
    """Busy pods that live for days, one worker, and a world that is never quite well."""

    slower = _SLOWER
    leaks = 0.0

    def __init__(self, seed: int, *, pods: int, hours: float) -> None:
        super().__init__(
            seed,
            weather=Weather([], 60.0),
            hours=hours,
            jobs=pods,
            workers=1,
            max_workers=pods + 4,
            lease_seconds=120,
            heartbeat_seconds=5.0,
            pod_ttl_hours=720.0,
            pod_idle_seconds=10_000_000,
            boot_seconds=1500,
        )
        self.measured = Measured()
        self.ledger.budget = None
        self._wanted = pods
        self._killed: set[str] = set()
        self._struck_at: dict[str, float] = {}
        for host in self.provider.hosts:
            host.bad_gpu = host.cuda_error = False

    def plan_of(self, job_id: str, attempt: int) -> Plan:
        return Plan(seconds=1e7, talks=False)

    async def _live(self) -> None:
        self.start_worker(0)
        for number in range(self._wanted):
            self.people.plans[f"job-{number}"] = [Plan(1e7)]
            self.people.submit(f"job-{number}")
        await asyncio.sleep(1200)
        storm = self.loop.create_task(self._harmless_storm())
        deaths = self.loop.create_task(self._deaths())
        end = self.loop.time() + 3600 * self.hours
        while self.loop.time() < end:
            await asyncio.sleep(60)
            running = [pod for pod in self.provider.existing() if pod.up]
            self.measured.pod_hours += len(running) / 60
            self._look_for_false_kills()
        storm.cancel()
        deaths.cancel()
        self.measured.faults = {
            name: count for name, count in self.watch.counts.items() if "announced" not in name
        }

    def _look_for_false_kills(self) -> None:
        for row in self.ledger.pods.values():
            ended = row.status in ("lost", "terminated") and row.active_at is not None
            if ended and row.id not in self._killed:
                self._killed.add(row.id)
                self.measured.false_kills += 1
                self.measured.why.append(f"{row.id}: {row.reason}")

    async def _harmless_storm(self) -> None:
        random = self.random
        while True:
            await asyncio.sleep(random.expovariate(1 / 20.0))
            pods = [pod for pod in self.provider.existing() if pod.up and self._may_strike(pod.id)]
            if not pods:
                continue
            kind = random.choice(
                ["freeze", "freeze", "cut", "cut", "answers", "ledger", "list", "pause", "provider"]
            )
            match kind:
                case "freeze":
                    self.freeze(self._struck(random.choice(pods)), random.uniform(1, 60))
                case "cut":
                    self.cut(self._struck(random.choice(pods)), random.uniform(1, 60))
                case "answers":
                    self.watch.reached("answers lost")
                    self.for_a_while("losing_answers", random.uniform(1, 60))
                case "ledger" if self._may_strike("ledger"):
                    self._struck_at["ledger"] = self.loop.time()
                    self.watch.reached("ledger away")
                    self.for_a_while("ledger_down", random.uniform(1, 30))
                case "list":
                    fault = random.choice(["failed", "truncated", "empty"])
                    self.provider.faults.lists += [fault] * random.randint(1, 4)
                case "pause":
                    self.watch.reached("worker paused")
                    self.pause_worker(random.uniform(1, 60))
                case _:
                    self.fault_for("down", random.uniform(1, 30))

    def _may_strike(self, what: str) -> bool:
        """Two faults in a row may make a silence that no lease bears."""
        return self.loop.time() - self._struck_at.get(what, float("-inf")) > APART_SECONDS

    def _struck(self, pod: SimPod) -> SimPod:
        self._struck_at[pod.id] = self.loop.time()
        return pod

    async def _deaths(self) -> None:
        """A pod dies now and then; its place is taken by another."""
        random = self.random
        while True:
            await asyncio.sleep(random.expovariate(1 / 600.0))
            pods = [
                pod for pod in self.provider.existing() if pod.up and self._row(pod) in ("active", "busy")
            ]
            if pods:
                pod = random.choice(pods)
                self._killed.add(pod.request.env["OW_POD_ID"])
                self.measured.deaths += 1
                self.provider.die(pod, random.choice(DEATH_KINDS))
                self.spawn(self._notice(pod))

    async def _notice(self, pod: SimPod) -> None:
        died = self.loop.time()
        while self._row(pod) not in ("lost", "terminated"):
            await asyncio.sleep(0.5)
        self.measured.noticed_seconds.append(self.loop.time() - died)

    def _row(self, pod: SimPod) -> str:
        return self.ledger.pods[pod.request.env["OW_POD_ID"]].status


def measure(seed: int, *, pods: int, hours: float) -> Measured:
    """Run one stretch."""
    world = FaultHours(seed, pods=pods, hours=hours)
    world.run()
    return world.measured
