"""What keeps a job from starting, when it starts and what it costs: pure functions of the ledger's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from openweights_prefect.ledger.protocol import Row
from openweights_prefect.provisioning.hardware import catalogue_offers, choose_offers, explain_no_offer
from openweights_prefect.provisioning.provider import Offer
from openweights_prefect.types.explanation import Candidate, Estimate, Obstacle, span, usd
from openweights_prefect.types.hardware import Needs
from openweights_prefect.types.money import Budget

CLAIM_SECONDS = 5.0
"""For so long an idle pod may need to take a job."""

_STALE_SECONDS = 300.0
_ACCOUNT = "account"


class Facts(NamedTuple):
    """What the ledger answered, read."""

    job: Mapping[str, Any]
    needs: Needs
    offers: Sequence[Offer]
    """Those that would do."""
    sold: Sequence[Offer]
    """All that are sold."""
    catalogue_age_seconds: float | None
    """None: no worker has told what is sold."""
    limits: Mapping[str, Any]
    paused: str | None
    refusals: Mapping[str, Mapping[str, Any]]
    pods: Sequence[Mapping[str, Any]]
    usable: Sequence[Mapping[str, Any]]
    """Fitting pods that are idle or starting, the soonest first; those that jobs before it take are out."""
    fitting: frozenset[str]
    budget: Budget
    boot_seconds: float | None
    run_seconds: float | None
    position: int | None
    handed_over: bool
    """A pod may take it, whether a worker is there or not."""


def read_facts(row: Row) -> Facts:
    """Read an answer of `explain_job`."""
    catalogue = row["catalogue"]
    sold = catalogue_offers() if catalogue is None else [_offer(each) for each in catalogue["offers"]]
    limits = {} if catalogue is None else catalogue["limits"]
    refused = row["refusals"].get(_ACCOUNT)
    needs = Needs.from_row(row["job"])
    fitting = frozenset(row["fitting"])
    coming = [
        pod for pod in row["pods"]
        if pod["id"] in fitting and pod["status"] in ("active", "starting") and not pod["shutdown_requested"]
    ]  # fmt: skip
    coming.sort(key=lambda pod: (pod["status"] == "starting", -pod["age_seconds"]))
    return Facts(
        job=row["job"],
        needs=needs,
        offers=choose_offers(sold, needs),
        sold=sold,
        catalogue_age_seconds=None if catalogue is None else catalogue["age_seconds"],
        limits=limits,
        paused=refused["reason"] if refused and refused["seconds_left"] > 0 else limits.get("paused"),
        refusals=row["refusals"],
        pods=row["pods"],
        usable=coming[row["ahead_for_same_pods"] or 0 :],
        fitting=fitting,
        budget=Budget.from_row(row["budget"]),
        boot_seconds=row["boot_seconds"],
        run_seconds=row["run_seconds"],
        position=row["position"],
        handed_over=any(run["attempt"] == row["job"]["attempt"] for run in row["runs"]),
    )


# What is in the way -------------------------------------------------------------------------------


def find_obstacles(facts: Facts, candidates: Sequence[Candidate]) -> tuple[Obstacle, ...]:
    """Nothing that is up will take it: what keeps another pod from being bought, the hardest first."""
    checks = (
        _worker_obstacle(facts),
        _hardware_obstacle(facts),
        _pause_obstacle(facts),
        _budget_obstacle(facts),
        _limit_obstacle(facts),
        _refusal_obstacle(candidates) if facts.paused is None else None,
    )
    found = tuple(each for each in checks if each is not None)
    said = facts.job["pending_reason"]
    if found or not said:
        return found
    return (
        Obstacle(
            what=f"The worker says: {said}", mend="It tries again by itself; `ow doctor` checks the rest."
        ),
    )


def _worker_obstacle(facts: Facts) -> Obstacle | None:
    age = facts.catalogue_age_seconds
    if age is not None and age <= _STALE_SECONDS:
        return None
    heard = "No worker has reported yet" if age is None else f"No worker has reported for {span(age)}"
    return Obstacle(
        what=f"{heard}, and nothing starts without one.",
        mend="Start it with `ow worker`, or with `ow up` on this machine; `ow doctor` says what keeps it "
        "from running.",
    )


def _hardware_obstacle(facts: Facts) -> Obstacle | None:
    if facts.offers:
        return None
    why, _, mend = explain_no_offer(facts.sold, facts.needs).partition(". ")
    return Obstacle(what=f"{why.rstrip('.')}.", mend=mend or "Submit it with other needs, or wait.")


def _pause_obstacle(facts: Facts) -> Obstacle | None:
    if facts.paused is None:
        return None
    refused = facts.refusals.get(_ACCOUNT)
    again = f" in {span(refused['seconds_left'])}" if refused and refused["seconds_left"] > 0 else " soon"
    return Obstacle(
        what=f"Nothing can be bought at present: {facts.paused}",
        mend=f"Set that right at the provider; it is tried again{again}, without you.",
    )


def _budget_obstacle(facts: Facts) -> Obstacle | None:
    """A pod is bought only if the budget bears it until its deadline."""
    hours, left = facts.limits.get("pod_ttl_hours"), facts.budget.remaining_usd
    if left is None or hours is None or not facts.offers:
        return None
    most = min(offer.price_per_hour for offer in facts.offers) * hours
    if most <= left:
        return None
    return Obstacle(
        what=f"The budget has {usd(left)} left for new pods, and the cheapest that would do may cost up to "
        f"{usd(most)} in its {hours:g} hours.",
        mend="An admin raises the budget with `ow costs budget USD`; pods that end give back what they did "
        "not use.",
    )


def _limit_obstacle(facts: Facts) -> Obstacle | None:
    most = facts.limits.get("max_workers")
    if most is None:
        return None
    if len(facts.pods) >= most:
        used = f"All {most} pods" if most != 1 else "The one pod"
        return Obstacle(
            what=f"{used} that the organization may have {'are' if most != 1 else 'is'} in use.",
            mend="Wait for one, end one with `ow pod terminate POD`, or start the worker with a larger "
            "OW_MAX_WORKERS.",
        )
    before = (facts.position or 1) - 1
    free = most - len(facts.pods) + sum(pod["status"] in ("active", "starting") for pod in facts.pods)
    if before < free:
        return None
    return Obstacle(
        what=f"{before} jobs are served before it, and only {free} more pods are free or may be bought.",
        mend="Wait for them, cancel some, or start the worker with a larger OW_MAX_WORKERS.",
    )


def _refusal_obstacle(candidates: Sequence[Candidate]) -> Obstacle | None:
    waits = [each.retry_seconds for each in candidates]
    if not candidates or any(seconds is None for seconds in waits):
        return None
    soonest = min(seconds for seconds in waits if seconds is not None)
    return Obstacle(
        what=f"The provider refused all {len(candidates)} offers that would do when it was asked last.",
        mend=f"The next try is in {span(soonest)}. More hardware in `allowed_hardware`, or a higher "
        "`max_price_per_hour`, gives it more to choose from.",
    )


# Estimates ----------------------------------------------------------------------------------------


def estimate_start(facts: Facts) -> Estimate:
    """When it starts, by what is up; else by how long the last pods took to come up."""
    if facts.job["status"] != "pending":
        return Estimate(value=None, basis=f"it is {facts.job['status']}")
    if facts.usable and (facts.handed_over or _worker_obstacle(facts) is None):
        pod = facts.usable[0]
        if pod["status"] == "active":
            return Estimate(value=CLAIM_SECONDS, basis=f"pod {pod['id']} is idle and fits")
        if facts.boot_seconds is None:
            return Estimate(value=None, basis=f"pod {pod['id']} is starting, and no pod came up here before")
        return Estimate(
            value=max(CLAIM_SECONDS, facts.boot_seconds - pod["age_seconds"]),
            basis=f"pod {pod['id']} has been starting for {span(pod['age_seconds'])}; the last ones took "
            f"{span(facts.boot_seconds)}",
        )
    if find_obstacles(facts, [candidate_of(offer, facts.refusals) for offer in facts.offers]):
        return Estimate(value=None, basis="it depends on what is in the way")
    if facts.boot_seconds is None:
        return Estimate(value=None, basis="it needs a new pod, and none came up here before")
    return Estimate(
        value=facts.boot_seconds,
        basis=f"on a new pod; the last ones took {span(facts.boot_seconds)} to come up",
    )


def estimate_cost(facts: Facts, candidates: Sequence[Candidate]) -> Estimate:
    """What one run costs, without the rest of its pod's life."""
    free = next((each for each in candidates if each.retry_seconds is None), None)
    if facts.usable:
        price, on = float(facts.usable[0]["price_per_hour"]), facts.usable[0]["hardware"]
    elif chosen := free or next(iter(candidates), None):
        price, on = chosen.price_per_hour, chosen.hardware
    else:
        return Estimate(value=None, basis="no hardware is in sight for it")
    if facts.run_seconds is None:
        return Estimate(
            value=None,
            basis=f"no {facts.job['type']} job was completed here; {on} costs {usd(price)} an hour",
        )
    return Estimate(
        value=price * facts.run_seconds / 3600,
        basis=f"completed {facts.job['type']} jobs ran {span(facts.run_seconds)} (median), and {on} costs "
        f"{usd(price)} an hour",
    )


def _offer(row: Mapping[str, Any]) -> Offer:
    return Offer(
        gpu_id=row["gpu_id"],
        gpu_name=row["gpu_name"],
        count=row["count"],
        cloud=row["cloud"],
        price_per_hour=float(row["price_per_hour"]),
        memory_gb=row["memory_gb"],
        availability=row["availability"],
    )


def candidate_of(offer: Offer, refusals: Mapping[str, Mapping[str, Any]]) -> Candidate:
    """An offer, with what the provider said of it last."""
    refusal = refusals.get(offer.key)
    left = refusal["seconds_left"] if refusal else 0
    return Candidate(
        hardware=f"{offer.count}x {offer.gpu_name}",
        cloud=offer.cloud,
        price_per_hour=offer.price_per_hour,
        availability=offer.availability,
        refused=refusal["reason"].rstrip(".") if refusal else None,
        refused_seconds_ago=refusal["seconds_ago"] if refusal else None,
        retry_seconds=left if left > 0 else None,
    )
