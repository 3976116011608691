"""What pods cost: charges by the second, in decimals, and the billing endpoint over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any, Literal, NamedTuple

SECONDS_PER_HOUR = 3600
DISK_PER_GB_HOUR = Decimal("0.10") / 720
"""USD of a container disk; RunPod's month has 720 hours."""

Kind = Literal["gpu", "disk"]
_BUCKETS = ("hour", "day", "week", "month", "year")
_MICRO = Decimal("0.000001")


@dataclass
class Charge:
    """A rate of USD an hour over a time; open while `end` is None."""

    kind: Kind
    rate: str
    start: float
    end: float | None = None

    def amount(self, now: float) -> Decimal:
        """USD until now."""
        return self.between(self.start, now)

    def between(self, start: float, end: float) -> Decimal:
        """USD that fall between two moments."""
        last = end if self.end is None else min(self.end, end)
        seconds = Decimal(str(max(0.0, last - max(self.start, start))))
        return Decimal(self.rate) * seconds / SECONDS_PER_HOUR


class Query(NamedTuple):
    """A question to the billing endpoint."""

    pod_id: str | None
    start: float
    end: float
    bucket: str


def total(charges: Iterable[Charge], now: float) -> Decimal:
    """USD of all charges until now."""
    return sum((charge.amount(now) for charge in charges), Decimal(0))


def close(charges: Iterable[Charge], now: float) -> None:
    """End what is open."""
    for charge in charges:
        if charge.end is None:
            charge.end = now


def parse_query(parameters: Mapping[str, str], now: float) -> Query:
    """Read the parameters of `GET /v2/billing/pods`; raises `ValueError` for those that contradict."""
    bucket = parameters.get("bucketSize", "day")
    if bucket not in _BUCKETS:
        raise ValueError(f"$.bucketSize: value must be one of {', '.join(map(repr, _BUCKETS))}")
    has_range = "startTime" in parameters or "endTime" in parameters
    if has_range and "lastN" in parameters:
        raise ValueError("lastN and startTime/endTime are mutually exclusive")
    end = _moment(parameters.get("endTime"), now)
    last = int(parameters.get("lastN", 30))
    start = _moment(parameters.get("startTime"), _back(end, bucket, last - 1).timestamp())
    return Query(parameters.get("podId"), start, end, bucket)


def billing_body(bills: Mapping[str, list[Charge]], query: Query) -> dict[str, Any]:
    """The answer of `GET /v2/billing/pods`."""
    records: list[dict[str, Any]] = []
    totals = {"gpu": Decimal(0), "disk": Decimal(0)}
    for pod_id, charges in bills.items():
        if query.pod_id not in (None, pod_id):
            continue
        before = {"gpu": Decimal(0), "disk": Decimal(0)}
        for start, end in _buckets(query):
            sums = {kind: _micro(_sum(charges, kind, query.start, end)) for kind in before}
            amounts = {kind: sums[kind] - before[kind] for kind in before}
            before = sums
            if any(amounts.values()):
                records.append(_record(pod_id, start, end, amounts))
        totals = {kind: totals[kind] + before[kind] for kind in totals}
    pods = {record["podId"] for record in records}
    metadata = {
        "query": {"startTime": _iso(query.start), "endTime": _iso(query.end), "bucketSize": query.bucket},
        "recordCount": len(records),
        "uniquePodCount": len(pods),
        "totals": _amounts(totals),
    }
    return {"records": records, "metadata": metadata}


def _sum(charges: list[Charge], kind: str, start: float, end: float) -> Decimal:
    return sum((c.between(start, end) for c in charges if c.kind == kind), Decimal(0))


def _record(pod_id: str, start: float, end: float, amounts: dict[str, Decimal]) -> dict[str, Any]:
    return {"startTime": _iso(start), "endTime": _iso(end), "podId": pod_id, **_amounts(amounts)}


def _amounts(amounts: dict[str, Decimal]) -> dict[str, float]:
    return {
        "totalAmount": float(sum(amounts.values(), Decimal(0))),
        "gpuAmount": float(amounts["gpu"]),
        "cpuAmount": 0.0,
        "diskAmount": float(amounts["disk"]),
    }


def _buckets(query: Query) -> Iterator[tuple[float, float]]:
    start = _floor(datetime.fromtimestamp(query.start, UTC), query.bucket)
    while start.timestamp() < query.end:
        following = _next(start, query.bucket)
        yield max(start.timestamp(), query.start), min(following.timestamp(), query.end)
        start = following


def _floor(moment: datetime, bucket: str) -> datetime:
    hour = moment.replace(minute=0, second=0, microsecond=0)
    if bucket == "hour":
        return hour
    day = hour.replace(hour=0)
    match bucket:
        case "week":
            return day - timedelta(days=day.weekday())
        case "month":
            return day.replace(day=1)
        case "year":
            return day.replace(day=1, month=1)
    return day


def _next(start: datetime, bucket: str) -> datetime:
    match bucket:
        case "hour":
            return start + timedelta(hours=1)
        case "month":
            return _floor(start + timedelta(days=32), bucket)
        case "year":
            return start.replace(year=start.year + 1)
    return start + timedelta(days=7 if bucket == "week" else 1)


def _back(end: float, bucket: str, number: int) -> datetime:
    moment = _floor(datetime.fromtimestamp(end, UTC), bucket)
    for _ in range(number):
        moment = _floor(moment - timedelta(seconds=1), bucket)
    return moment


def _moment(text: str | None, default: float) -> float:
    return default if text is None else datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _micro(amount: Decimal) -> Decimal:
    return amount.quantize(_MICRO, rounding=ROUND_HALF_EVEN)


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
