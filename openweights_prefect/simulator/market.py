"""A purchase: funds, a host, the commitment, and what may go wrong right after it."""

from __future__ import annotations

from typing import NamedTuple

from openweights_prefect.simulator.accounts import Accounts
from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.faults import Faults, Rule
from openweights_prefect.simulator.fleet import Fleet
from openweights_prefect.simulator.hosts import Host, Inventory, price_per_hour
from openweights_prefect.simulator.model import Pod, Rental, pod_facts
from openweights_prefect.simulator.store import Store
from openweights_prefect.simulator.validation import Invalid

NO_CAPACITY = (
    "There are no longer any instances available with the requested specifications. "
    "Please refresh and try again."
)
NO_DISK = "There are no longer any instances available with enough disk space."


class Purchase(NamedTuple):
    """A pod that was rented, and the accident that befalls its answer."""

    pod: Pod
    accident: Rule | None


class Market:
    """Rents pods to accounts; both APIs buy here."""

    def __init__(
        self,
        *,
        config: SimulatorConfig,
        fleet: Fleet,
        faults: Faults,
        store: Store,
        accounts: Accounts,
        inventory: Inventory,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._faults = faults
        self._store = store
        self._accounts = accounts
        self._inventory = inventory

    def buy(self, account: str, rental: Rental) -> Purchase:
        """Rent a pod; raises `Invalid` with RunPod's words when there is no money or no machine."""
        price = price_per_hour(rental.gpu_id, rental.cloud) * rental.gpu_count
        if refusal := self._accounts.refusal(account, price):
            raise Invalid(402, refusal)
        facts = {"op": "pods.create", **rental_facts(rental)}
        shortage = self._faults.take("scheduler", facts)
        if shortage is not None:
            self._store.record("fault", fault=shortage.name, rule=shortage.id)
            raise Invalid(int(shortage.number("status", 400)), str(shortage.params.get("text", NO_CAPACITY)))
        host = self._find(rental)
        pod = self._fleet.rent(account, rental, host)
        accident = self._faults.take("after", {**facts, **pod_facts(pod)})
        if accident is None or accident.name == "duplicate_create":
            pod.untold_since = None
        if accident is not None:
            self._store.record("fault", fault=accident.name, rule=accident.id, pod=pod.id)
            if accident.name == "duplicate_create":
                self._fleet.rent(account, rental, host).duplicate = True
        return Purchase(pod, accident)

    def _find(self, rental: Rental) -> Host:
        pods = self._fleet.state.pods.values()
        if not rental.gpu_count:
            raise Invalid(400, NO_CAPACITY)
        host = self._inventory.place(pods, rental)
        if host is None:
            raise Invalid(400, NO_DISK if self._inventory.lacks_disk_only(pods, rental) else NO_CAPACITY)
        return host


def rental_facts(rental: Rental) -> dict[str, str]:
    """What a fault rule can be matched with before there is a pod."""
    return {"name": rental.name, "image": rental.image, "cloud": rental.cloud, "gpu": rental.gpu_id}
