"""The policies that a trace is replayed through: this product's own code, and three rules of others.

All of them buy the same hardware for a job, at the same price, with the same boots, and run the same jobs
for as long. Where the other ones have more to lose than is written here, they are given the benefit.
"""

from __future__ import annotations

import math
import random
from typing import Any

from fleet_replay import Replay, SimulatedPod
from fleet_trace import TraceJob

from openweights_prefect.provisioning.hardware import usable_vram_gb
from openweights_prefect.provisioning.placement import Pod, WaitingRun, place
from openweights_prefect.settings import Settings
from openweights_prefect.worker.purchases import CHEAP_PER_HOUR


class Ours:
    """`placement.place` itself on rows like the ledger's, and the settings' own limits.

    Not simulated: refusals of the provider, and deadlines, which no pod reaches.
    """

    name = "ours"
    slug = "ours"

    def __init__(self, settings: Settings) -> None:
        self._idle_seconds = settings.pod_idle_seconds
        self._warm_price_factor = settings.warm_price_factor
        self._deadline_seconds = 3600 * settings.pod_ttl_hours

    def decide(self, replay: Replay) -> None:
        """What a pass of the worker does, and what an idle pod does for itself."""
        self._end_idle(replay)
        plan = place(
            [
                WaitingRun.from_row(
                    {
                        **_run_row(job, replay.now),
                        "ceiling_per_hour": max(
                            CHEAP_PER_HOUR, self._warm_price_factor * job.offer.price_per_hour
                        ),
                    }
                )
                for job in _by_fair_share(replay)
            ],
            [Pod.from_row(_pod_row(pod, replay.now)) for pod in replay.pods],
            fitting=_fitting(replay),
            being_bought=0,
            max_workers=replay.max_pods,
        )
        jobs = {_run_id(job): job for job in replay.queue}
        pods = {pod.id: pod for pod in replay.pods}
        for run_id, worker_id in plan.hints.items():
            replay.start(pods[worker_id], jobs[run_id], after=_OUR_DISPATCH_SECONDS)
        for run in plan.purchases:
            replay.buy(jobs[str(run.run_id)])
        for worker_id in plan.retire:
            replay.end(pods[worker_id])
        if plan.retire:
            replay.look_at(replay.now + _OUR_PASS_SECONDS)  # what has room now is bought in the next pass
        for pod in replay.of_status("active"):
            replay.look_at(pod.idle_since + self._idle_seconds)

    def _end_idle(self, replay: Replay) -> None:
        for pod in replay.pods:
            assert replay.now - pod.bought_at < self._deadline_seconds, f"{pod.id} reached its deadline"
        for pod in replay.of_status("active"):
            if replay.now >= pod.idle_since + self._idle_seconds:
                replay.end(pod)


class OpenWeights:
    """OpenWeights 0.14: a pod per pending job with 300 s idle.

    Its manager looks every 15 s and buys one pod for each pending job, less the pods that are starting; it
    does not look at idle pods. Pods look for a job every 5 s, take one whose model they have run before, else
    any. A pod ends when it is older than 600 s and has been without a run for 300 s. In its favour: creating
    pods takes its manager no time, and pods that boot for longer than its 600 s are not killed.
    """

    name = "a pod per pending job, 300 s idle (OpenWeights)"
    slug = "pod_per_pending_job"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"openweights {seed}")

    def decide(self, replay: Replay) -> None:
        """The polls of the manager and of idle pods that fall on this moment."""
        for pod in replay.of_status("active"):
            if _is_due(replay.now - pod.ready_at, 5.0):
                self._take(replay, pod)
        if _is_due(replay.now, 15.0):
            self._buy(replay)
            for pod in replay.of_status("active"):
                if replay.now - pod.bought_at > 600 and replay.now - pod.idle_since > 300:
                    replay.end(pod)
        if replay.queue or replay.pods:
            replay.look_at(_next_due(replay.now, 15.0))
        if replay.queue:
            for pod in replay.of_status("active"):
                replay.look_at(pod.ready_at + _next_due(replay.now - pod.ready_at, 5.0))

    def _take(self, replay: Replay, pod: SimulatedPod) -> None:
        fitting = [job for job in replay.queue if pod.fits(job)]
        self._rng.shuffle(fitting)
        known = [job for job in fitting if job.model.name in pod.models]
        if fitting:
            replay.start(pod, (known or fitting)[0], after=2.0)

    def _buy(self, replay: Replay) -> None:
        slots = replay.max_pods - len(replay.pods)
        wanted = min(len(replay.queue) - len(replay.of_status("starting")), slots)
        # It sorts the jobs by their memory and deals them out: the n pods are for the n largest.
        by_memory = sorted(replay.queue, key=lambda job: -job.needs.requires_vram_gb)
        for job in by_memory[: max(wanted, 0)]:
            replay.buy(job)


