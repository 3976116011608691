"""Makes the ledger and the provider's list of pods agree: adopts, notices what died, ends what is to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from openweights_prefect.errors import ProviderError
from openweights_prefect.ledger.protocol import Ledger, ask, ask_one
from openweights_prefect.provisioning import reaper
from openweights_prefect.provisioning.placement import Pod
from openweights_prefect.provisioning.provider import Provider, ProviderPod
from openweights_prefect.provisioning.runpod.system_log import diagnose
from openweights_prefect.settings import Settings
from openweights_prefect.worker.orders import pod_name
from openweights_prefect.worker.purchases import (
    Announce,
    Purchases,
    details_of,
    image_subject,
)

logger = logging.getLogger(__name__)

_LOG_SECONDS = 20.0
_BAD_HOST_SECONDS = 6 * 3600.0
_BAD_OFFER_SECONDS = 60.0
_BAD_IMAGE_SECONDS = 120.0
_ALARM_SECONDS = 900.0
_HEARD_HEARTBEATS = 3


@dataclass
class _Sighting:
    """What earlier passes saw of one pod. Lost with the worker, which costs seconds, never a pod."""

    first_age: float
    first_seen: float
    status: str = "starting"
    strikes: int = 0
    """Complete lists in a row without it."""
    billed_until: float | None = None
    logs_read_at: float = float("-inf")
    ending_since: float | None = None
    alarmed: bool = False

    def age(self, now: float, age_seconds: float) -> float:
        """What the ledger says, unless it has run ahead of our clock since the first sight."""
        return min(age_seconds, self.first_age + now - self.first_seen)


@dataclass
class _Seen:
    pods: dict[str, _Sighting] = field(default_factory=dict)
    foreign: set[str] = field(default_factory=set)
    """The provider's ids of pods whose names look like ours, and which are not."""
    logs: bool = False
    """Some pod's log has had lines."""
    duplicates: set[str] = field(default_factory=set)
    """Those of second pods of one create, which are on the bill already."""


