"""All pods of all accounts: renting them, ending them, breaking them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import string
from collections.abc import Awaitable
from typing import Literal

from openweights_prefect.simulator.accidents import Accidents
from openweights_prefect.simulator.bills import close
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.faults import Faults
from openweights_prefect.simulator.hosts import Host, price_per_hour
from openweights_prefect.simulator.life import Life, Moments
from openweights_prefect.simulator.logs import PodLogs, move_if_large
from openweights_prefect.simulator.model import ENDED, Owner, Phase, Pod, Rental, pod_facts
from openweights_prefect.simulator.ports import Ports
from openweights_prefect.simulator.processes import Container, Sweeper, sweep
from openweights_prefect.simulator.store import State, Store

KillMode = Literal["restart", "exited", "host_lost"]

_LOG_CHECK_SECONDS = 5.0


class Fleet:
    """All pods, each with a task that leads its life."""

    def __init__(
        self, *, config: SimulatorConfig, clock: Clock, store: Store, state: State, faults: Faults, seed: int
    ) -> None:
        self.state = state
        self.logs = PodLogs(clock, store.pod_folder)
        self.ports = Ports(clock)
        self.closing = False
        self.preempt_grace = config.timings.preempt_grace
        self.accidents = Accidents(fleet=self, faults=faults, store=store, clock=clock)
        self._config = config
        self._clock = clock
        self._store = store
        self._faults = faults
        self._seed = seed
        self._sweeper = Sweeper(state.instance)
        moments = Moments(self._enter, self.accidents.before_container, self.accidents.container_up)
        self._life = Life(
            config=config,
            clock=clock,
            store=store,
            logs=self.logs,
            faults=faults,
            sweeper=self._sweeper,
            ports=self.ports,
            seed=seed,
            moments=moments,
        )
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._ends: set[asyncio.Future[None]] = set()
        self._saving: asyncio.Handle | None = None

    async def open(self, base_url: str) -> None:
        """Go on where the last process stopped, as machines do after a reboot."""
        self._life.base_url = base_url
        for pod in [*self.state.pods.values()]:
            if pod.phase is Phase.TERMINATED:
                self._forget(pod)
            elif pod.phase not in ENDED and pod.owner == "client":
                if pod.phase in (Phase.UP, Phase.BACKOFF):
                    pod.phase, pod.attempts = Phase.CREATING, pod.attempts + 1
                self._begin(pod)
        self.spawn(self._limit_logs())
        self.save()

    async def close(self) -> None:
        """Stop all containers; the pods stay rented, and go on at the next `open`."""
        self.closing = True
        tasks = [*self._lives.values(), *self._ends]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        grace = self._config.timings.stop_grace
        await asyncio.gather(*(container.stop(grace) for container in self._life.containers.values()))
        await asyncio.to_thread(sweep, self.state.instance)
        self.save()

    def rent(self, account: str, rental: Rental, host: Host, *, owner: Owner = "client") -> Pod:
        """Commit a pod to a host and begin its life."""
        now = self._clock.now()
        pod = Pod(
            id=self._new_id(),
            number=self.state.ids,
            account=account,
            owner=owner,
            name=rental.name,
            image=rental.image,
            args=rental.args,
            env=rental.env,
            disk=rental.disk,
            ports=rental.ports,
            registry=rental.registry,
            gpu_id=rental.gpu_id,
            gpu_count=rental.gpu_count,
            vcpu=host.vcpu_per_gpu * rental.gpu_count,
            ram_gb=host.ram_gb_per_gpu * rental.gpu_count,
            cloud=rental.cloud,
            host=host.id,
            data_center=host.data_center,
            cuda=host.cuda,
            price=round(price_per_hour(rental.gpu_id, rental.cloud) * rental.gpu_count, 6),
            created_at=now,
            visible_at=now,
            untold_since=now,
        )
        self.state.pods[pod.id] = pod
        self._store.record("pod_created", pod=pod.id, name=pod.name, owner=owner, host=host.id)
        if owner == "client":
            self.state.created += 1
            pod.visible_at = now + self._visibility_delay(pod)
            if self._config.bill_from == "rental":
                self._life.open_bill(pod)
            self._begin(pod)
        self.save()
        return pod

    def find(self, account: str, pod_id: str) -> Pod | None:
        """A pod of an account, once it shows."""
        pod = self.state.pods.get(pod_id)
        shows = pod is not None and pod.account == account and pod.visible_at <= self._clock.now()
        return self._tell(pod) if shows and pod else None

    def listed(self, account: str) -> list[Pod]:
        """The pods of an account that show, oldest first."""
        now = self._clock.now()
        return [pod for pod in self.state.pods.values() if pod.account == account and pod.visible_at <= now]

    def told(self, pod: Pod) -> None:
        """Its owner has read of this pod in an answer."""
        self._tell(pod)

    def terminate(self, pod: Pod) -> None:
        """Stop the bill at once; the processes end soon after, then the pod is gone."""
        if pod.phase is Phase.TERMINATED:
            return
        self._life.close_bill(pod)
        self._enter(pod, Phase.TERMINATED)
        self.save()
        self.spawn(self._tear_down(pod))

    async def stop(self, pod: Pod) -> None:
        """EXITED: its cards go back, its host stays."""
        self._life.close_bill(pod)
        self._enter(pod, Phase.STOPPED)
        await self._stop_life(pod, grace_seconds=self._config.timings.stop_grace)

    async def restart(self, pod: Pod) -> None:
        """Its container again, on an empty disk and with new public ports; also what starts a stopped pod."""
        await self._stop_life(pod, grace_seconds=self._config.timings.stop_grace)
        shutil.rmtree(self._store.pod_folder(pod.id) / "disk", ignore_errors=True)
        if pod.phase in ENDED:
            self._life.open_bill(pod)
        pod.attempts += 1
        self._enter(pod, Phase.CREATING)
        self._begin(pod)

    async def kill(self, pod: Pod, mode: KillMode) -> None:
        """Break a pod: its container restarts, it ends as EXITED, or it vanishes with its host."""
        self._store.record("pod_killed", pod=pod.id, mode=mode)
        container = self.container(pod)
        if mode == "restart":
            if container:
                container.crash()
            return
        self._life.close_bill(pod)
        self.logs.system(pod.id, "Exited by Runpod")
        self._enter(pod, Phase.STOPPED if mode == "exited" else Phase.TERMINATED)
        if mode == "host_lost":
            self._forget(pod)
        await self._stop_life(pod, grace_seconds=0)

    async def freeze(self, pod: Pod, seconds: float) -> None:
        """Let its processes stand still for a while."""
        container = self.container(pod)
        if container is None:
            return
        container.freeze()
        try:
            await self._clock.sleep(seconds)
        finally:
            container.thaw()

    def pause_bill(self, pod: Pod) -> None:
        """Nothing is charged while a host is down."""
        close(pod.bill, self._clock.now())

    def resume_bill(self, pod: Pod) -> None:
        """The host is back."""
        self._life.open_bill(pod)

    def container(self, pod: Pod) -> Container | None:
        """Its running container."""
        return self._life.containers.get(pod.id)

    def pids(self) -> dict[str, int]:
        """Process id of each running container, by pod."""
        return {pod_id: container.pid for pod_id, container in self._life.containers.items()}

    def spawn(self, work: Awaitable[None]) -> None:
        """Let something go on beside the requests, until the simulator ends."""
        task = asyncio.ensure_future(work)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    def save(self) -> None:
        """Write the state down before this returns."""
        if self._saving is not None:
            self._saving.cancel()
            self._saving = None
        self._store.save(self.state)

    def _begin(self, pod: Pod) -> None:
        task = asyncio.create_task(self._life.lead(pod), name=f"pod {pod.id}")
        self._lives[pod.id] = task
        task.add_done_callback(
            lambda done: self._lives.pop(pod.id, None) if self._lives.get(pod.id) is done else None
        )

    def _visibility_delay(self, pod: Pod) -> float:
        rule = self._faults.take("read", pod_facts(pod), among=("visibility",))
        if rule is not None:
            self._store.record("fault", fault=rule.name, rule=rule.id, pod=pod.id)
            return rule.number("seconds", 5)
        stream = random.Random(f"{self._seed}:visibility:{pod.number}")
        return stream.uniform(*self._config.timings.visibility_delay)

    def _tell(self, pod: Pod) -> Pod:
        if pod.untold_since is not None and pod.owner == "client":
            pod.orphan_seconds += self._clock.now() - pod.untold_since
        pod.untold_since = None
        return pod

    async def _tear_down(self, pod: Pod) -> None:
        await self._stop_life(pod, grace_seconds=self._config.timings.stop_grace)
        await self._clock.sleep(self._config.timings.terminated_linger)
        self._forget(pod)

    async def _stop_life(self, pod: Pod, *, grace_seconds: float) -> None:
        self.ports.close(pod.id)
        life = self._lives.pop(pod.id, None)
        if life is not None:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
        container = self._life.containers.pop(pod.id, None)
        with self._clock.working():
            if container is not None:
                container.thaw()
                await (container.stop(grace_seconds) if grace_seconds else container.kill())
            elif life is not None:
                # Cancelled in the middle of a start, perhaps.
                await self._sweeper.sweep(pod.id)

    def _forget(self, pod: Pod) -> None:
        now = self._clock.now()
        if pod.untold_since is not None:
            pod.orphan_seconds += (pod.billed_until or now) - pod.untold_since
        elif pod.duplicate:
            pod.orphan_seconds = (pod.billed_until or now) - pod.created_at
        self._store.finish(self.state, pod)
        self._store.record("pod_gone", pod=pod.id)
        self.logs.forget(pod.id)
        folder = self._store.pod_folder(pod.id)
        for name in ("disk", "bin"):
            shutil.rmtree(folder / name, ignore_errors=True)
        self.save()

    def _enter(self, pod: Pod, phase: Phase) -> None:
        if phase is not pod.phase is not Phase.TERMINATED:
            pod.phase = phase
            self._store.record("phase", pod=pod.id, phase=phase.value, attempt=pod.attempts)
            if self._saving is None:
                # Fifty pods that come up together are written down once.
                self._saving = asyncio.get_running_loop().call_soon(self.save)

    def _new_id(self) -> str:
        self.state.ids += 1
        # The count goes in, so that a restarted simulator does not give an id twice.
        stream = random.Random(f"{self._seed}:ids:{self.state.ids}")
        return "".join(stream.choices(string.ascii_lowercase + string.digits, k=14))

    async def _limit_logs(self) -> None:
        limit_bytes = int(self._config.log_limit_mb * 1_000_000)
        while True:
            await asyncio.sleep(_LOG_CHECK_SECONDS)
            for pod_id in [*self._life.containers]:
                with contextlib.suppress(OSError):
                    move_if_large(self._store.pod_folder(pod_id) / "container.log", limit_bytes)
