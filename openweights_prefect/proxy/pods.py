"""Which pod a token belongs to, and which flow runs it may touch: the ledger knows."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.protocol import Ledger, ask

FRESH_SECONDS = 2.0
"""For how long an answer of the ledger is used again: an ended pod gets no further than this."""

_MOST_TOKENS = 4096
_LOOKUPS_AT_ONCE = 8
_TOKEN = re.compile(r"owx_[0-9a-f]{64}")


@dataclass(frozen=True)
class Caller:
    """A living pod; `run_ids` are the flow runs that it holds, is pointed at, or has just finished."""

    worker_id: str
    run_ids: frozenset[UUID]


class _Known(NamedTuple):
    """What the ledger said about a token, and when."""

    asked_at: float
    caller: Caller | None


class Pods:
    """Looks up callers by their tokens; keeps only hashes, and not many of them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lookups = asyncio.Semaphore(_LOOKUPS_AT_ONCE)

    async def caller(self, token: str, *, at_most_old: float = FRESH_SECONDS) -> Caller | None:
        """The living pod whose token this is, or None. Raises `LedgerUnavailable`.

        `at_most_old` are the seconds since the ledger was asked.
        """
        if _TOKEN.fullmatch(token) is None:
            return None
        key = hash_secret(token)
        known = self._fresh(key, at_most_old)
        if known is None:
            async with self._lookups:
                known = self._fresh(key, at_most_old) or await self._ask(key)
        return known.caller

    def _fresh(self, key: str, at_most_old: float) -> _Known | None:
        known = self._known.get(key)
        if known is None or _now() - known.asked_at > at_most_old:
            return None
        self._known.move_to_end(key)
        return known

    async def _ask(self, key: str) -> _Known:
        asked_at = _now()
        rows = await ask(self._ledger, "pod_of_proxy", hash=key)
        caller = None
        if rows:
            run_ids = frozenset(map(UUID, rows[0]["run_ids"]))
            caller = Caller(worker_id=str(rows[0]["worker_id"]), run_ids=run_ids)
        self._known[key] = known = _Known(asked_at, caller)
        self._known.move_to_end(key)
        while len(self._known) > _MOST_TOKENS:
            self._known.popitem(last=False)
        return known


def token_of(authorization: str | None) -> str:
    """The token in a header that Prefect's client made of `PREFECT_API_KEY` or `PREFECT_API_AUTH_STRING`."""
    scheme, _, value = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("ascii")
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _now() -> float:
    return asyncio.get_running_loop().time()
