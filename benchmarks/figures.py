"""The figures of a benchmark against its goals and aims, as a table and as one line of JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

Figure = float | int | str | bool
Figures = Mapping[str, Figure]


class Limit(NamedTuple):
    """What a figure should be."""

    figure: str
    side: Literal["at_least", "at_most"]
    value: float

    def is_met(self, figures: Figures) -> bool:
        """Whether the figure is on the right side, the limit itself included."""
        figure = float(figures[self.figure])
        return figure >= self.value if self.side == "at_least" else figure <= self.value


class Row(NamedTuple):
    """One line of the table."""

    what: str
    ours: str
    peer: str = ""
    ratio: str = ""


def p50(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(values)


def p90(values: Sequence[float]) -> float:
    """The value that nine of ten do not exceed, interpolated."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; the first one to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(Row._fields))]
    lines = []
    for what, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([what.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def verdicts(limits: Iterable[Limit], figures: Figures, *, word: str) -> str:
    """One sentence a limit: met, or missed and by how much."""
    lines = []
    for limit in limits:
        sign = ">=" if limit.side == "at_least" else "<="
        verdict = "met" if limit.is_met(figures) else "MISSED"
        lines.append(f"{word} {limit.figure} {sign} {limit.value:g}: {verdict} ({figures[limit.figure]})")
    return "\n".join(lines)


def document(bench: str, figures: Figures, *, goals: Sequence[Limit], aims: Sequence[Limit]) -> str:
    """The result in one line; `ok` when every goal is met, whatever becomes of the aims."""
    return json.dumps(
        {
            "bench": bench,
            "figures": dict(figures),
            "goals": _judged(goals, figures),
            "aims": _judged(aims, figures),
            "ok": all_met(goals, figures),
        }
    )


def all_met(limits: Iterable[Limit], figures: Figures) -> bool:
    """Whether every figure is on the right side of its limit."""
    return all(limit.is_met(figures) for limit in limits)


def _judged(limits: Iterable[Limit], figures: Figures) -> dict[str, dict[str, float | bool]]:
    return {limit.figure: {limit.side: limit.value, "met": limit.is_met(figures)} for limit in limits}
