"""What is to happen to a pod, seen from the ledger and from the provider at once: pure functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from openweights_prefect.errors import ProviderError
from openweights_prefect.provisioning.placement import Pod
from openweights_prefect.provisioning.provider import HostUnusable, ImageError, ProviderPod

GONE = ("TERMINATED",)
DEAD = ("EXITED", "ERROR", *GONE)

_OVERDUE_SECONDS = 60.0
_UNBORN_SECONDS = 90.0
_STRIKES = 2
_MOST_STARTS = 3
_UNUSABLE = "unusable host"

Blame = Literal["nobody", "machine", "image", "offer"]


@dataclass(frozen=True)
class Verdict:
    """Why a pod is to end."""

    why: str
    blame: Blame = "nobody"
    """Whom to avoid from now on."""
    counts: bool = True
    """As a pod lost, against the job that it was bought for."""


@dataclass(frozen=True)
class Limits:
    """Seconds that a pod may take."""

    first_log_seconds: float
    boot_seconds: float
    heard_seconds: float = 0.0
    """A pod that sent a heartbeat so recently is alive, whatever the provider lists."""


def counterpart(
    pod: Pod, name: str, listed: Sequence[ProviderPod]
) -> tuple[ProviderPod | None, list[ProviderPod]]:
    """The provider's side of a pod, and others of the same name, which one create made too many."""
    named = [each for each in listed if each.name == name]
    alive = [each for each in named if each.status not in GONE]
    if pod.pod_id is not None:
        held = next((each for each in named if each.id == pod.pod_id), None)
    else:
        held = min(alive, key=lambda each: each.id, default=None)
    return held, [each for each in alive if each.id != held.id] if held is not None else []


def is_missing_for_good(pod: Pod, strikes: int, limits: Limits) -> bool:
    """True when so many complete lists in a row without it say that it is gone, or was never created."""
    if pod.status in ("active", "busy") and (pod.heartbeat_seconds or 0.0) < limits.heard_seconds:
        return False
    if (pod.pod_id is None or pod.status == "starting") and pod.age_seconds < _UNBORN_SECONDS:
        return False  # A pod may show up in lists, and to a question, a while after it was created.
    return strikes >= _STRIKES


def judge(pod: Pod, held: ProviderPod, limits: Limits, refused_hosts: Collection[str]) -> Verdict | None:
    """Why a pod that the provider lists is to end, by what the two sides say of it; None: it goes on."""
    if held.status in DEAD:
        return Verdict(f"RunPod says {held.status}")
    if pod.status in ("draining", "lost"):
        unusable = pod.reason is not None and pod.reason.startswith(_UNUSABLE)
        return Verdict(pod.reason or pod.status, blame="machine" if unusable else "nobody")
    if pod.overdue_seconds > _OVERDUE_SECONDS:
        return Verdict("past its deadline")
    if pod.status != "starting":
        return None
    if pod.shutdown_requested:
        return Verdict("told to end before it had begun", counts=False)
    if held.host is not None and held.host in refused_hosts:
        return Verdict(f"host {held.host} was unusable before", blame="offer", counts=False)
    if pod.age_seconds > limits.boot_seconds:
        return Verdict(f"no sign of life {limits.boot_seconds:g} s after it was bought", blame="machine")
    return None


def judge_log(
    pod: Pod, lines: Sequence[str], diagnosis: ProviderError | None, limits: Limits
) -> Verdict | None:
    """Why a starting pod is to end, by what its machine logged; None: wait."""
    if isinstance(diagnosis, ImageError):
        return Verdict(str(diagnosis), blame="image")
    if isinstance(diagnosis, HostUnusable):
        return Verdict(f"{_UNUSABLE}: {diagnosis}", blame="machine")
    if not lines and pod.age_seconds > limits.first_log_seconds:
        return Verdict(f"no machine {limits.first_log_seconds:g} s after it was bought")
    starts = sum("start container" in line for line in lines)
    if starts > _MOST_STARTS:
        return Verdict(f"its container ended {starts - 1} times before the agent reported")
    return None
