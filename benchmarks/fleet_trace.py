"""One day of jobs of an organization, made from a seed: when they come, what they need, how long they run."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from openweights_prefect.provisioning.hardware import catalogue_offers, choose_offers
from openweights_prefect.provisioning.provider import Offer
from openweights_prefect.types.hardware import Needs

IMAGE = "openweights/fine-tuning:latest"

_DOWNLOAD_GB_PER_SECOND = 0.4
_DAY_SECONDS = 86400.0
_BY_HOUR = (1, 1, 1, 1, 1, 1, 2, 4, 8, 12, 14, 14, 10, 12, 14, 14, 12, 10, 8, 6, 6, 5, 3, 2)
"""How many submissions an hour of the day gets, relative to the others."""


class Model(NamedTuple):
    """A base model; the first is the most popular one."""

    name: str
    requires_vram_gb: int
    weights_gb: int


MODELS = (
    Model("Qwen3-8B", 24, 16),
    Model("Llama-3.1-8B", 24, 16),
    Model("Qwen3-32B", 75, 64),
    Model("Qwen3-4B", 16, 8),
    Model("Qwen3-14B", 40, 28),
    Model("Llama-3.3-70B", 150, 140),
)


@dataclass(frozen=True)
class TraceJob:
    """A job that comes at a moment and runs for a while, wherever it runs."""

    number: int
    at: float
    """Seconds after midnight."""
    owner: str
    model: Model
    run_seconds: float
    needs: Needs
    offer: Offer
    """The cheapest that fits; every policy buys this one."""

    @property
    def download_seconds(self) -> float:
        """What the first job of a model pays on a pod that does not have it."""
        return self.model.weights_gb / _DOWNLOAD_GB_PER_SECOND

    @property
    def work_usd(self) -> float:
        """Its run alone, on the cheapest hardware that fits."""
        return self.run_seconds * self.offer.price_per_hour / 3600


@dataclass(frozen=True)
class TraceShape:
    """What a trace looks like. A submission is a sweep: jobs of one person and model, of similar length."""

    jobs: int = 200
    days: float = 1.0
    sweep_mean: float = 5.0
    """Jobs of a submission: geometric."""
    sweep_most: int = 24
    run_median_seconds: float = 600.0
    run_sigma: float = 0.8
    """Of the logarithm of the run time, between submissions."""
    run_sigma_within: float = 0.2
    run_limits_seconds: tuple[float, float] = (30.0, 4 * 3600.0)
    people: int = 6


def make_trace(seed: int, shape: TraceShape) -> list[TraceJob]:
    """The same jobs for the same seed, in the order in which they come."""
    rng = random.Random(seed)
    offers = catalogue_offers()
    chosen = {model: _choose(offers, model) for model in MODELS}
    popularity = [1 / rank for rank in range(1, len(MODELS) + 1)]
    jobs: list[TraceJob] = []
    while len(jobs) < shape.jobs:
        at = _moment(rng, shape.days)
        [model] = rng.choices(MODELS, popularity)
        owner = f"person-{rng.randrange(shape.people)}"
        typical = shape.run_median_seconds * math.exp(rng.gauss(0, shape.run_sigma))
        size = min(_geometric(rng, shape.sweep_mean), shape.sweep_most, shape.jobs - len(jobs))
        for each in range(size):
            seconds = typical * math.exp(rng.gauss(0, shape.run_sigma_within))
            low, high = shape.run_limits_seconds
            needs, offer = chosen[model]
            jobs.append(
                TraceJob(
                    number=len(jobs),
                    at=at + each,  # a script submits one a second
                    owner=owner,
                    model=model,
                    run_seconds=min(max(seconds, low), high),
                    needs=needs,
                    offer=offer,
                )
            )
    return sorted(jobs, key=lambda job: (job.at, job.number))


class Boots:
    """How long a pod takes from its purchase until it can work: the same for the n-th pod of any policy."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"boots {seed}")
        self._drawn: list[float] = []

    def __getitem__(self, number: int) -> float:
        while len(self._drawn) <= number:
            self._drawn.append(self._draw())
        return self._drawn[number]

    def _draw(self) -> float:
        machine = self._rng.uniform(15, 80)
        pull = min(max(240 * math.exp(self._rng.gauss(0, 0.6)), 60.0), 1620.0)
        container = 5.0
        return machine + pull + container


MEDIAN_BOOT_SECONDS = (15 + 80) / 2 + 240 + 5


def _choose(offers: Sequence[Offer], model: Model) -> tuple[Needs, Offer]:
    needs = Needs(docker_image=IMAGE, requires_vram_gb=model.requires_vram_gb)
    return needs, choose_offers(offers, needs)[0]


def _moment(rng: random.Random, days: float) -> float:
    """A time of a submission, more likely in the hours in which people work."""
    while True:
        at = rng.uniform(0, days * _DAY_SECONDS)
        hour = int(at % _DAY_SECONDS // 3600)
        if rng.random() < _BY_HOUR[hour] / max(_BY_HOUR):
            return at


def _geometric(rng: random.Random, mean: float) -> int:
    return 1 + int(math.log(1 - rng.random()) / math.log(1 - 1 / mean))
