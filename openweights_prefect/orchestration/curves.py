"""Draws how figures went over the steps of a run, as plain text: Prefect's pages show no pictures of ours.

Everything comes from a job: only numbers get into the drawing, and its size is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 64
HEIGHT = 14
_MAX_POINTS = 4096
_LARGEST = 1e30
_LABEL = 10
_MARKS = "*ox+#@"


class Curve:
    """The values of one figure by step, thinned out when they become many."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self.count = 0
        self.odd = 0
        """How many values were not finite."""
        self._stride = 1
        self._last: tuple[float, float] | None = None

    def add(self, step: Any, value: Any) -> None:
        """Take a value as an event holds it; what is no number is left out, NaN and infinity are counted."""
        place, height = finite(step), finite(value)
        if place is None:
            return
        if height is None:
            self.odd += isinstance(value, Mapping) and value.keys() == {"$float"}
            return
        self._last = (place, height)
        if self.count % self._stride == 0:
            self.points.append(self._last)
        self.count += 1
        if len(self.points) > _MAX_POINTS:
            self.points, self._stride = self.points[::2], self._stride * 2

    def all(self) -> list[tuple[float, float]]:
        """The points that were kept, and the last one."""
        if self._last is None or self._last == self.points[-1]:
            return self.points
        return [*self.points, self._last]


def finite(value: Any) -> float | None:
    """A number that can be calculated with."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST < value < _LARGEST:
        return None
    return float(value)


def plot(curves: Mapping[str, Curve]) -> list[str]:
    """Lines of text with one mark a curve; none without two points. Names are the caller's own."""
    shown = [(name, curve.all()) for name, curve in curves.items() if curve.count or curve.odd]
    points = [point for _, found in shown for point in found]
    if len(points) < 2:
        return []
    left, right = min(step for step, _ in points), max(step for step, _ in points)
    drawn = [_columns(found, left, right) for _, found in shown]
    heights = [value for columns in drawn for value in columns.values()]
    low, high = min(heights), max(heights)
    canvas = [[" "] * WIDTH for _ in range(HEIGHT)]
    for columns, mark in zip(drawn, _MARKS, strict=False):
        for column, value in columns.items():
            canvas[HEIGHT - 1 - _place(value, low, high, HEIGHT)][column] = mark
    labels = {0: f"{high:.4g}", HEIGHT - 1: f"{low:.4g}"}
    lines = [f"{labels.get(row, ''):>{_LABEL}} |{''.join(line).rstrip()}" for row, line in enumerate(canvas)]
    lines.append(" " * _LABEL + " +" + "-" * WIDTH)
    first, last = f"{left:.6g}", f"{right:.6g}"
    lines.append(" " * (_LABEL + 2) + first + last.rjust(WIDTH - len(first)))
    return [*lines, *_legend(shown, curves)]


def _legend(shown: Sequence[tuple[str, list[tuple[float, float]]]], curves: Mapping[str, Curve]) -> list[str]:
    lines = []
    for (name, found), mark in zip(shown, _MARKS, strict=False):
        values = [value for _, value in found]
        odd = f", {curves[name].odd} not finite" if curves[name].odd else ""
        figures = (
            f"first {values[0]:.4g}, last {values[-1]:.4g}, least {min(values):.4g}" if values else "none"
        )
        lines.append(f"{mark} {name}: {figures}{odd}")
    return lines


def _columns(points: Sequence[tuple[float, float]], left: float, right: float) -> dict[int, float]:
    """The mean of the values in each column that has some."""
    found: dict[int, list[float]] = {}
    for step, value in points:
        found.setdefault(_place(step, left, right, WIDTH), []).append(value)
    return {column: math.fsum(values) / len(values) for column, values in found.items()}


def _place(value: float, low: float, high: float, size: int) -> int:
    share = (value - low) / (high - low) if high > low else 0.0
    return min(size - 1, max(0, round(share * (size - 1))))
