"""How fast RunPod may be asked: one budget for all calls of a key, learned from the answers' headers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from openweights_prefect.provisioning.provider import RateLimited

_UNTOLD_QUOTA = 30
"""Requests a minute until an answer tells the real number."""
_UNTOLD_WAIT_SECONDS = 10.0
"""After a refusal that names no time."""
_ROUNDING_SECONDS = 1.0
"""RunPod tells whole seconds, and perhaps one too few."""
_LARGEST_RESERVE = 20
_MEMBER = re.compile(r'"?([\w-]+)"?((?:\s*;\s*\w+=\d+)+)')
_PARAMETER = re.compile(r"(\w+)=(\d+)")


@dataclass
class _Window:
    quota: int
    seconds: float
    left: int
    resets_at: float

    @property
    def reserve(self) -> int:
        """What is kept for ending pods."""
        return min(_LARGEST_RESERVE, self.quota // 6)

    def renew(self, now: float) -> None:
        if now >= self.resets_at:
            self.left, self.resets_at = self.quota, now + self.seconds


class RateBudget:
    """The requests that are left in each window of an account, as far as its answers told.

    Others may use the same account: what an answer says replaces what was counted here. The last requests of
    a window are kept for ending pods, which must not wait because something was looked at too often.
    """

    def __init__(
        self,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        patience_seconds: float = 15.0,
    ) -> None:
        self._sleep = sleep
        self._patience_seconds = patience_seconds
        self._windows: dict[str, _Window] | None = None
        self._told = False
        self._refused_until = float("-inf")
        self._unanswered = 0

    async def take(self, *, ends_a_pod: bool = False) -> None:
        """Wait for leave to send one request; each `take` is followed by one `answered` or `unanswered`.

        Raises `RateLimited`, with nothing taken, when the wait would be longer than the budget's patience.
        """
        waited = 0.0
        while (wait := self._wait_seconds(ends_a_pod)) > 0:
            waited += wait
            if waited > self._patience_seconds:
                raise RateLimited(
                    f"RunPod's request limit is used up for {wait:.0f} s. Ask less often.",
                    retry_after_seconds=wait,
                )
            await self._sleep(wait)
        for window in self._current().values():
            window.left -= 1
        self._unanswered += 1

    def unanswered(self) -> None:
        """A request came to no answer; it may have counted."""
        self._unanswered = max(0, self._unanswered - 1)

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        """Learn from the headers of any answer to a request with a key."""
        self.unanswered()
        now = asyncio.get_running_loop().time()
        state = _members(headers.get("RateLimit", ""))
        if state:
            self._learn(state, _members(headers.get("RateLimit-Policy", "")), now)
        elif status < 400 and not self._told:
            # RunPod leaves the headers out for whom it does not limit.
            self._windows = {}
        if status == 429:
            until = now + retry_after_seconds(headers) + _ROUNDING_SECONDS
            self._refused_until = max(self._refused_until, until)

    def _learn(
        self, state: Mapping[str, Mapping[str, int]], policy: Mapping[str, Mapping[str, int]], now: float
    ) -> None:
        known = self._current() if self._told else {}
        self._told = True
        for name, member in state.items():
            left, seconds = member.get("r"), member.get("t")
            if left is None or seconds is None:
                continue
            before = known.get(name) or _Window(left, seconds, left, now)
            rule = policy.get(name, {})
            known[name] = _Window(
                quota=rule.get("q", before.quota),
                seconds=rule.get("w", before.seconds),
                # What is under way was not counted when the server wrote this.
                left=left - self._unanswered,
                resets_at=now + seconds + _ROUNDING_SECONDS,
            )
        self._windows = known

    def _wait_seconds(self, ends_a_pod: bool) -> float:
        now = asyncio.get_running_loop().time()
        waits = [self._refused_until - now]
        for window in self._current().values():
            window.renew(now)
            if window.left <= (0 if ends_a_pod else window.reserve):
                waits.append(window.resets_at - now)
        return max(waits)

    def _current(self) -> dict[str, _Window]:
        if self._windows is None:
            now = asyncio.get_running_loop().time()
            self._windows = {"minute": _Window(_UNTOLD_QUOTA, 60.0, _UNTOLD_QUOTA, now + 60.0)}
        return self._windows


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """How long a refused request has to wait: the longest of `Retry-After` and the used up windows."""
    waits = [
        float(member.get("t", 0))
        for member in _members(headers.get("RateLimit", "")).values()
        if member.get("r") == 0
    ]
    header = headers.get("Retry-After", "")
    if header.isdecimal():
        waits.append(float(header))
    return max(waits, default=_UNTOLD_WAIT_SECONDS)


def _members(header: str) -> dict[str, dict[str, int]]:
    """`"minute";r=0;t=12, "hour";r=2800;t=1812` by window and letter."""
    return {
        name: {letter: int(number) for letter, number in _PARAMETER.findall(parameters)}
        for name, parameters in _MEMBER.findall(header)
    }
