"""Why a job waits, or what became of it, for people: `print(job.explain())`."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from openweights_prefect.types.money import Budget, JobCost

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Hardware that would do, as it is sold now."""

    hardware: str
    """Such as `2x A100`."""
    cloud: str
    price_per_hour: float
    """USD for the whole pod."""
    availability: str
    """The provider's own word for its stock: `NONE`, `LOW`, `MEDIUM` or `HIGH`."""
    refused: str | None = None
    """Why the provider did not give it when it was asked last; None if it was not asked, or gave it."""
    refused_seconds_ago: float | None = None
    retry_seconds: float | None = None
    """It is asked again after that long; None: it may be asked at once."""


@dataclass(frozen=True, kw_only=True)
class PodView:
    """A pod that is up, as the job sees it."""

    id: str
    hardware: str
    price_per_hour: float
    status: str
    fits: bool
    why: str
    """Why it can take the job now, or cannot."""


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """Something that keeps the job from starting."""

    what: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run of the job."""

    id: str
    number: int
    status: str
    pod: str | None
    hardware: str | None
    price_per_hour: float | None
    seconds: float | None
    """How long it has run, or ran."""
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with what it is based on; None where nothing is known."""

    value: float | None
    basis: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation:
    """Everything that decides when a job starts and what it costs; as text, `str()` of it."""

    job_id: str
    status: str
    headline: str
    position: int | None
    """Its place among those that wait, from 1; None when it does not wait."""
    waiting_total: int
    ahead: tuple[str, ...]
    """Jobs that are served before it, the nearest first, at most five."""
    obstacles: tuple[Obstacle, ...]
    candidates: tuple[Candidate, ...]
    """In the order in which they are tried."""
    pods: tuple[PodView, ...]
    max_workers: int | None
    """Most pods at once; None while no worker has told it."""
    paused: str | None
    """Why nothing is bought at present."""
    budget: Budget
    start_seconds: Estimate
    """Until it starts."""
    cost_usd: Estimate
    """What one run of it costs."""
    cost: JobCost
    """What it has cost until now."""
    attempts: tuple[Attempt, ...]
    """The last five, newest last."""

    def __str__(self) -> str:
        return _plain("\n".join(_lines(self)))

    def __repr__(self) -> str:
        return f"Explanation(job_id={self.job_id!r}, status={self.status!r}, headline={self.headline!r})"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows for it as the last line of a cell."""
        printer.text(str(self))


def _plain(text: str) -> str:
    """Without control characters: some of it was written by strangers, and it goes to terminals."""
    return "".join(char if char == "\n" or char.isprintable() else "?" for char in text)


def span(seconds: float) -> str:
    """A length of time as one says it: `40 s`, `12 min`, `2 h 5 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(whole / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def usd(amount: float) -> str:
    """An amount of money; small ones keep two digits that count."""
    return (
        f"${amount:.2f}"
        if amount == 0 or amount >= 0.1
        else f"${amount:.2g}"
        if amount >= 0.0001
        else "<$0.0001"
    )


def _lines(told: Explanation) -> Iterator[str]:
    yield f"{told.job_id}: {told.headline}"
    for title, lines in (
        ("In the way", _obstacles(told)),
        ("Estimate", _estimates(told)),
        ("Served before it", _ahead(told)),
        ("Hardware that would do, in the order in which it is tried", _candidates(told)),
        (_pods_title(told), _pods(told)),
        ("Runs", _attempts(told)),
        ("Money", _money(told)),
    ):
        if lines:
            yield ""
            yield title
            yield from (f"  {line}" for line in lines)


def _obstacles(told: Explanation) -> list[str]:
    return [line for each in told.obstacles for line in (f"- {each.what}", f"  {each.mend}")]


def _estimates(told: Explanation) -> list[str]:
    if told.status != "pending":
        return []
    start, cost = told.start_seconds, told.cost_usd
    begins = (
        "unknown"
        if start.value is None
        else f"in about {span(start.value)}"
        if start.value > 5
        else "at once"
    )
    costs = "unknown" if cost.value is None else f"about {usd(cost.value)}"
    return [f"start  {begins}: {start.basis}", f"cost   {costs}: {cost.basis}"]


def _ahead(told: Explanation) -> list[str]:
    more = (told.position or 1) - 1 - len(told.ahead)
    return [*told.ahead, f"and {more} more"] if more > 0 else list(told.ahead)


def _candidates(told: Explanation) -> list[str]:
    if told.start_seconds.value is not None and told.start_seconds.value <= 5:
        return []  # It needs none of them.
    stock = {
        "NONE": "none left",
        "LOW": "few left",
        "MEDIUM": "some left",
        "HIGH": "many left",
    }
    rows = []
    for each in told.candidates[:_SHOWN]:
        note = stock.get(each.availability, each.availability)
        if each.refused is not None:
            ago = f" {span(each.refused_seconds_ago)} ago" if each.refused_seconds_ago is not None else ""
            again = (
                f"asked again in {span(each.retry_seconds)}"
                if each.retry_seconds
                else "may be asked again now"
            )
            note += f"; refused{ago} ({_first_line(each.refused)}), {again}"
        rows.append((each.hardware, each.cloud.lower(), f"{usd(each.price_per_hour)}/h", note))
    more = len(told.candidates) - _SHOWN
    return [*_aligned(rows), *([f"and {more} more"] if more > 0 else [])]


def _pods_title(told: Explanation) -> str:
    limit = "" if told.max_workers is None else f" of at most {told.max_workers}"
    return f"Pods that are up ({len(told.pods)}{limit})"


def _pods(told: Explanation) -> list[str]:
    return _aligned(
        [(each.id, each.hardware, f"{usd(each.price_per_hour)}/h", each.why) for each in told.pods]
    )


def _attempts(told: Explanation) -> list[str]:
    rows = []
    for each in told.attempts:
        if each.status == "pending":
            continue
        where = "" if each.pod is None else f"on {each.pod}"
        machine = "" if each.hardware is None else f"{each.hardware}, {usd(each.price_per_hour or 0)}/h"
        lasted = "" if each.seconds is None else span(each.seconds)
        rows.append((f"{each.number}.", each.status, lasted, where, machine, _first_line(each.error)))
    return _aligned(rows)


def _money(told: Explanation) -> list[str]:
    lines = []
    if told.cost.total_usd:
        lines.append(
            f"{usd(told.cost.total_usd)} for this job until now: {usd(told.cost.direct_usd)} while it ran, "
            f"{usd(told.cost.overhead_usd)} as its share of its pods' booting, waiting and ending"
        )
    if told.cost.saved_usd:
        lines.append(f"{usd(told.cost.saved_usd)} saved, because it found a pod that was up already")
    if told.budget.limit_usd is not None and told.status == "pending":
        lines.append(
            f"{usd(told.budget.spent_usd)} of the organization's {usd(told.budget.limit_usd)} spent, "
            f"{usd(told.budget.remaining_usd or 0)} left for new pods"
        )
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True) if width).rstrip()
        for row in rows
    ]


def _first_line(text: str | None) -> str:
    return text.strip().partition("\n")[0][:200] if text else ""
