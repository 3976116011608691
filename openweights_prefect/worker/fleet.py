"""Buys pods and ends them; makes the ledger and the provider's list agree."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

from openweights_prefect.errors import ProviderError
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.provisioning.hardware import choose_offers, explain_no_offer, usable_vram_gb
from openweights_prefect.provisioning.placement import Pod, WaitingRun
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    NoCapacity,
    Offer,
    PodRequest,
    Provider,
    ProviderPod,
)
from openweights_prefect.settings import Settings

logger = logging.getLogger(__name__)

_OFFERS_SECONDS = 60.0
_REFUSED_SECONDS = 60.0
_UNBORN_SECONDS = 90.0
_STRIKES = 2
_OVERDUE_SECONDS = 60.0
_DISK_GB = 200
_GONE = ("TERMINATED",)
_DEAD = ("EXITED", "ERROR", "TERMINATED")


class Fleet:
    """The pods of one organization. Acts only on pods that have a row in the ledger."""

    def __init__(self, *, provider: Provider, ledger: Ledger, settings: Settings) -> None:
        self._provider = provider
        self._ledger = ledger
        self._settings = settings
        self._offers: list[Offer] = []
        self._offers_at = 0.0
        self._refused: dict[Offer, float] = {}
        self._missing: dict[str, int] = {}
        self.being_bought = 0

    async def buy(self, run: WaitingRun) -> str | None:
        """Buy a pod that fits the run, trying offers in order. Returns why there is none, or None."""
        self.being_bought += 1
        try:
            return await self._buy(run)
        except ProviderError as exc:
            return f"RunPod: {exc}"
        finally:
            self.being_bought -= 1

    async def _buy(self, run: WaitingRun) -> str | None:
        needs: dict[str, Any] = {
            "requires_vram_gb": run.requires_vram_gb,
            "allowed_hardware": run.allowed_hardware,
            "max_price_per_hour": run.max_price_per_hour,
        }
        offers = await self._current_offers()
        candidates = choose_offers(offers, **needs)
        if not candidates:
            return explain_no_offer(offers, **needs)
        refusals = []
        for offer in candidates:
            if time.monotonic() < self._refused.get(offer, 0.0):
                refusals.append(str(offer))
                continue
            try:
                return await self._buy_offer(run, offer)
            except NoCapacity:
                self._refused[offer] = time.monotonic() + _REFUSED_SECONDS
                refusals.append(str(offer))
        refused = f"{len(refusals)} offers refused, from {refusals[0]} to {refusals[-1]}"
        return f"no capacity: {refused}; they are tried again"

    async def _buy_offer(self, run: WaitingRun, offer: Offer) -> str | None:
        """Intent row, then one create call. Whatever happens between the two is found by the unique name."""
        worker_id = f"pod-{secrets.token_hex(6)}"
        token = f"owb_{secrets.token_urlsafe(32)}"
        row = {
            "id": worker_id,
            "docker_image": run.docker_image,
            "hardware": f"{offer.count}x {offer.gpu_name}",
            "gpu_type": offer.gpu_id,
            "gpu_count": offer.count,
            "vram_gb": usable_vram_gb(offer),
            "cloud": offer.cloud,
            "price_per_hour": offer.price_per_hour,
        }
        intent = await self._call(
            "intend_pod",
            pod=row,
            bootstrap_hash=hash_secret(token),
            ttl_seconds=3600 * self._settings.pod_ttl_hours,
            max_pods=self._settings.max_workers,
        )
        if intent["outcome"] == "budget":
            return "budget: a pod could cost more than what is left of it; `ow costs` shows it"
        if intent["outcome"] != "intended":
            return f"pod limit: all {self._settings.max_workers} pods of the organization are in use"
        try:
            pod = await self._provider.create(
                self._request(worker_id, token, offer, run, float(intent["deadline_at"]))
            )
        except Ambiguous as exc:
            logger.warning(
                "It is unknown whether pod %s was created (%s); it is looked for by its name.", worker_id, exc
            )
            return f"pod {worker_id} ({offer}) may be starting; RunPod's answer was unclear"
        except ProviderError as exc:
            logger.info("Pod %s was refused: %s", worker_id, exc)
            await self._call("end_pod", for_worker=worker_id, why=f"refused by RunPod: {exc}")
            raise
        await self._call("record_pod", for_worker=worker_id, provider_id=pod.id, price=pod.cost_per_hour)
        logger.info("Bought pod %s (%s): %s", worker_id, pod.id, offer)
        return None

    def _request(
        self, worker_id: str, token: str, offer: Offer, run: WaitingRun, deadline_at: float
    ) -> PodRequest:
        return PodRequest(
            name=self.pod_name(worker_id),
            image=run.docker_image,
            gpu_id=offer.gpu_id,
            gpu_count=offer.count,
            cloud=offer.cloud,
            disk_gb=_DISK_GB,
            env={
                "OW_POD_ID": worker_id,
                "OW_POD_TOKEN": token,
                "OW_DEADLINE_AT": str(int(deadline_at)),
                "OW_OWNER": self._settings.organization_id,
                # A pod has no other way to learn what this control plane expects of it.
                "OW_LEASE_SECONDS": str(self._settings.lease_seconds),
                "OW_HEARTBEAT_SECONDS": str(self._settings.heartbeat_seconds),
                "OW_POD_IDLE_SECONDS": str(self._settings.pod_idle_seconds),
                **_public_addresses(self._settings),
            },
            price_ceiling=run.max_price_per_hour,
        )

    def pod_name(self, worker_id: str) -> str:
        """The name at the provider: unique, because the ledger's id is."""
        return f"ow-{self._settings.organization_id[-8:]}-{worker_id}"

    async def reconcile(self, pods: Sequence[Pod]) -> None:
        """Compare the ledger with the provider's complete list, end what is to end, notice what died."""
        if not pods:
            return
        listed = await self._provider.list()
        by_id = {pod.id: pod for pod in listed}
        for pod in pods:
            named = [
                other for other in listed if other.name == self.pod_name(pod.id) and other.status not in _GONE
            ]
            held = by_id.get(pod.pod_id) if pod.pod_id else next(iter(named), None)
            await self._reconcile_pod(pod, held)
            for extra in named:
                if held is not None and extra.id != held.id:
                    logger.warning("Pod %s was created twice; %s is ended.", pod.id, extra.id)
                    await self._provider.terminate(extra.id)

    async def _reconcile_pod(self, pod: Pod, held: ProviderPod | None) -> None:
        if held is None:
            await self._count_missing(pod)
            return
        self._missing.pop(pod.id, None)
        if pod.pod_id is None:
            logger.info("Adopted pod %s (%s) by its name.", pod.id, held.id)
            await self._call("record_pod", for_worker=pod.id, provider_id=held.id, price=held.cost_per_hour)
        why = self._why_to_end(pod, held)
        if why is not None:
            await self._end(pod, held, why)

    def _why_to_end(self, pod: Pod, held: ProviderPod) -> str | None:
        if held.status in _DEAD:
            return f"RunPod says {held.status}"
        if pod.status in ("draining", "lost"):
            return pod.status
        if pod.overdue_seconds > _OVERDUE_SECONDS:
            return "past its deadline"
        if pod.status == "starting" and pod.age_seconds > self._settings.boot_seconds:
            return f"no sign of life {self._settings.boot_seconds} s after it was bought"
        return None

    async def _end(self, pod: Pod, held: ProviderPod, why: str) -> None:
        if pod.status not in ("draining", "lost"):
            await self._call("lose_pod", for_worker=pod.id, why=why)
        if held.status not in _GONE:
            await self._provider.terminate(held.id)
        # The row is closed by a later pass that no longer sees the pod alive.
        if held.status in _GONE:
            await self._call("end_pod", for_worker=pod.id, why=why)
            logger.info("Pod %s (%s) has ended: %s", pod.id, held.id, why)

    async def _count_missing(self, pod: Pod) -> None:
        if pod.pod_id is None and pod.age_seconds < _UNBORN_SECONDS:
            return  # a pod may show up in the list a while after it was created
        self._missing[pod.id] = self._missing.get(pod.id, 0) + 1
        if self._missing[pod.id] >= _STRIKES:
            self._missing.pop(pod.id)
            await self._call(
                "end_pod", for_worker=pod.id, why="gone from RunPod" if pod.pod_id else "never created"
            )
            logger.info("Pod %s is gone.", pod.id)

    async def _current_offers(self) -> list[Offer]:
        if not self._offers or time.monotonic() - self._offers_at > _OFFERS_SECONDS:
            self._offers = await self._provider.offers()
            self._offers_at = time.monotonic()
        return self._offers

    async def _call(self, function: str, **arguments: Any) -> Row:
        rows = await asyncio.to_thread(self._ledger.call, function, **arguments)
        return rows[0]


def _public_addresses(settings: Settings) -> dict[str, str]:
    """Where a pod finds a hosted ledger and what belongs to it; a pod of the local stack reads `stack.json`.

    The provider shows them to everybody in its account: never a token, and never a database URL.
    """
    if not settings.supabase_url:
        return {}
    addresses = {
        "SUPABASE_URL": settings.supabase_url,
        "SUPABASE_ANON_KEY": settings.supabase_key,
        "PREFECT_API_URL": settings.prefect_api_url,
        "OW_FILE_STORE": settings.file_store,
    }
    return {name: value for name, value in addresses.items() if value}
