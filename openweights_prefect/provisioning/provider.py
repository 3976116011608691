"""What a provider of pods does, and how it says no."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from openweights_prefect.errors import ProviderError

Cloud = Literal["SECURE", "COMMUNITY"]
Availability = Literal["NONE", "LOW", "MEDIUM", "HIGH"]


class NoCapacity(ProviderError):
    """Nothing was created: this offer cannot be placed now; try the next one."""

    def __init__(self, message: str, *, recognized: bool = True) -> None:
        """`recognized` is False for an unknown reason: the same one for every offer means a bad request."""
        super().__init__(message)
        self.recognized = recognized


class Ambiguous(ProviderError):
    """A pod may or may not have been created: find it by name before anything else is bought."""


class RequestRejected(ProviderError):
    """Nothing was done, and the same request will be refused again."""


class Unauthorized(ProviderError):
    """The API key is missing, wrong or may not do this."""


class InsufficientFunds(ProviderError):
    """Nothing was created: the account's balance or spending limit does not allow it; buy nothing."""


class RateLimited(ProviderError):
    """Nothing was done; ask again after `retry_after_seconds`."""

    def __init__(self, message: str, *, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ProviderOutage(ProviderError):
    """The provider does not answer, or not in its own language; nothing was created."""


class ImageError(ProviderError):
    """The image is missing, not ours to read, or not for this kind of machine. No other machine helps."""


class HostUnusable(ProviderError):
    """This machine cannot run the container; another one may."""


@dataclass(frozen=True)
class PodRequest:
    """One pod to buy. The name must be new: it is what finds the pod after an ambiguous answer."""

    name: str
    image: str
    gpu_id: str
    gpu_count: int
    cloud: Cloud
    disk_gb: int
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    args: str | None = None
    """The container's command: shell words, or JSON with `entrypoint` and `cmd`."""
    min_cuda: str | None = None
    """Lowest CUDA version of the host's driver, such as `12.8`."""
    min_vcpu_per_gpu: int | None = None
    """Asked for where the provider can be asked; a pod that is known to have less is ended at once."""
    min_ram_gb_per_gpu: int | None = None
    """Likewise."""
    price_ceiling: float | None = None
    """USD an hour for the whole pod; a pod that comes out dearer is ended at once."""


@dataclass(frozen=True)
class ProviderPod:
    """A pod as the provider lists it, without its environment, which may be another person's."""

    id: str
    name: str
    status: str
    """The provider's word. `RUNNING` means rented and billing, not that the container is up."""
    cost_per_hour: float
    created_at: datetime | None
    runtime_up: bool
    """The container runs. False may also be a gap in the provider's telemetry."""
    image: str
    gpu_id: str
    gpu_count: int
    host: str | None = None
    """A weak fingerprint of the machine; None while there is none, or when the provider does not tell."""
    cuda: str | None = None
    """CUDA version of the host's driver."""
    vcpu: int = 0
    ram_gb: int = 0


def offer_key(gpu_id: str, count: int, cloud: str) -> str:
    """What refusals of an offer are remembered by, also by the pods that were bought as it."""
    return f"{gpu_id}|{count}|{cloud}"


@dataclass(frozen=True)
class Offer:
    """Something that can be bought: GPU type, number of cards, cloud and price."""

    gpu_id: str
    gpu_name: str
    count: int
    cloud: Cloud
    price_per_hour: float
    """USD for the whole pod."""
    memory_gb: int
    """GPU memory of the whole pod."""
    availability: Availability
    """A hint for the order of tries, not a promise in either direction."""

    @property
    def key(self) -> str:
        """What refusals of it are remembered by."""
        return offer_key(self.gpu_id, self.count, self.cloud)

    def __str__(self) -> str:
        return f"{self.count}x {self.gpu_name} ({self.cloud.lower()}, ${self.price_per_hour:.2f}/h)"


class Provider(Protocol):
    """Sells pods. Every call raises a `ProviderError` of this module when it cannot do its work."""

    async def create(self, request: PodRequest) -> ProviderPod:
        """Buy one pod and return at once, without waiting until it is up. Never retried.

        After `Ambiguous`, or when the call is cancelled, a pod may exist. After every other error none does.
        """
        ...

    async def list(self) -> builtins.list[ProviderPod]:
        """All pods of the account, other people's too; raises rather than return a part of them."""
        ...

    async def get(self, pod_id: str) -> ProviderPod | None:
        """One pod, or None if there is none; None soon after `create` proves nothing."""
        ...

    async def terminate(self, pod_id: str) -> None:
        """End a pod for good; silent when it is already gone."""
        ...

    async def offers(self) -> builtins.list[Offer]:
        """What the catalogue says can be bought now."""
        ...

    async def system_log(self, pod_id: str) -> builtins.list[str]:
        """What the machine logged of a pod so far, oldest first: pull, start, and why it does not start."""
        ...
