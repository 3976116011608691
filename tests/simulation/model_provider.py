"""A provider of pods in virtual time: hosts, stock, slow boots, bills by the second, and faults."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from typing import Any, Protocol, get_args

from openweights_prefect.provisioning.hardware import catalogue
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    Cloud,
    InsufficientFunds,
    NoCapacity,
    Offer,
    PodRequest,
    ProviderOutage,
    ProviderPod,
    RateLimited,
    Unauthorized,
)
from tests.simulation.model_rows import version

GPUS = ("NVIDIA L4", "NVIDIA A100 80GB PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA RTX A6000")
MISSING_IMAGE = "registry.example/missing:1"


@dataclass
class Host:
    name: str
    cuda: str
    bad_gpu: bool = False
    cuda_error: bool = False


@dataclass
class Faults:
    """What goes wrong at the moment; the world sets and clears it."""

    no_stock: set[str] = field(default_factory=set)
    """Offer keys, or `*`."""
    creates: list[str] = field(default_factory=list)
    """What happens to the next creates."""
    lists: list[str] = field(default_factory=list)
    deletes: list[str] = field(default_factory=list)
    boots: list[str] = field(default_factory=list)
    """What happens to the next pods that are made."""
    down: bool = False
    no_funds: bool = False
    revoked: bool = False
    hides_seconds: float = 0.0
    """How long a new pod is not listed."""


class Container(Protocol):
    """What runs in a pod."""

    def start(self) -> None:
        """The container is up."""
        ...

    def kill(self) -> None:
        """Nothing of it runs any more."""
        ...

    def terminate(self) -> None:
        """SIGTERM."""
        ...


@dataclass
class SimPod:
    id: str
    request: PodRequest
    offer: Offer | None
    host: Host
    created_at: float
    visible_at: float
    boot: str
    """The fault of its boot, or none."""
    log: list[str] = field(default_factory=list)
    status: str = "RUNNING"
    up: bool = False
    foreign: bool = False
    gone_at: float | None = None
    bill_ended_at: float | None = None
    container: Container | None = None
    dead_at: float | None = None
    """When its container died for good."""

    @property
    def exists(self) -> bool:
        return self.gone_at is None

    @property
    def price(self) -> float:
        return self.offer.price_per_hour if self.offer else 0.0


class Witness(Protocol):
    """Hears of everything that the provider is asked to do."""

    def create_called(self, request: PodRequest) -> None: ...
    def terminate_called(self, pod_id: str) -> None: ...
    def reached(self, what: str) -> None: ...
    def note(self, text: str) -> None: ...


class ModelProvider:
    """One account, in which others have pods too."""

    def __init__(
        self,
        *,
        random: Random,
        witness: Witness,
        now: Callable[[], float],
        container: Callable[[SimPod], Container],
    ) -> None:
        self.faults = Faults()
        self.pods: dict[str, SimPod] = {}
        self._random = random
        self._witness = witness
        self._now = now
        self._container = container
        self.every_offer = _offers()
        self._tasks: set[asyncio.Task[None]] = set()
        self.hosts = [Host(f"host-{n}", ["12.8", "12.9", "13.0"][n % 3]) for n in range(12)]
        for number in range(random.randint(1, 4)):
            self._add_foreign(f"someone-else-{number}")
        self._add_foreign("ow-00000001-pod-5c3a1f0e9b77")  # of another installation with the same settings

    # What the control plane calls ------------------------------------------------------------------

    async def create(self, request: PodRequest) -> ProviderPod:
        await self._way()
        self._witness.create_called(request)
        self._check_account()
        if self.faults.no_funds:
            raise InsufficientFunds("the balance is too low")
        fault = self.faults.creates.pop(0) if self.faults.creates else ""
        if fault:
            self._witness.reached(f"create: {fault}")
        if fault == "rate limited":
            raise RateLimited("slow down", retry_after_seconds=self._random.uniform(1, 20))
        offer = next(
            (
                o
                for o in self.every_offer
                if (o.gpu_id, o.count, o.cloud) == (request.gpu_id, request.gpu_count, request.cloud)
            ),
            None,
        )
        if offer is None or {offer.key, "*"} & self.faults.no_stock:
            self._witness.reached("create: no capacity")
            raise NoCapacity("There are no longer any instances available with the requested specifications.")
        if fault == "unclear, nothing made":
            await self._way()
            raise Ambiguous("the connection was reset")
        pod = self._make(request, offer)
        if fault == "two made":
            self._make(request, offer)
        if fault in ("unclear, made", "unclear, two made"):
            if fault == "unclear, two made":
                self._make(request, offer)
            await asyncio.sleep(self._random.choice([0.1, 5.0, 30.0]))
            raise Ambiguous("the server said 500")
        await self._way()
        return self._shown(pod)

    async def list(self) -> builtins.list[ProviderPod]:
        await self._way()
        self._check_account()
        fault = self.faults.lists.pop(0) if self.faults.lists else ""
        if fault:
            self._witness.reached(f"list: {fault}")
        if fault == "failed":
            raise ProviderOutage("the list has no end")
        shown = [self._shown(pod) for pod in self.pods.values() if self.is_visible(pod)]
        if fault == "empty":
            shown = []
        if fault == "truncated":
            shown = [pod for pod in shown if self._random.random() < 0.5]
        return shown

    async def get(self, pod_id: str) -> ProviderPod | None:
        await self._way()
        self._check_account()
        pod = self.pods.get(pod_id)
        return self._shown(pod) if pod is not None and self.is_visible(pod) else None

    async def terminate(self, pod_id: str) -> None:
        await self._way()
        self._witness.terminate_called(pod_id)
        self._check_account()
        fault = self.faults.deletes.pop(0) if self.faults.deletes else ""
        if fault:
            self._witness.reached(f"delete: {fault}")
        if fault == "failed":
            raise ProviderOutage("the server said 500")
        pod = self.pods.get(pod_id)
        if fault != "ignored" and pod is not None and pod.exists:
            self._end(pod, "terminated")
        if fault == "failed after it was done":
            raise ProviderOutage("the server said 500")
        await self._way()

    async def offers(self) -> builtins.list[Offer]:
        await self._way()
        self._check_account()
        return self.every_offer

    async def system_log(self, pod_id: str) -> builtins.list[str]:
        await self._way()
        self._check_account()
        pod = self.pods.get(pod_id)
        return builtins.list(pod.log) if pod is not None and pod.exists else []

    # What happens to pods --------------------------------------------------------------------------

    def die(self, pod: SimPod, how: str) -> None:
        """`exited`: listed as such. `vanished`: gone at once."""
        if not pod.exists or pod.status != "RUNNING":
            return
        self._witness.note(f"pod {pod.request.name} ({pod.id}) has {how}")
        self._witness.reached(f"pod: {how}")
        pod.dead_at = self._now()
        if how == "vanished":
            self._end(pod, how)
            return
        pod.status = "ERROR" if how == "failed" else "EXITED"
        pod.up = False
        pod.bill_ended_at = self._now()
        if pod.container is not None:
            pod.container.kill()

    def crash_container(self, pod: SimPod) -> None:
        """Its processes die; the provider starts them again."""
        if pod.exists and pod.up and pod.container is not None:
            self._witness.reached("pod: container restarted")
            pod.container.kill()
            pod.up = False
            self._spawn(self._restart(pod))

    def end_itself(self, pod: SimPod) -> None:
        """With its own key a pod may end itself alone."""
        if pod.exists:
            self._end(pod, "ended itself")

    def existing(self) -> builtins.list[SimPod]:
        """Ours that exist."""
        return [pod for pod in self.pods.values() if pod.exists and not pod.foreign]

    def billed_seconds(self, pod: SimPod) -> float:
        """From the rental to the end, in seconds."""
        end = pod.bill_ended_at if pod.bill_ended_at is not None else self._now()
        return end - pod.created_at

    def _make(self, request: PodRequest, offer: Offer) -> SimPod:
        boot = self.faults.boots.pop(0) if self.faults.boots else ""
        if request.image == MISSING_IMAGE:
            boot = "image missing"
        least = version(request.min_cuda or "0")
        host = self._random.choice([host for host in self.hosts if version(host.cuda) >= least])
        now = self._now()
        pod_id = f"p{len(self.pods):04d}"
        pod = SimPod(pod_id, request, offer, host, now, now + self.faults.hides_seconds, boot)
        self.pods[pod_id] = pod
        self._witness.note(f"made {pod_id} for {request.name} on {host.name}, {offer}, boot fault {boot!r}")
        self._spawn(self._come_up(pod))
        return pod

    async def _come_up(self, pod: SimPod) -> None:
        if pod.boot:
            self._witness.reached(f"boot: {pod.boot}")
        if pod.boot == "never allocated":
            return
        await asyncio.sleep(self._random.uniform(1, 15))
        pod.log.append(f"create container {pod.request.image}")
        pod.log.append(f"{pod.request.image} Pulling from registry")
        if pod.boot == "image missing":
            await asyncio.sleep(3)
            pod.log.append(
                f"error pulling image: manifest for {pod.request.image} not found: manifest unknown"
            )
            return
        if pod.boot == "pull stuck":
            return
        await asyncio.sleep(
            self._random.uniform(200, 900) if pod.boot == "slow pull" else self._random.uniform(5, 60)
        )
        pod.log.append(f"Status: Downloaded newer image for {pod.request.image}")
        if pod.boot == "driver too old" or pod.host.cuda_error:
            self._witness.reached("boot: driver too old")
            pod.log.append(
                "error starting container: failed to create task for container: nvidia-container-cli: "
                "requirement error: unsatisfied condition: cuda>=12.8, please update your driver"
            )
            return
        if pod.boot == "error":
            self.die(pod, "failed")
            return
        await asyncio.sleep(2)
        self._start(pod)

    async def _restart(self, pod: SimPod) -> None:
        await asyncio.sleep(self._random.uniform(1, 20))
        self._start(pod)

    def _start(self, pod: SimPod) -> None:
        if pod.exists and pod.status == "RUNNING":
            pod.log.append("start container")
            pod.up = True
            pod.container = pod.container or self._container(pod)
            pod.container.start()

    def _end(self, pod: SimPod, how: str) -> None:
        self._witness.note(f"{pod.id} of {pod.request.name} is gone: {how}")
        pod.gone_at = self._now()
        pod.bill_ended_at = pod.bill_ended_at if pod.bill_ended_at is not None else pod.gone_at
        pod.up, pod.status = False, "TERMINATED"
        if pod.container is not None:
            pod.container.kill()

    def is_visible(self, pod: SimPod) -> bool:
        return pod.exists and self._now() >= pod.visible_at

    def _shown(self, pod: SimPod) -> ProviderPod:
        known = bool(pod.log)
        return ProviderPod(
            id=pod.id,
            name=pod.request.name,
            status=pod.status,
            cost_per_hour=pod.price,
            created_at=datetime.fromtimestamp(pod.created_at, UTC),
            runtime_up=pod.up,
            image=pod.request.image,
            gpu_id=pod.request.gpu_id,
            gpu_count=pod.request.gpu_count,
            host=pod.host.name if known else None,
            cuda=pod.host.cuda if known else None,
            vcpu=8 * pod.request.gpu_count,
            ram_gb=64 * pod.request.gpu_count,
        )

    def _check_account(self) -> None:
        if self.faults.down:
            self._witness.reached("provider down")
            raise ProviderOutage("the server said 503")
        if self.faults.revoked:
            self._witness.reached("key revoked")
            raise Unauthorized("the API key is not known")

    async def _way(self) -> None:
        """Half of a call: who is killed before the first half never asked, after it never hears."""
        await asyncio.sleep(self._random.uniform(0.02, 0.4))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        from tests.simulation.virtual_loop import outside

        with outside():
            task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _add_foreign(self, name: str) -> None:
        request = PodRequest(
            name=name, image="other/image", gpu_id=GPUS[0], gpu_count=1, cloud="SECURE", disk_gb=1
        )
        pod = SimPod(
            f"f{len(self.pods):04d}", request, None, self.hosts[0], self._now(), 0.0, "", foreign=True
        )
        pod.up = True
        self.pods[pod.id] = pod


def _offers() -> builtins.list[Offer]:
    found = []
    for gpu in catalogue():
        tiers = zip(get_args(Cloud), (gpu.secure, gpu.community), strict=True)
        for cloud, tier in tiers if gpu.id in GPUS else ():
            for count in (1, 2) if tier is not None else ():
                if tier is not None and count <= tier.max_count:
                    price, memory = tier.price_per_hour * count, gpu.memory_gb * count
                    found.append(Offer(gpu.id, gpu.name, count, cloud, price, memory, "HIGH"))
    return found
