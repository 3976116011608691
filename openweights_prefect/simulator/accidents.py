"""The faults that strike a container: at its start, or while it runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Container
from typing import TYPE_CHECKING

from openweights_prefect.simulator import shims
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.faults import Faults, Rule
from openweights_prefect.simulator.model import ENDED, Phase, Pod, pod_facts
from openweights_prefect.simulator.store import Store

if TYPE_CHECKING:  # The fleet has accidents, and they befall the fleet.
    from openweights_prefect.simulator.fleet import Fleet

_AT_START = ("zero_gpu", "missing_gpu", "ecc_errors", "network_cut", "host_unreachable", "disk_full")
_WHILE_UP = ("pod_death", "host_lost", "preempt", "maintenance", "freeze")
_NO_SPACE = "OSError: [Errno 28] No space left on device\n"


class Accidents:
    """Lets the rules strike the pods."""

    def __init__(self, *, fleet: Fleet, faults: Faults, store: Store, clock: Clock) -> None:
        self._fleet = fleet
        self._faults = faults
        self._store = store
        self._clock = clock
        self._strikes: dict[str, Callable[[Pod, Rule], Awaitable[None]]] = {
            "zero_gpu": self._lose_gpus,
            "missing_gpu": self._lose_gpus,
            "ecc_errors": self._spoil_memory,
            "network_cut": self._ail,
            "host_unreachable": self._ail,
            "runtime_null": self._ail,
            "runtime_stale": self._stop_telemetry,
            "disk_full": self._fill_disk,
            "pod_death": self._die,
            "host_lost": self._lose_host,
            "preempt": self._preempt,
            "maintenance": self._maintain,
            "freeze": self._freeze,
        }

    def before_container(self, pod: Pod, *, new: Container[str] | None = None) -> None:
        """What a container finds when it starts; without a delay it is there before the first process."""
        facts = pod_facts(pod)
        self._strike(pod, self._faults.take("process", facts, among=_AT_START, new=new))
        self._strike(pod, self._faults.take("projection", facts, new=new))

    def container_up(self, pod: Pod, *, new: Container[str] | None = None) -> None:
        """What befalls a container that runs."""
        self._strike(pod, self._faults.take("process", pod_facts(pod), among=_WHILE_UP, new=new))

    def offer(self, new: Container[str]) -> None:
        """Let the rules with these ids, just added, strike the pods that run already, the oldest first."""
        for pod in [*self._fleet.state.pods.values()]:
            if pod.owner == "client" and pod.phase is Phase.UP:
                self.before_container(pod, new=new)
                self.container_up(pod, new=new)

    def _strike(self, pod: Pod, rule: Rule | None) -> None:
        if rule is None:
            return
        after = self._delay(rule)
        self._store.record("fault", fault=rule.name, rule=rule.id, pod=pod.id, after=round(after, 3))
        # A network is taken away at the start only: chaos may not delay it.
        if after <= 0 or rule.name == "network_cut":
            immediate = self._strikes[rule.name](pod, rule)
            if rule.name not in _WHILE_UP:
                _run_at_once(immediate)
                return
            self._fleet.spawn(immediate)
        else:
            self._fleet.spawn(self._strike_later(pod, rule, after))

    def _delay(self, rule: Rule) -> float:
        after = rule.params.get("after_s", 0)
        if isinstance(after, list | tuple):
            return self._faults.random.uniform(float(after[0]), float(after[1]))
        return float(after)

    async def _strike_later(self, pod: Pod, rule: Rule, after_seconds: float) -> None:
        await self._clock.sleep(after_seconds)
        if pod.id in self._fleet.state.pods and pod.phase not in ENDED:
            await self._strikes[rule.name](pod, rule)

    async def _lose_gpus(self, pod: Pod, rule: Rule) -> None:
        pod.gpus_missing = pod.gpu_count if rule.name == "zero_gpu" else int(rule.number("missing", 1))
        self._tell_gpus(pod)

    async def _spoil_memory(self, pod: Pod, rule: Rule) -> None:
        pod.ecc_errors = int(rule.number("errors", 7))
        self._tell_gpus(pod)

    def _tell_gpus(self, pod: Pod) -> None:
        programs = self._store.pod_folder(pod.id) / "bin"
        if programs.exists():
            shims.write_gpus(programs, pod)

    async def _ail(self, pod: Pod, rule: Rule) -> None:
        seconds = rule.params.get("seconds")
        pod.ailments[rule.name] = None if seconds is None else self._clock.now() + float(seconds)

    async def _stop_telemetry(self, pod: Pod, rule: Rule) -> None:
        await self._ail(pod, rule)
        pod.ailments["runtime_stale_since"] = self._clock.now() + 1

    async def _fill_disk(self, pod: Pod, rule: Rule) -> None:
        await self._ail(pod, rule)
        pod.file_bytes = int(rule.number("megabytes", 1) * 1_000_000)
        log = self._store.pod_folder(pod.id) / "container.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(_NO_SPACE)
        if container := self._fleet.container(pod):
            container.limit_files(pod.file_bytes)

    async def _die(self, pod: Pod, rule: Rule) -> None:
        await self._fleet.kill(pod, "exited" if rule.params.get("mode") == "exited" else "restart")

    async def _lose_host(self, pod: Pod, rule: Rule) -> None:
        await self._fleet.kill(pod, "host_lost")

    async def _preempt(self, pod: Pod, rule: Rule) -> None:
        container = self._fleet.container(pod)
        if container is not None:
            container.send_group(signal.SIGTERM)
            await self._clock.sleep(rule.number("grace_s", self._fleet.preempt_grace))
        if pod.id in self._fleet.state.pods and pod.phase not in ENDED:
            await self._fleet.kill(pod, "host_lost" if rule.params.get("then") == "vanish" else "exited")

    async def _freeze(self, pod: Pod, rule: Rule) -> None:
        await self._fleet.freeze(pod, rule.number("seconds", 60))

    async def _maintain(self, pod: Pod, rule: Rule) -> None:
        seconds = rule.number("seconds", 60)
        same = [p for p in self._fleet.state.pods.values() if p.host == pod.host and p.holds_gpus]
        for each in same:
            self._fleet.pause_bill(each)
        await asyncio.gather(*(self._fleet.freeze(each, seconds) for each in same))
        for each in same:
            if each.id in self._fleet.state.pods and each.phase not in ENDED:
                self._fleet.resume_bill(each)


def _run_at_once(work: Awaitable[None]) -> None:
    """Run what never waits for anything, without giving another task its turn."""
    steps = work.__await__()
    for _ in steps:
        raise AssertionError("this accident waits")
