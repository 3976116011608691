"""Somebody else's pods in the same account, as a real account holds them."""

from __future__ import annotations

from collections.abc import Mapping

from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.fleet import Fleet
from openweights_prefect.simulator.hosts import elsewhere
from openweights_prefect.simulator.model import Phase, Pod, Rental

ACCOUNT = "main"
CANARY = "SIM_CANARY_"

_GPU = "NVIDIA A40"


def add_foreign_pods(fleet: Fleet, config: SimulatorConfig) -> None:
    """One that runs under a name like ours, one EXITED, one locked; each with a canary in its environment.

    They have no processes, and are put in once in the life of a state folder.
    """
    if not config.foreign_pods or fleet.state.seeded:
        return
    fleet.state.seeded = True
    for number, (name, phase, locked) in enumerate(
        [
            (f"{config.foreign_prefix}7c1f0d2e-9b3a5e61-0001-4f2c8a90", Phase.UP, False),
            ("notebook-of-a-colleague", Phase.STOPPED, False),
            ("do-not-touch", Phase.UP, True),
        ],
        start=1,
    ):
        env = {"SECRET": f"{CANARY}{number}", "OW_OWNER": "another-deployment"}
        pod = add_foreign_pod(fleet, name=name, env=env)
        pod.phase, pod.locked = phase, locked


def add_foreign_pod(
    fleet: Fleet, *, name: str, env: Mapping[str, str] | None = None, gpu: str = _GPU, account: str = ACCOUNT
) -> Pod:
    """A pod of somebody else that runs."""
    rental = Rental(
        name=name,
        image="runpod/pytorch:latest",
        gpu_id=gpu,
        gpu_count=1,
        cloud="SECURE",
        disk=50,
        env=dict(env or {}),
    )
    pod = fleet.rent(account, rental, elsewhere(gpu), owner="foreign")
    pod.phase, pod.container_started_at, pod.untold_since = Phase.UP, pod.created_at, None
    return pod
