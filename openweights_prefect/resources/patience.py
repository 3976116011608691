"""How waits are paced, and how long they bear a ledger that does not answer."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from openweights_prefect.errors import InvalidParameterError, LedgerUnavailable
from openweights_prefect.ledger.protocol import Ledger, Notifying, Row
from openweights_prefect.resources.session import Session

OUTAGE_SECONDS = 300.0
_LAST_LOOK_SECONDS = 0.5  # A healthy ledger answers a wait of no time, too.


class Pace:
    """The pauses of one wait: short at first, longer later, never beyond its end.

    `rhythm` gives a pause from the seconds since the beginning, or since the last `news()`.
    """

    def __init__(
        self,
        timeout: float | None,
        *,
        rhythm: Callable[[float], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if timeout is not None and not timeout >= 0:
            raise InvalidParameterError(f"timeout={timeout!r} is not a number of seconds, 0 or more.")
        self._clock = clock
        self._sleep = sleep
        self._rhythm = rhythm or pause_after
        self._start = self._news_at = clock()
        self._timeout = timeout

    def pause(self) -> bool:
        """Sleep until it is time to look again; False, without sleeping, when the time is up."""
        seconds = self.next_pause()
        if seconds is None:
            return False
        self._sleep(seconds)
        return True

    def next_pause(self) -> float | None:
        """How long to sleep now; None when the time is up."""
        now = self._clock()
        pause = self._rhythm(now - self._news_at)
        if self._timeout is None:
            return pause
        left = self._timeout - (now - self._start)
        return min(pause, left) if left > 0 else None

    def news(self) -> None:
        """Something was found: what follows it is looked for sooner."""
        self._news_at = self._clock()

    def _left(self) -> float | None:
        if self._timeout is None:
            return None
        return max(_LAST_LOOK_SECONDS, self._timeout - (self._clock() - self._start))

    def bear(self, call: Callable[[float | None], list[Row]]) -> list[Row]:
        """Make a call again while the ledger is away: until the timeout, without one for five minutes.

        It is called with the seconds that are left, None without a timeout.
        """
        since = self._clock()
        while True:
            try:
                return call(self._left())
            except LedgerUnavailable:
                if (self._timeout is None and self._clock() - since > OUTAGE_SECONDS) or not self.pause():
                    raise


def pause_after(elapsed_seconds: float) -> float:
    """A job that was just submitted may be done at once; nobody looks twice a second for days."""
    return 0.1 if elapsed_seconds < 2 else min(2.0, max(0.5, elapsed_seconds / 60))


def live_pause(quiet_seconds: float) -> float:
    """For what is shown as it comes: five looks a second while it comes, one when it is quiet."""
    return min(1.0, max(0.2, quiet_seconds / 5))


def sleep_until_end(ledger: Ledger, job_id: str) -> Callable[[float], None]:
    """A sleep that ends with the job, where the ledger can tell."""
    if isinstance(ledger, Notifying):
        return functools.partial(ledger.wait_for_change, job_id)
    return time.sleep


class PatientLedger:
    """A ledger whose calls wait for it to come back."""

    def __init__(self, ledger: Ledger, pace: Pace) -> None:
        self._ledger = ledger
        self._pace = pace

    @property
    def organization_id(self) -> str:
        """The organization that the caller acts for."""
        return self._ledger.organization_id

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        """Call a function; bears outages as `Pace.bear` does, whatever `patience_seconds` says."""
        return self._pace.bear(lambda left: self._ledger.call(function, patience_seconds=left, **arguments))

    def close(self) -> None:
        """Give back every connection."""
        self._ledger.close()


def patient(session: Session, pace: Pace) -> Session:
    """The same session, for the calls of one wait."""
    return dataclasses.replace(session, ledger=PatientLedger(session.ledger, pace))
