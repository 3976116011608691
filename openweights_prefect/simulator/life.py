"""The way of a pod: machine, pull, container, and the container again when it has exited."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from openweights_prefect.simulator import shims
from openweights_prefect.simulator.bills import DISK_PER_GB_HOUR, Charge, close
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.config import Image, Seconds, SimulatorConfig
from openweights_prefect.simulator.faults import Faults, Rule
from openweights_prefect.simulator.hosts import version
from openweights_prefect.simulator.images import command, environment, find_image
from openweights_prefect.simulator.logs import PodLogs
from openweights_prefect.simulator.model import Phase, Pod, pod_facts
from openweights_prefect.simulator.ports import Ports
from openweights_prefect.simulator.processes import Container, Limits, Sweeper, start_container
from openweights_prefect.simulator.store import Store

_STEADY_SECONDS = 10.0
"""A container that ran this long is restarted without delay again."""
_CUDA_LINE_SECONDS = 15.0
_PULL_LINE_SECONDS = 30.0
_LAYERS = 3
_PULL_FAULTS = ("slow_pull", "pull_stuck", "pull_auth", "pull_missing")


@dataclass(frozen=True)
class Moments:
    """Who is told of the moments of a life."""

    entered: Callable[[Pod, Phase], None]
    before_container: Callable[[Pod], None]
    container_up: Callable[[Pod], None]


class Life:
    """Leads pods along their way; stopping them is the fleet's."""

    def __init__(
        self,
        *,
        config: SimulatorConfig,
        clock: Clock,
        store: Store,
        logs: PodLogs,
        faults: Faults,
        sweeper: Sweeper,
        ports: Ports,
        seed: int,
        moments: Moments,
    ) -> None:
        self.containers: dict[str, Container] = {}
        self.base_url = ""
        self._config = config
        self._clock = clock
        self._store = store
        self._logs = logs
        self._faults = faults
        self._sweeper = sweeper
        self._ports = ports
        self._seed = seed
        self._moments = moments
        self._warm: set[tuple[str, str]] = set()

    async def lead(self, pod: Pod) -> None:
        """Go on from the pod's phase, until it is cancelled or the pod ends as EXITED or ERROR."""
        # A stream for each pod: what one of them draws does not depend on how the others fare.
        draw = random.Random(f"{self._seed}:timing:{pod.number}:{pod.attempts}")
        if pod.phase is Phase.ALLOCATING and not await self._allocate(pod, draw):
            return
        image = find_image(pod.image, self._config.images)
        if pod.phase is Phase.PULLING and not await self._pull(pod, image, draw):
            self._end(pod, Phase.STOPPED)
            return
        if image is None:
            self._end(pod, Phase.STOPPED)
            return
        await self._ports.open(pod)
        await self._repeat(pod, image, draw)

    def open_bill(self, pod: Pod) -> None:
        """Begin to charge the cards, and the disk if disks are billed."""
        now = self._clock.now()
        close(pod.bill, now)
        pod.billed_until = None
        pod.bill.append(Charge("gpu", str(pod.price), now))
        if self._config.bill_disks:
            pod.bill.append(Charge("disk", str(DISK_PER_GB_HOUR * pod.disk), now))

    def close_bill(self, pod: Pod) -> None:
        """Charge nothing any more."""
        close(pod.bill, self._clock.now())
        pod.billed_until = pod.billed_until or self._clock.now()

    async def _allocate(self, pod: Pod, draw: random.Random) -> bool:
        if self._fault(pod, "alloc_stall"):
            await _for_ever()
        await self._clock.sleep(_drawn(draw, self._config.timings.allocate))
        if self._fault(pod, "error_state"):
            self._end(pod, Phase.ERRORED)
            return False
        self._logs.system(pod.id, f"create container {pod.image}")
        self._moments.entered(pod, Phase.PULLING)
        return True

    async def _pull(self, pod: Pod, image: Image | None, draw: random.Random) -> bool:
        timings, place = self._config.timings, (pod.host, pod.image)
        fault = self._fault(pod, *_PULL_FAULTS)
        refusal = _pull_refusal(pod, image, fault)
        repository, _, tag = pod.image.partition(":")
        self._logs.system(pod.id, f"{tag or 'latest'} Pulling from {repository}")
        warm = place in self._warm
        if not warm and refusal is None:
            self._say_layers(pod, "Pulling fs layer", "Downloading")
        if fault is not None and fault.name == "pull_stuck":
            await _for_ever()
        seconds = _drawn(draw, timings.pull_warm if warm else timings.pull_cold)
        if fault is not None and fault.name == "slow_pull":
            seconds = fault.number("seconds", 60)
        await self._clock.sleep(seconds)
        if refusal is not None:
            await self._fail_pull(pod, refusal, _drawn(draw, timings.pull_failure))
            return False
        if not warm:
            self._say_layers(pod, "Extracting", "Pull complete")
        self._logs.system(pod.id, f"Digest: sha256:{hashlib.sha256(pod.image.encode()).hexdigest()}")
        word = "Image is up to date" if warm else "Downloaded newer image"
        self._logs.system(pod.id, f"Status: {word} for {pod.image}")
        self._warm.add(place)
        return True

    async def _fail_pull(self, pod: Pod, refusal: str, seconds: float) -> None:
        self._logs.system(pod.id, refusal)
        while self._config.pull_failure == "stuck":
            await self._clock.sleep(_PULL_LINE_SECONDS)
            self._logs.system(pod.id, refusal)
        await self._clock.sleep(seconds)

    async def _repeat(self, pod: Pod, image: Image, draw: random.Random) -> None:
        timings = self._config.timings
        backoff, longest = timings.restart_backoff
        while True:
            self._moments.entered(pod, Phase.CREATING)
            await self._clock.sleep(_drawn(draw, timings.container_start))
            await self._check_driver(pod, image)
            started = self._clock.now()
            await self._run(pod, image)
            self._moments.entered(pod, Phase.BACKOFF)
            if self._clock.now() - started > _STEADY_SECONDS:
                backoff = timings.restart_backoff[0]
            await self._clock.sleep(backoff)
            backoff = min(2 * backoff, longest)
            pod.attempts += 1
            if self._config.wipe_on_autorestart:
                shutil.rmtree(self._store.pod_folder(pod.id) / "disk", ignore_errors=True)

    async def _check_driver(self, pod: Pod, image: Image) -> None:
        fault = self._fault(pod, "cuda_mismatch")
        needed = image.cuda or "99.0"
        if fault is None and (not image.cuda or version(image.cuda) <= version(pod.cuda)):
            return
        self._moments.entered(pod, Phase.STUCK)
        while True:
            self._logs.system(
                pod.id,
                "error starting container: Error response from daemon: failed to create task for container: "
                "failed to create shim task: OCI runtime create failed: nvidia-container-cli: requirement "
                f"error: unsatisfied condition: cuda>={needed}, please update your driver to a newer "
                "version, or use an earlier cuda container: unknown",
            )
            await self._clock.sleep(_CUDA_LINE_SECONDS)

    async def _run(self, pod: Pod, image: Image) -> None:
        self._logs.system(pod.id, f"start container for {pod.image}: begin")
        if "container_error" not in pod.ailments and self._fault(pod, "container_error"):
            pod.ailments["container_error"] = None
        try:
            if "container_error" in pod.ailments:
                raise OSError("container init was OOM-killed (memory limit too low?): unknown")
            self._moments.before_container(pod)
            with self._clock.working():
                container = await self._start(pod, image)
        except (OSError, ValueError) as exc:
            self._logs.system(pod.id, f"error starting container: OCI runtime create failed: {exc}")
            return
        self.containers[pod.id] = container
        pod.container_started_at = self._clock.now()
        if not pod.bill:
            self.open_bill(pod)
        self._moments.entered(pod, Phase.UP)
        self._moments.container_up(pod)
        code = await container.wait()
        # Only here: a cancelled life leaves its container to whoever cancelled it.
        del self.containers[pod.id]
        self._logs.system(pod.id, f"container exited with code {code}")

    async def _start(self, pod: Pod, image: Image) -> Container:
        folder, now = self._store.pod_folder(pod.id), self._clock.now()
        disk, programs = folder / "disk", folder / "bin"
        (disk / "tmp").mkdir(parents=True, exist_ok=True)
        shims.install(programs, pod, base_url=self.base_url)
        listen = self._ports.listen(pod.id)
        env = environment(image, pod, programs=programs, base_url=self.base_url, listen=listen)
        full = pod.has("disk_full", now)
        return await start_container(
            command(image, pod.args),
            env={"HOME": str(disk), "TMPDIR": str(disk / "tmp"), **env},
            folder=disk,
            log=folder / "container.log",
            sweeper=self._sweeper,
            pod_id=pod.id,
            limits=Limits(
                network=not pod.has("network_cut", now), file_bytes=pod.file_bytes if full else None
            ),
        )

    def _fault(self, pod: Pod, *names: str) -> Rule | None:
        rule = self._faults.take("phase", pod_facts(pod), among=names)
        if rule is not None:
            self._store.record("fault", fault=rule.name, rule=rule.id, pod=pod.id)
        return rule

    def _end(self, pod: Pod, phase: Phase) -> None:
        self.close_bill(pod)
        self._moments.entered(pod, phase)

    def _say_layers(self, pod: Pod, *words: str) -> None:
        for word in words:
            for number in range(_LAYERS):
                layer = hashlib.sha256(f"{pod.image}:{number}".encode()).hexdigest()[:12]
                self._logs.system(pod.id, f"{layer} {word}")


def _pull_refusal(pod: Pod, image: Image | None, fault: Rule | None) -> str | None:
    name = "" if fault is None else fault.name
    if name == "pull_auth" or (image is not None and image.private and pod.registry is None):
        address = f"https://registry-1.docker.io/v2/{pod.image.partition(':')[0]}/manifests/latest"
        return f'Error response from daemon: Head "{address}": unauthorized: authentication required'
    if name == "pull_missing" or image is None:
        unknown = "manifest unknown: manifest unknown"
        return f"Error response from daemon: manifest for {pod.image} not found: {unknown}"
    return None


def _drawn(stream: random.Random, bounds: Seconds) -> float:
    return stream.uniform(*bounds)


async def _for_ever() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("unreachable: nobody sets the event")
