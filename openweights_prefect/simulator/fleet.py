"""The life of the pods: from rental to the last process of theirs."""

from __future__ import annotations

import asyncio
import random
import shutil
import string
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Literal

from openweights_prefect.simulator.config import Image, Seconds, SimulatorConfig
from openweights_prefect.simulator.faults import Faults
from openweights_prefect.simulator.hosts import Host, price_per_hour
from openweights_prefect.simulator.images import command, environment, find_image
from openweights_prefect.simulator.logs import PodLogs, move_if_large
from openweights_prefect.simulator.model import Owner, Phase, Pod
from openweights_prefect.simulator.processes import (
    INSTANCE_VARIABLE,
    POD_VARIABLE,
    Container,
    start_container,
    sweep,
)
from openweights_prefect.simulator.store import State, Store, finish

KillMode = Literal["restart", "exited", "host_lost"]

_STEADY_SECONDS = 10.0
"""A container that ran this long is restarted without delay again."""
_LOG_CHECK_SECONDS = 5.0


@dataclass(frozen=True)
class Rental:
    """What a valid create request asks for."""

    name: str
    image: str
    gpu_id: str
    gpu_count: int
    cloud: str
    disk: int
    args: str = ""
    env: dict[str, str] = field(default_factory=dict, repr=False)
    min_cuda: str | None = None
    data_centers: list[str] = field(default_factory=list)