class PodPerJob:
    """A pod per job, as SkyPilot's managed jobs do it: a cluster of its own for each, torn down afterwards.

    Its controller sees that a job has ended when it next looks, every 15 s. In its favour: submitting takes
    its controller no time, however many come at once.
    """

    name = "a pod per job (SkyPilot managed jobs)"
    slug = "pod_per_job"
    look_seconds = 15.0

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        """Pod id -> when it is seen that its job has ended."""

    def decide(self, replay: Replay) -> None:
        """Buy what there is room for, in the order of the jobs; each pod runs one job."""
        for pod in replay.of_status("active"):
            if pod.jobs == 0:
                ends = replay.start(pod, pod.bought_for)
                seen = replay.now + _next_look(ends - replay.now, self.look_seconds)
                self._ends[pod.id] = seen
                replay.look_at(seen)
            elif replay.now >= self._ends[pod.id]:
                replay.end(pod)
        bought = {pod.bought_for.number for pod in replay.pods}
        for job in [job for job in replay.queue if job.number not in bought]:
            if len(replay.pods) < replay.max_pods:
                replay.buy(job)


class NoReuse(PodPerJob):
    """No reuse, as dstack does it on RunPod, at its best: the pod ends in the moment when its job does."""

    name = "no reuse, nothing polls (dstack on RunPod, at its best)"
    slug = "no_reuse"
    look_seconds = 0.0


_OUR_DISPATCH_SECONDS = 0.5
_OUR_PASS_SECONDS = 2.0


def _by_fair_share(replay: Replay) -> list[TraceJob]:
    """The order of `control_snapshot` among equal priorities: who has least running or ahead comes first."""
    share = {job.owner: 0 for job in replay.queue}
    for pod in replay.of_status("busy"):
        owner = pod.running.owner if pod.running else ""
        share[owner] = share.get(owner, 0) + 1
    ranked = []
    for job in replay.queue:
        ranked.append((share[job.owner], job.at, job.number, job))
        share[job.owner] += 1
    return [job for *_, job in sorted(ranked)]


def _fitting(replay: Replay) -> dict[str, frozenset[str]]:
    classes = {_needs_class(job): job for job in replay.queue}
    return {name: frozenset(pod.id for pod in replay.pods if pod.fits(job)) for name, job in classes.items()}


def _needs_class(job: TraceJob) -> str:
    return f"{job.needs.docker_image} {job.needs.requires_vram_gb}"


def _run_id(job: TraceJob) -> str:
    return f"run-{job.number}"


def _run_row(job: TraceJob, now: float) -> dict[str, Any]:
    """As `control_snapshot` shows a waiting attempt."""
    return {
        "job_id": f"job-{job.number}",
        "run_id": _run_id(job),
        "attempt": 1,
        "type": "fine_tuning",
        "model": job.model.name,
        "priority": 0,
        "owner": job.owner,
        "needs_class": _needs_class(job),
        "docker_image": job.needs.docker_image,
        "requires_vram_gb": job.needs.requires_vram_gb,
        "allowed_hardware": None,
        "max_price_per_hour": None,
        "cloud": None,
        "min_cuda": None,
        "min_vcpu": None,
        "min_ram_gb": None,
        "pending_reason": None,
        "hinted_worker_id": None,
        "hinted_seconds_ago": None,
        "waiting_seconds": now - job.at,
    }


def _pod_row(pod: SimulatedPod, now: float) -> dict[str, Any]:
    """As `control_snapshot` shows a pod."""
    return {
        "id": pod.id,
        "pod_id": f"runpod-{pod.id}",
        "status": pod.status,
        "docker_image": pod.bought_for.needs.docker_image,
        "hardware": f"{pod.offer.count}x {pod.offer.gpu_name}",
        "gpu_type": pod.offer.gpu_id,
        "gpu_count": pod.offer.count,
        "vram_gb": usable_vram_gb(pod.offer),
        "cloud": pod.offer.cloud,
        "price_per_hour": pod.offer.price_per_hour,
        "cached_models": sorted(pod.models),
        "run_id": None if pod.running is None else _run_id(pod.running),
        "bought_for": f"job-{pod.bought_for.number}",
        "shutdown_requested": False,
        "age_seconds": now - pod.bought_at,
        "overdue_seconds": -3600.0,
        "idle_seconds": now - pod.idle_since if pod.status == "active" else None,
        "silent_seconds": -60.0,
        "heartbeat_seconds": 1.0,
        "reason": None,
        "boots": 1,
        "host": None,
        "cuda": None,
        "vcpu": 8 * pod.offer.count,
        "ram_gb": 32 * pod.offer.count,
    }


def _is_due(elapsed: float, period: float) -> bool:
    return math.isclose(elapsed, period * round(elapsed / period), abs_tol=1e-6)


def _next_due(elapsed: float, period: float) -> float:
    """The first multiple of the period that is later."""
    return period * (math.floor(elapsed / period + 1e-6) + 1)


def _next_look(elapsed: float, period: float) -> float:
    """The first multiple of the period that is not earlier; with none, at once."""
    return elapsed if period == 0 else period * math.ceil(elapsed / period)