class Fleet:
    """The pods of one organization. Acts only on pods that have a row in the ledger."""

    def __init__(
        self,
        *,
        provider: Provider,
        ledger: Ledger,
        settings: Settings,
        purchases: Purchases,
        announce: Announce,
    ) -> None:
        self._provider = provider
        self._ledger = ledger
        self._settings = settings
        self._purchases = purchases
        self._announce = announce
        self._limits = reaper.Limits(
            first_log_seconds=settings.first_log_seconds,
            boot_seconds=settings.boot_seconds,
            heard_seconds=_HEARD_HEARTBEATS * settings.heartbeat_seconds,
        )
        self._seen = _Seen()

    async def reconcile(self, pods: Sequence[Pod]) -> None:
        """Compare the rows with one complete list. One pod's trouble does not keep the others waiting."""
        listed = await self._provider.list()
        now = _now()
        self._seen.pods = {
            pod.id: self._seen.pods.get(pod.id) or _Sighting(pod.age_seconds, now) for pod in pods
        }
        # By our own clock: the ledger's may be set.
        pods = [pod.aged(self._seen.pods[pod.id].age(now, pod.age_seconds)) for pod in pods]
        # At once, because the logs of many starting pods take their time.
        await asyncio.gather(*(self._look_at(pod, listed) for pod in pods))
        await self._end_orphans(pods, listed)

    async def _look_at(self, pod: Pod, listed: Sequence[ProviderPod]) -> None:
        try:
            await self._reconcile_pod(pod, listed)
        except ProviderError as exc:
            logger.warning("Pod %s is looked at again: %s", pod.id, exc)

    async def _reconcile_pod(self, pod: Pod, listed: Sequence[ProviderPod]) -> None:
        held, extras = reaper.counterpart(pod, self._name(pod.id), listed)
        if pod.pod_id is not None:
            # Before that it is open which of them the answer to the create will name.
            for extra in extras:
                await self._end_duplicate(pod, extra)
        if held is None:
            await self._count_missing(pod)
            return
        sighting = self._seen.pods[pod.id]
        sighting.strikes = 0
        if sighting.status == "starting" and pod.status in ("active", "busy"):
            self._announce("active", pod.id, {"runpod_id": held.id, "hardware": pod.hardware})
        sighting.status = pod.status
        if held.status not in reaper.DEAD:
            sighting.billed_until = _now()
        await self._record(pod, held)
        verdict = reaper.judge(pod, held, self._limits, self._purchases.refused_hosts)
        if pod.status == "starting" and (verdict is None or held.status in reaper.DEAD):
            verdict = await self._read_log(pod, held) or verdict
        if verdict is not None:
            await self._end(pod, held, verdict)

    async def _record(self, pod: Pod, held: ProviderPod) -> None:
        """Adopt a pod by its name; note its machine when that becomes known."""
        if pod.pod_id == held.id and (held.host is None or pod.host == held.host):
            return
        answer = await ask_one(
            self._ledger,
            "record_pod",
            for_worker=pod.id,
            provider_id=held.id,
            price=held.cost_per_hour,
            details=details_of(held),
        )
        if pod.pod_id is None and answer["outcome"] == "recorded":
            logger.info("Adopted pod %s (%s) by its name.", pod.id, held.id)
            self._announce("adopted", pod.id, {"runpod_id": held.id})

    async def _read_log(self, pod: Pod, held: ProviderPod) -> reaper.Verdict | None:
        """What the machine says of a pod that has not reported; not asked in every pass."""
        sighting = self._seen.pods[pod.id]
        dead = held.status in reaper.DEAD
        if not dead and (pod.age_seconds < _LOG_SECONDS or _now() - sighting.logs_read_at < _LOG_SECONDS):
            return None
        sighting.logs_read_at = _now()
        try:
            lines = await self._provider.system_log(held.id)
        except ProviderError as exc:
            logger.info("The log of pod %s cannot be read: %s", pod.id, exc)
            return None
        self._seen.logs = self._seen.logs or bool(lines)
        if not lines and not self._seen.logs:
            return None  # Perhaps the key may read no logs: their absence proves nothing.
        diagnosis = diagnose(lines, image=pod.docker_image)
        return reaper.judge_log(pod, lines, diagnosis, self._limits)

    async def _end(self, pod: Pod, held: ProviderPod, verdict: reaper.Verdict) -> None:
        if pod.status not in ("draining", "lost"):
            await self._lose(pod, held, verdict)
        elif verdict.blame == "machine":
            await self._avoid_host(pod.host or held.host, verdict.why)
        sighting = self._seen.pods[pod.id]
        if sighting.ending_since is None:
            sighting.ending_since = _now()
        if held.status in reaper.GONE:
            await self._close(pod, verdict.why)
            return
        await self._provider.terminate(held.id)
        if held.status not in reaper.DEAD:
            sighting.billed_until = _now()
        # The row is closed by a later pass that no longer sees the pod alive.
        if not sighting.alarmed and _now() - sighting.ending_since > _ALARM_SECONDS:
            sighting.alarmed = True
            logger.error("RunPod does not end pod %s (%s): end it by hand, it costs money.", pod.id, held.id)
            self._announce("stuck", pod.id, {"runpod_id": held.id, "reason": verdict.why})

    async def _lose(self, pod: Pod, held: ProviderPod, verdict: reaper.Verdict) -> None:
        if verdict.blame == "image":
            await self._purchases.refuse(image_subject(pod.docker_image), verdict.why, _BAD_IMAGE_SECONDS)
            if pod.bought_for is not None:
                await ask(self._ledger, "fail_job", for_job=pod.bought_for, why=verdict.why)
        if verdict.blame == "machine":
            await self._avoid_host(pod.host or held.host, verdict.why)
        if verdict.blame == "offer":
            # The market tends to sell the same machine again.
            await self._purchases.refuse(pod.offer_key, verdict.why, _BAD_OFFER_SECONDS)
        counts = verdict.counts and verdict.blame != "image"
        await ask(self._ledger, "lose_pod", for_worker=pod.id, why=verdict.why, counts=counts)
        logger.info("Pod %s (%s) is given up: %s", pod.id, held.id, verdict.why)
        self._announce("lost", pod.id, {"runpod_id": held.id, "reason": verdict.why})

    async def _avoid_host(self, host: str | None, why: str) -> None:
        if host is not None and host not in self._purchases.refused_hosts:
            await self._purchases.refuse(f"host:{host}", why, _BAD_HOST_SECONDS)

    async def _count_missing(self, pod: Pod) -> None:
        sighting = self._seen.pods[pod.id]
        sighting.strikes += 1
        if not reaper.is_missing_for_good(pod, sighting.strikes, self._limits):
            return
        # A list may leave a pod out, an answer by its id cannot; who is to end anyway is not asked for.
        held = None
        if pod.pod_id is not None and pod.status not in ("draining", "lost"):
            held = await self._provider.get(pod.pod_id)
            if held is not None and held.name != self._name(pod.id):
                held = None  # The id is what the pod says of itself: never act on somebody else's.
        if held is None or held.status in reaper.GONE:
            await self._close(pod, "gone from RunPod" if pod.pod_id else "never created")
        elif held.status in reaper.DEAD:
            await self._end(pod, held, reaper.Verdict(f"RunPod says {held.status}"))
        else:
            sighting.strikes = 0

    async def _close(self, pod: Pod, why: str) -> None:
        billed_until = self._seen.pods[pod.id].billed_until
        ago = 0.0 if billed_until is None else _now() - billed_until
        if pod.status not in ("draining", "lost") and pod.pod_id is not None:
            await ask(self._ledger, "lose_pod", for_worker=pod.id, why=why)
        await ask(self._ledger, "end_pod", for_worker=pod.id, why=why, billed_seconds_ago=ago)
        logger.info("Pod %s has ended: %s", pod.id, pod.reason or why)
        self._announce("ended", pod.id, {"reason": pod.reason or why})

    async def _end_duplicate(self, pod: Pod, extra: ProviderPod) -> None:
        logger.warning("Pod %s was created twice; %s is ended.", pod.id, extra.id)
        await self._provider.terminate(extra.id)
        if extra.id not in self._seen.duplicates:
            self._seen.duplicates.add(extra.id)
            await self._record_duplicate(pod.id, extra, pod.age_seconds)

    async def _record_duplicate(self, worker_id: str, extra: ProviderPod, seconds: float) -> None:
        price = extra.cost_per_hour
        await ask(
            self._ledger,
            "record_duplicate",
            for_worker=worker_id,
            provider_id=extra.id,
            price=price,
            seconds=seconds,
        )

    async def _end_orphans(self, pods: Sequence[Pod], listed: Sequence[ProviderPod]) -> None:
        """Pods of ours that show up after their rows were closed: back into the ledger, which ends them."""
        prefix = self._name("pod-")
        alive = {pod.id for pod in pods}
        named = {
            each.name.removeprefix(self._name("")): each
            for each in listed
            if each.name.startswith(prefix)
            and each.status not in reaper.GONE
            and each.id not in self._seen.foreign
        }
        unknown = {worker: held for worker, held in named.items() if worker not in alive}
        if not unknown:
            return
        rows = await ask(self._ledger, "known_pods", worker_ids=sorted(unknown))
        ours = {row["worker_id"]: row for row in rows}
        for worker, held in unknown.items():
            row = ours.get(worker)
            if row is None or row["docker_image"] != held.image:
                self._seen.foreign.add(held.id)
            elif row["status"] != "terminated":
                continue  # Bought after these rows were read: the next pass sees it.
            elif row["pod_id"] is None:
                logger.warning("Pod %s (%s) exists after all, and is ended.", worker, held.id)
                await ask(
                    self._ledger,
                    "record_pod",
                    for_worker=worker,
                    provider_id=held.id,
                    price=held.cost_per_hour,
                    details=details_of(held),
                )
            else:
                logger.warning("Pod %s had ended, and %s is listed; it is ended.", worker, held.id)
                await self._provider.terminate(held.id)
                if row["pod_id"] != held.id and held.id not in self._seen.duplicates:
                    self._seen.duplicates.add(held.id)
                    await self._record_duplicate(worker, held, row["age_seconds"])

    def _name(self, worker_id: str) -> str:
        return pod_name(self._settings.organization_id, worker_id)


def _now() -> float:
    return asyncio.get_running_loop().time()
