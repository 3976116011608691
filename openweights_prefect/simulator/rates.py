"""The request limit of an account, and the headers that tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_SECONDS = {"minute": 60, "hour": 3600, "day": 86400}


@dataclass(frozen=True)
class Verdict:
    """What one request cost and left."""

    exceeded: str | None
    """The window that is used up."""
    retry_after_seconds: int
    headers: dict[str, str]


class RateLimit:
    """Fixed windows, each beginning with its first request."""

    def __init__(self, limits: Mapping[str, int], *, others_per_minute: int = 0) -> None:
        self._limits = {window: quota for window, quota in limits.items() if window in _SECONDS}
        self._started: dict[str, float] = {}
        self._used: dict[str, int] = {}
        self._others_per_minute = others_per_minute

    def count(self, now: float) -> Verdict:
        """Count one request; a refused one is not counted."""
        for window in self._limits:
            if now - self._started.get(window, float("-inf")) >= _SECONDS[window]:
                others = self._others_per_minute * _SECONDS[window] // 60
                self._started[window], self._used[window] = now, min(others, self._limits[window])
        exceeded = next((w for w, quota in self._limits.items() if self._used[w] >= quota), None)
        if exceeded is None:
            for window in self._limits:
                self._used[window] += 1
        wait = self._left(exceeded, now) if exceeded else 0
        return Verdict(exceeded, wait, self._headers(now))

    def _left(self, window: str, now: float) -> int:
        return max(1, round(self._started[window] + _SECONDS[window] - now))

    def _headers(self, now: float) -> dict[str, str]:
        if not self._limits:
            return {}
        state = [f'"{w}";r={q - self._used[w]};t={self._left(w, now)}' for w, q in self._limits.items()]
        policy = [f'"{w}";q={q};w={_SECONDS[w]}' for w, q in self._limits.items()]
        return {"RateLimit": ", ".join(state), "RateLimit-Policy": ", ".join(policy)}
