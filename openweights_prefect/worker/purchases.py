"""Buys pods: the catalogue, what was refused, and one create after a row in the ledger."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from openweights_prefect.errors import ProviderError
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.protocol import Ledger, ask, ask_one
from openweights_prefect.provisioning.hardware import choose_offers, explain_no_offer
from openweights_prefect.provisioning.placement import WaitingRun
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    InsufficientFunds,
    NoCapacity,
    Offer,
    Provider,
    ProviderOutage,
    ProviderPod,
    RateLimited,
    RequestRejected,
    Unauthorized,
)
from openweights_prefect.settings import Settings
from openweights_prefect.types.hardware import Needs
from openweights_prefect.worker.orders import pod_request, pod_row

logger = logging.getLogger(__name__)

Announce = Callable[[str, str, Mapping[str, str]], None]
"""Tells the world what happened to a pod: kind, worker id, details."""

ACCOUNT = "account"
"""The subject of refusals that hold for every offer."""

CHEAP_PER_HOUR = 0.6
"""USD: a warm pod of less is never too dear, because a boot costs more than what a small job would save."""

_OFFERS_SECONDS = 60.0
_MOST_TRIES = 6
_AT_ONCE = 4
_FIRST_COOLDOWNS = (15.0, 15.0, 15.0)
_COOLDOWN_MINUTES = (1, 2, 5, 10, 20)
_REJECTED_SECONDS = 3600.0
_PAUSES: dict[type[ProviderError], float] = {
    InsufficientFunds: 300.0,
    Unauthorized: 60.0,
    ProviderOutage: 30.0,
}


class Purchases:
    """Buys for one organization. Several may buy at once: the ledger counts the pods."""

    def __init__(self, *, provider: Provider, ledger: Ledger, settings: Settings, announce: Announce) -> None:
        self._provider = provider
        self._ledger = ledger
        self._settings = settings
        self._announce = announce
        self._offers: list[Offer] = []
        self._offers_at = float("-inf")
        self._refused: dict[str, _Refusal] = {}
        self._one_catalogue = asyncio.Lock()
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self.under_way = 0

    def learn(self, refusals: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what the ledger remembers of refusals, of other workers too."""
        now = _now()
        self._refused = {
            subject: _Refusal(now + row["seconds_left"], row["failures"], row["reason"])
            for subject, row in refusals.items()
        }

    @property
    def paused(self) -> str | None:
        """Why nothing at all can be bought now."""
        refusal = self._refusal(ACCOUNT)
        return None if refusal is None else refusal.reason

    @property
    def refused_hosts(self) -> set[str]:
        """Machines that were unusable."""
        return {
            subject.removeprefix("host:")
            for subject in self._refused
            if subject.startswith("host:") and self._refusal(subject)
        }

    def ceiling(self, needs: Needs) -> float | None:
        """What a warm pod may cost to be worth taking; None when nothing cheaper could be bought instead."""
        if self.paused is not None:
            return None
        offers = choose_offers(self._offers, needs)
        prices = [
            offer.price_per_hour
            for offer in offers
            if offer.availability != "NONE" and self._refusal(offer.key) is None
        ]
        if not prices:
            return None
        return max(round(min(prices) * self._settings.warm_price_factor, 6), CHEAP_PER_HOUR)

    async def buy(self, run: WaitingRun) -> str | None:
        """Buy a pod that fits the run, trying offers in order. Returns why there is none, or None."""
        self.under_way += 1
        try:
            async with self._at_once:
                return self.paused or await self._buy(run)
        except tuple(_PAUSES) as exc:
            await self.refuse(ACCOUNT, f"RunPod: {exc}", _PAUSES[type(exc)])
            return self.paused
        except RateLimited as exc:
            await self.refuse(ACCOUNT, f"RunPod: {exc}", exc.retry_after_seconds)
            return self.paused
        except ProviderError as exc:
            return f"RunPod: {exc}"
        finally:
            self.under_way -= 1

    async def refuse(self, subject: str, why: str, seconds: float) -> None:
        """Remember that something was refused, for every worker."""
        failures = self._refused[subject].failures + 1 if subject in self._refused else 1
        self._refused[subject] = _Refusal(_now() + seconds, failures, why)
        await ask(self._ledger, "note_refusal", subject=subject, why=why, seconds=seconds)

    async def catalogue(self) -> list[Offer]:
        """What is sold, at most a minute old."""
        async with self._one_catalogue:
            if not self._offers or _now() - self._offers_at > _OFFERS_SECONDS:
                self._offers = await self._provider.offers()
                self._offers_at = _now()
        return self._offers

    async def publish(self, limits: Mapping[str, Any]) -> None:
        """Show the catalogue and the limits to those who ask why they wait."""
        offers = [_shown(offer) for offer in await self.catalogue()]
        await ask(self._ledger, "publish_catalogue", offers=offers, limits=dict(limits))

    async def _buy(self, run: WaitingRun) -> str | None:
        if refusal := self._refusal(image_subject(run.needs.docker_image)):
            await ask(self._ledger, "fail_job", for_job=run.job_id, why=refusal.reason)
            return refusal.reason
        offers = await self.catalogue()
        candidates = choose_offers(offers, run.needs)
        if not candidates:
            return explain_no_offer(offers, run.needs)
        free = [offer for offer in candidates if self._refusal(offer.key) is None]
        rejections: list[str] = []
        for offer in free[:_MOST_TRIES]:
            try:
                return await self._buy_offer(run, offer)
            except NoCapacity as exc:
                if self._refusal(offer.key) is None:  # Those who asked at the same time count once.
                    await self.refuse(offer.key, str(exc), self._cooldown(offer.key))
            except RequestRejected as exc:
                rejections.append(str(exc))
                await self.refuse(offer.key, str(exc), _REJECTED_SECONDS)
        if len(rejections) == len(candidates):
            why = f"RunPod rejects every request for it: {rejections[-1]}"
            await ask(self._ledger, "fail_job", for_job=run.job_id, why=why)
            return why
        refused = f"{len(candidates)} offers refused, from {candidates[0]} to {candidates[-1]}"
        return f"no capacity: {refused}; they are tried again"

    async def _buy_offer(self, run: WaitingRun, offer: Offer) -> str | None:
        """Intent row, then one create call. Whatever happens between the two is found by the unique name."""
        worker_id = f"pod-{secrets.token_hex(6)}"
        token = f"owb_{secrets.token_urlsafe(32)}"
        intent = await ask_one(
            self._ledger,
            "intend_pod",
            pod=pod_row(worker_id, run, offer, self._settings),
            bootstrap_hash=hash_secret(token),
            ttl_seconds=3600 * self._settings.pod_ttl_hours,
            max_pods=self._settings.max_workers,
        )
        if intent["outcome"] == "budget":
            return "budget: a pod could cost more than what is left of it; `ow costs` shows it"
        if intent["outcome"] != "intended":
            return f"pod limit: all {self._settings.max_workers} pods of the organization are in use"
        deadline_at = float(intent["deadline_at"])
        request = pod_request(worker_id, run, offer, self._settings, token=token, deadline_at=deadline_at)
        try:
            pod = await self._provider.create(request)
        except Ambiguous as exc:
            logger.warning(
                "It is unknown whether pod %s was created (%s); it is looked for by its name.", worker_id, exc
            )
            return f"pod {worker_id} ({offer}) may be starting; RunPod's answer was unclear"
        except ProviderError as exc:
            logger.info("Pod %s was refused: %s", worker_id, exc)
            await ask(self._ledger, "end_pod", for_worker=worker_id, why=f"refused by RunPod: {exc}")
            raise
        recorded = await ask_one(
            self._ledger,
            "record_pod",
            for_worker=worker_id,
            provider_id=pod.id,
            price=pod.cost_per_hour,
            details=details_of(pod),
        )
        if recorded["outcome"] != "recorded":
            logger.warning(
                "Pod %s (%s) is not needed any more, or was created twice; it is ended.", worker_id, pod.id
            )
            return None
        if offer.key in self._refused:
            del self._refused[offer.key]
            await ask(self._ledger, "clear_refusal", subject=offer.key)
        logger.info("Bought pod %s (%s): %s", worker_id, pod.id, offer)
        shown = {
            "hardware": f"{offer.count}x {offer.gpu_name}",
            "offer": str(offer),
            "price_per_hour": str(pod.cost_per_hour),
            "job": run.job_id,
            "runpod_id": pod.id,
        }
        self._announce("created", worker_id, shown)
        return None

    def _refusal(self, subject: str) -> _Refusal | None:
        refusal = self._refused.get(subject)
        return refusal if refusal is not None and refusal.until > _now() else None

    def _cooldown(self, subject: str) -> float:
        """Short for the first refusals in a row, then longer and longer."""
        failures = self._refused[subject].failures if subject in self._refused else 0
        steps = (*_FIRST_COOLDOWNS, *(60.0 * minutes for minutes in _COOLDOWN_MINUTES))
        return steps[min(failures, len(steps) - 1)]


@dataclasses.dataclass(frozen=True)
class _Refusal:
    until: float
    failures: int
    reason: str


def image_subject(image: str) -> str:
    """The subject of refusals of an image."""
    return f"image:{image[:290]}"


def details_of(pod: ProviderPod) -> dict[str, Any]:
    """What the provider tells of a pod's machine, as `record_pod` takes it."""
    known = {
        "host": pod.host,
        "cuda": pod.cuda,
        "vcpu": pod.vcpu or None,
        "ram_gb": pod.ram_gb or None,
        "created_at": pod.created_at.isoformat() if pod.created_at else None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _shown(offer: Offer) -> dict[str, Any]:
    return {"key": offer.key, "hardware": f"{offer.count}x {offer.gpu_name}", **dataclasses.asdict(offer)}


def _now() -> float:
    return asyncio.get_running_loop().time()
