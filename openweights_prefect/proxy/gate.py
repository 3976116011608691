"""Who may pass: a living pod, with what is its own."""

from __future__ import annotations

from openweights_prefect.proxy.kinship import Kinship
from openweights_prefect.proxy.pods import FRESH_SECONDS, Caller, Pods
from openweights_prefect.proxy.rules import Demand, Refused

_AGAIN_SECONDS = 0.2


class NotAlive(Refused):
    """The token is not one of a living pod."""


class Gate:
    """Decides on requests and events alike."""

    def __init__(self, *, pods: Pods, kinship: Kinship) -> None:
        self._pods = pods
        self._kinship = kinship

    async def caller(self, token: str, *, at_most_old: float = FRESH_SECONDS) -> Caller:
        """The pod; raises `NotAlive`."""
        caller = await self._pods.caller(token, at_most_old=at_most_old)
        if caller is None:
            raise NotAlive("The token is not one of a living pod.")
        return caller

    async def admit(self, token: str, demand: Demand) -> None:
        """Return when everything in the demand is the pod's own; else raise `Refused`."""
        try:
            await self._kinship.check(await self.caller(token), demand)
        except NotAlive:
            raise
        except Refused:
            # The pod may have been given a run since the ledger was asked: it claims it at once.
            await self._kinship.check(await self.caller(token, at_most_old=_AGAIN_SECONDS), demand)