class Fleet:
    """All pods of all accounts, each with a task that lives its life."""

    def __init__(
        self, *, config: SimulatorConfig, store: Store, state: State, faults: Faults, seed: int
    ) -> None:
        self.state = state
        self.logs = PodLogs()
        self.closing = False
        self._config = config
        self._store = store
        self._faults = faults
        self._seed = seed
        self._timing = random.Random(f"{seed}:timing")
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._ends: set[asyncio.Task[None]] = set()
        self._containers: dict[str, Container] = {}
        self._warm: set[tuple[str, str]] = set()
        self._log_check: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Go on where the last process stopped, as machines do after a reboot."""
        for pod in [*self.state.pods.values()]:
            if pod.phase is Phase.TERMINATED:
                self._forget(pod)
            elif pod.phase is not Phase.STOPPED and pod.owner == "client":
                if pod.phase in (Phase.UP, Phase.BACKOFF):
                    pod.phase, pod.attempts = Phase.CREATING, pod.attempts + 1
                self._begin(pod)
        self._log_check = asyncio.create_task(self._limit_logs())
        self._save()

    async def close(self) -> None:
        """Stop all containers; the pods stay rented, and go on at the next `open`."""
        self.closing = True
        if self._log_check is not None:
            self._log_check.cancel()
        for task in [*self._lives.values(), *self._ends]:
            task.cancel()
        await asyncio.gather(*self._lives.values(), *self._ends, return_exceptions=True)
        grace = self._config.timings.stop_grace
        await asyncio.gather(*(container.stop(grace) for container in self._containers.values()))
        await asyncio.to_thread(sweep, {INSTANCE_VARIABLE: self.state.instance})
        self._save()

    def rent(self, account: str, rental: Rental, host: Host, *, owner: Owner = "client") -> Pod:
        """Commit a pod to a host and begin its life."""
        now = time.time()
        pod = Pod(
            id=self._new_id(),
            account=account,
            owner=owner,
            name=rental.name,
            image=rental.image,
            args=rental.args,
            env=rental.env,
            disk=rental.disk,
            gpu_id=rental.gpu_id,
            gpu_count=rental.gpu_count,
            cloud=rental.cloud,
            host=host.id,
            data_center=host.data_center,
            cuda=host.cuda,
            price=round(price_per_hour(rental.gpu_id, rental.cloud) * rental.gpu_count, 6),
            created_at=now,
            visible_at=now + self._draw(self._config.timings.visibility_delay),
        )
        self.state.pods[pod.id] = pod
        self._store.record("pod_created", pod=pod.id, name=pod.name, owner=owner, host=host.id)
        if owner == "client":
            self.state.created += 1
            self._begin(pod)
        self._save()
        return pod

    def find(self, account: str, pod_id: str) -> Pod | None:
        """A pod of an account, once it shows."""
        pod = self.state.pods.get(pod_id)
        return pod if pod and pod.account == account and pod.visible_at <= time.time() else None

    def listed(self, account: str) -> list[Pod]:
        """The pods of an account that show, oldest first."""
        now = time.time()
        return [pod for pod in self.state.pods.values() if pod.account == account and pod.visible_at <= now]

    def terminate(self, pod: Pod) -> None:
        """Stop the bill at once; the processes end soon after, then the pod is gone."""
        if pod.phase is Phase.TERMINATED:
            return
        pod.billed_until = pod.billed_until or time.time()
        self._enter(pod, Phase.TERMINATED)
        self._end(self._tear_down(pod))

    async def kill(self, pod: Pod, mode: KillMode) -> None:
        """Break a pod: its container restarts, it ends as EXITED, or it vanishes with its host."""
        self._store.record("pod_killed", pod=pod.id, mode=mode)
        container = self._containers.get(pod.id)
        if mode == "restart":
            if container:
                container.crash()
            return
        pod.billed_until = pod.billed_until or time.time()
        self._enter(pod, Phase.STOPPED if mode == "exited" else Phase.TERMINATED)
        if mode == "host_lost":
            self._forget(pod)
        await self._stop_life(pod, grace_seconds=0)

    def pids(self) -> dict[str, int]:
        """Process id of each running container, by pod."""
        return {pod_id: container.pid for pod_id, container in self._containers.items()}

    def _begin(self, pod: Pod) -> None:
        task = asyncio.create_task(self._live(pod), name=f"pod {pod.id}")
        self._lives[pod.id] = task
        task.add_done_callback(
            lambda done: self._lives.pop(pod.id, None) if self._lives.get(pod.id) is done else None
        )

    def _end(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _live(self, pod: Pod) -> None:
        timings = self._config.timings
        if pod.phase is Phase.ALLOCATING:
            await asyncio.sleep(self._draw(timings.allocate))
            self.logs.system(pod.id, f"create container {pod.image}")
            self._enter(pod, Phase.PULLING)
        image = find_image(pod.image, self._config.images)
        if pod.phase is Phase.PULLING:
            await self._pull(pod, found=image is not None)
        if image is None:
            pod.billed_until = time.time()
            self._enter(pod, Phase.STOPPED)
            return
        backoff, longest = timings.restart_backoff
        while True:
            self._enter(pod, Phase.CREATING)
            await asyncio.sleep(self._draw(timings.container_start))
            started = time.monotonic()
            await self._run_container(pod, image)
            self._enter(pod, Phase.BACKOFF)
            if time.monotonic() - started > _STEADY_SECONDS:
                backoff = timings.restart_backoff[0]
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, longest)
            pod.attempts += 1

    async def _pull(self, pod: Pod, *, found: bool) -> None:
        timings, place = self._config.timings, (pod.host, pod.image)
        repository, _, tag = pod.image.partition(":")
        self.logs.system(pod.id, f"{tag or 'latest'} Pulling from {repository}")
        await asyncio.sleep(self._draw(timings.pull_warm if place in self._warm else timings.pull_cold))
        if not found:
            self.logs.system(
                pod.id, f"manifest for {pod.image} not found: manifest unknown: manifest unknown"
            )
            await asyncio.sleep(self._draw(timings.pull_failure))
            return
        word = "Image is up to date" if place in self._warm else "Downloaded newer image"
        self.logs.system(pod.id, f"Status: {word} for {pod.image}")
        self._warm.add(place)

    async def _run_container(self, pod: Pod, image: Image) -> None:
        folder = self._store.pod_folder(pod.id)
        disk = folder / "disk"
        (disk / "tmp").mkdir(parents=True, exist_ok=True)
        self.logs.system(pod.id, f"start container for {pod.image}: begin")
        try:
            container = await start_container(
                command(image, pod.args),
                env={"HOME": str(disk), "TMPDIR": str(disk / "tmp"), **environment(image, pod)},
                folder=disk,
                log=folder / "container.log",
                instance=self.state.instance,
                pod_id=pod.id,
            )
        except (OSError, ValueError) as exc:
            self.logs.system(pod.id, f"error starting container: OCI runtime create failed: {exc}")
            return
        self._containers[pod.id] = container
        pod.container_started_at = time.time()
        self._enter(pod, Phase.UP)
        self._strike(pod)
        code = await container.wait()
        # Only here: a cancelled life leaves its container to whoever cancelled it.
        del self._containers[pod.id]
        self.logs.system(pod.id, f"container exited with code {code}")

    def _strike(self, pod: Pod) -> None:
        rule = self._faults.take("process", pod_facts(pod))
        if rule is not None:
            self._store.record("fault", fault=rule.name, rule=rule.id, pod=pod.id)
            self._end(self._lose_host(pod, float(rule.params.get("after_s", 0))))

    async def _lose_host(self, pod: Pod, after_seconds: float) -> None:
        await asyncio.sleep(after_seconds)
        if pod.id in self.state.pods and pod.phase is not Phase.TERMINATED:
            await self.kill(pod, "host_lost")

    async def _tear_down(self, pod: Pod) -> None:
        await self._stop_life(pod, grace_seconds=self._config.timings.stop_grace)
        await asyncio.sleep(self._config.timings.terminated_linger)
        self._forget(pod)

    async def _stop_life(self, pod: Pod, *, grace_seconds: float) -> None:
        life = self._lives.pop(pod.id, None)
        if life is not None:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
        container = self._containers.pop(pod.id, None)
        if container is not None:
            await (container.stop(grace_seconds) if grace_seconds else container.kill())
        elif life is not None:
            # Cancelled in the middle of a start, perhaps.
            await asyncio.to_thread(sweep, {INSTANCE_VARIABLE: self.state.instance, POD_VARIABLE: pod.id})

    def _forget(self, pod: Pod) -> None:
        finish(self.state, pod)
        self._store.record("pod_gone", pod=pod.id)
        self.logs.forget(pod.id)
        shutil.rmtree(self._store.pod_folder(pod.id) / "disk", ignore_errors=True)
        self._save()

    def _enter(self, pod: Pod, phase: Phase) -> None:
        if phase is not pod.phase is not Phase.TERMINATED:
            pod.phase = phase
            self._store.record("phase", pod=pod.id, phase=phase.value, attempt=pod.attempts)
            self._save()

    def _save(self) -> None:
        self._store.save(self.state)

    def _draw(self, bounds: Seconds) -> float:
        return self._timing.uniform(*bounds)

    def _new_id(self) -> str:
        self.state.ids += 1
        # The count goes in, so that a restarted simulator does not give an id twice.
        stream = random.Random(f"{self._seed}:ids:{self.state.ids}")
        return "".join(stream.choices(string.ascii_lowercase + string.digits, k=14))

    async def _limit_logs(self) -> None:
        limit_bytes = int(self._config.log_limit_mb * 1_000_000)
        while True:
            await asyncio.sleep(_LOG_CHECK_SECONDS)
            for pod_id in [*self._containers]:
                move_if_large(self._store.pod_folder(pod_id) / "container.log", limit_bytes)


def pod_facts(pod: Pod) -> dict[str, str]:
    """What a fault rule can be matched with."""
    return {
        "name": pod.name,
        "gpu": pod.gpu_id,
        "cloud": pod.cloud,
        "image": pod.image,
        "podId": pod.id,
        "host": pod.host,
        "dc": pod.data_center or "",
    }
