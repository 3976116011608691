"""Who may spend what: keys, balances and spend limits."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.config import Key, SimulatorConfig
from openweights_prefect.simulator.faults import Rule
from openweights_prefect.simulator.fleet import Fleet
from openweights_prefect.simulator.model import ENDED
from openweights_prefect.simulator.store import Store

POD_KEY_PREFIX = "rpa_pod_"


class Accounts:
    """The accounts of the configuration, with what was changed since."""

    def __init__(self, *, config: SimulatorConfig, clock: Clock, fleet: Fleet, store: Store) -> None:
        self._config = config
        self._clock = clock
        self._fleet = fleet
        self._store = store
        self._state = fleet.state

    def key(self, token: str) -> Key | None:
        """What a token may do; None for one that is not valid."""
        pod = self._state.pods.get(token.removeprefix(POD_KEY_PREFIX))
        if token.startswith(POD_KEY_PREFIX) and pod is not None:
            return Key(pod.account, "pod")
        return None if token in self._state.revoked else self._config.keys.get(token)

    def names(self) -> list[str]:
        """All accounts."""
        return sorted({key.account for key in self._config.keys.values()})

    def balance(self, account: str) -> Decimal:
        """USD that are left."""
        paid_in = Decimal(self._state.credits.get(account, str(self._config.balance)))
        return paid_in - self._store.spent(self._state, account, self._clock.now())

    def spend_limit(self, account: str) -> float:
        """USD an hour that it may spend."""
        return self._state.spend_limits.get(account, self._config.spend_limit_per_hour)

    def spending(self, account: str) -> float:
        """USD an hour that it spends now."""
        return sum(
            pod.price
            for pod in self._state.pods.values()
            if pod.account == account and pod.owner == "client" and pod.phase not in ENDED
        )

    def refusal(self, account: str, price: float) -> str | None:
        """Why an account cannot have a pod of this price an hour; None if it can."""
        balance = float(self.balance(account))
        if balance < price:
            need = (
                f"You need at least ${price:.2f} (current: ${balance:.2f}, deficit: ${price - balance:.2f})."
            )
            return f"Insufficient balance to deploy this pod. {need}"
        if self.spending(account) + price > self.spend_limit(account):
            return "You have exceeded your spending limit."
        return None

    def change(self, account: str, document: dict[str, Any]) -> None:
        """Set `balance`, `spend_limit_per_hour` or `revoked`; others stay as they are."""
        if "balance" in document:
            spent = self._store.spent(self._state, account, self._clock.now())
            self._state.credits[account] = str(Decimal(str(document["balance"])) + spent)
        if "spend_limit_per_hour" in document:
            self._state.spend_limits[account] = float(document["spend_limit_per_hour"])
        if "revoked" in document:
            mine = {token for token, key in self._config.keys.items() if key.account == account}
            kept = [token for token in self._state.revoked if token not in mine]
            self._state.revoked = kept + (sorted(mine) if document["revoked"] else [])
        self._fleet.save()
        self.check_balances()

    def strike(self, rule: Rule, token: str, account: str) -> None:
        """Let a fault of the stage `account` happen."""
        if rule.name == "key_revoked":
            self._state.revoked.append(token)
            self._fleet.save()
        elif rule.name == "balance":
            self.change(account, {"balance": rule.params.get("balance", 0)})
        else:
            self.change(account, {"spend_limit_per_hour": rule.number("per_hour", 0)})

    async def watch(self) -> None:
        """Look at the balances as often as RunPod does."""
        while True:
            await self._clock.sleep(self._config.timings.balance_check)
            self.check_balances()

    def check_balances(self) -> None:
        """End the pods of accounts that have nothing left; none of them has a network volume here."""
        for account in self.names():
            if self.spending(account) and self.balance(account) <= 0:
                for pod in [*self._state.pods.values()]:
                    if pod.account == account and pod.owner == "client":
                        self._fleet.logs.system(pod.id, "Exited by RunPod: Insufficient balance")
                        self._fleet.terminate(pod)
