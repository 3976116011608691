"""What pods cost, as the ledger sums it up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

CostGroup = Literal[
    "job",
    "worker",  # a pod
    "token",  # what asked for the run
    "user",  # who made that token, or submitted the job
    "day",  # in UTC
]
COST_GROUPS: tuple[CostGroup, ...] = get_args(CostGroup)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an organization may spend, in USD."""

    limit_usd: float | None
    """None: as much as it likes."""
    spent_usd: float
    """By all pods until now."""
    reserved_usd: float
    """What the live pods may cost until their deadlines, with what they have cost already."""
    remaining_usd: float | None
    """What new pods may still reserve; None without a limit."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Budget:
        """Read the answer of `get_budget`."""
        most, rest = row["limit_usd"], row["remaining_usd"]
        return cls(
            limit_usd=None if most is None else float(most),
            spent_usd=float(row["spent_usd"]),
            reserved_usd=float(row["reserved_usd"]),
            remaining_usd=None if rest is None else float(rest),
        )


@dataclass(frozen=True, kw_only=True)
class JobCost:
    """What a job has cost until now, in USD."""

    direct_usd: float
    """While it ran."""
    overhead_usd: float
    """Its share of what its pods did besides: booting, waiting, ending."""
    total_usd: float
    saved_usd: float
    """The boots that it did not need, because a pod was there."""
    run_seconds: float

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> JobCost:
        """Read the answer of `job_cost`."""
        names = ("direct_usd", "overhead_usd", "total_usd", "saved_usd", "run_seconds")
        return cls(**{name: float(row[name]) for name in names})
