"""`job.explain()`: why a job waits, on what it could run, when it starts and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openweights_prefect.errors import NotFoundError
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.resources.obstacles import (
    CLAIM_SECONDS,
    Facts,
    candidate_of,
    estimate_cost,
    estimate_start,
    find_obstacles,
    read_facts,
)
from openweights_prefect.types.explanation import (
    Attempt,
    Estimate,
    Explanation,
    PodView,
    span,
)
from openweights_prefect.types.hardware import Needs
from openweights_prefect.types.money import JobCost

_STATUS_WORDS = {
    "active": "idle",
    "draining": "ending",
    "lost": "ending",
    "starting": "starting",
    "busy": "busy",
}


def explain_job(ledger: Ledger, job_id: str) -> Explanation:
    """Ask the ledger once, and say what follows from it; raises `NotFoundError`."""
    rows = ledger.call("explain_job", job_id=job_id)
    if not rows:
        raise NotFoundError(
            f"No job {job_id!r} in this organization; `ow.jobs.list()` shows those that exist."
        )
    return explain(rows[0])


def explain(row: Row) -> Explanation:
    """Read an answer of `explain_job`."""
    facts = read_facts(row)
    waits = facts.job["status"] == "pending"
    pods = tuple(_pod_view(pod, facts) for pod in row["pods"])
    candidates = tuple(candidate_of(offer, row["refusals"]) for offer in facts.offers) if waits else ()
    start = estimate_start(facts)
    obstacles = find_obstacles(facts, candidates) if waits and start.value is None else ()
    attempts = tuple(map(_attempt, row["runs"]))
    return Explanation(
        job_id=facts.job["id"],
        status=facts.job["status"],
        headline=_headline(facts, attempts, start),
        position=row["position"],
        waiting_total=row["waiting_total"],
        ahead=tuple(f"{each['job_id']} ({_described(each)})" for each in row["ahead"]),
        obstacles=obstacles,
        candidates=candidates,
        pods=pods if waits else (),
        max_workers=facts.limits.get("max_workers"),
        paused=facts.paused,
        budget=facts.budget,
        start_seconds=start,
        cost_usd=estimate_cost(facts, candidates),
        cost=JobCost.from_row(row["cost"]),
        attempts=attempts,
    )


# What there is ------------------------------------------------------------------------------------


def _headline(facts: Facts, attempts: Sequence[Attempt], start: Estimate) -> str:
    job, newest = facts.job, attempts[-1] if attempts else None
    if job["status"] == "pending":
        place = "next in line" if facts.position == 1 else f"number {facts.position} in line"
        place = f"waiting, {place}"
        return f"{place}; it starts at once" if start.value == CLAIM_SECONDS else place
    where = f" on {newest.hardware}" if newest and newest.hardware else ""
    if job["status"] == "in_progress":
        lasted = f" for {span(newest.seconds)}" if newest and newest.seconds is not None else ""
        usual = f"; such jobs take {span(facts.run_seconds)} (median)" if facts.run_seconds else ""
        ending = ", asked to stop" if job["cancel_requested"] else ""
        return f"running{lasted}{where}{ending}{usual}"
    lasted = f" after {span(newest.seconds)}" if newest and newest.seconds is not None else ""
    if job["status"] == "failed":
        why = f": {job['error']}" if job["error"] else ""
        return (
            f"failed{lasted}{where}{why.rstrip('.')}. `ow logs {job['id']}` shows its log, "
            f"`ow restart {job['id']}` runs it again"
        )
    if job["status"] == "canceled":
        return f"canceled{lasted}{where}. `ow restart {job['id']}` runs it again"
    return f"completed{lasted}{where}"


def _described(ahead: Mapping[str, Any]) -> str:
    return f"{ahead['type']}, priority {ahead['priority']}" if ahead["priority"] else str(ahead["type"])


def _pod_view(pod: Mapping[str, Any], facts: Facts) -> PodView:
    fits = pod["id"] in facts.fitting
    status = "ending" if pod["shutdown_requested"] else _STATUS_WORDS.get(pod["status"], pod["status"])
    return PodView(
        id=pod["id"],
        hardware=pod["hardware"],
        price_per_hour=float(pod["price_per_hour"]),
        status=status,
        fits=fits,
        why=_why_free(status, taken=pod not in facts.usable)
        if fits
        else f"{status}; does not fit: {_misfit(pod, facts.needs)}",
    )


def _why_free(status: str, *, taken: bool) -> str:
    if status == "busy":
        return "fits, but runs another job"
    if status == "ending":
        return "fits, but is about to end"
    return f"fits and is {status}" + (", but jobs before this one will take it" if taken else "")


def _misfit(pod: Mapping[str, Any], needs: Needs) -> str:
    """The first thing that the pod lacks; the ledger has decided already that there is one."""
    price, allowed = float(pod["price_per_hour"]), needs.allowed_hardware
    if pod["docker_image"] != needs.docker_image:
        return f"it has another image ({pod['docker_image']})"
    if allowed is not None and pod["hardware"] not in allowed:
        return f"{pod['hardware']} is not in allowed_hardware"
    if allowed is None and pod["vram_gb"] < needs.requires_vram_gb:
        return f"{pod['vram_gb']} GB of GPU memory, {needs.requires_vram_gb} GB are needed"
    if needs.max_price_per_hour is not None and price > needs.max_price_per_hour:
        return f"dearer than max_price_per_hour={needs.max_price_per_hour:g}"
    if needs.cloud is not None and pod["cloud"] != needs.cloud:
        return f"it is of the {str(pod['cloud']).lower()} cloud"
    if pod["vcpu"] < needs.min_vcpu or pod["ram_gb"] < needs.min_ram_gb:
        return f"{pod['vcpu']} vCPU and {pod['ram_gb']} GB RAM are too few"
    return f"CUDA {pod['cuda'] or 'of an unknown version'}, {needs.min_cuda} is needed"


def _attempt(run: Mapping[str, Any]) -> Attempt:
    price = run["price_per_hour"]
    return Attempt(
        id=run["id"],
        number=run["attempt"],
        status=run["status"],
        pod=run["worker_id"],
        hardware=run["hardware"],
        price_per_hour=None if price is None else float(price),
        seconds=run["seconds"],
        error=run["error"] or run["pod_reason"] if run["status"] == "lost" else run["error"],
    )
