"""Somebody else's pods in the same account, as a real account holds them."""

from __future__ import annotations

import time

from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.fleet import Fleet, Rental
from openweights_prefect.simulator.hosts import Host
from openweights_prefect.simulator.model import Phase

ACCOUNT = "main"
CANARY = "SIM_CANARY_"

_GPU = "NVIDIA A40"
_HOST = Host("elsewhere", _GPU, "SECURE", "US-KS-2", 8, "12.8")


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
        rental = Rental(
            name=name,
            image="runpod/pytorch:latest",
            gpu_id=_GPU,
            gpu_count=1,
            cloud="SECURE",
            disk=50,
            env=env,
        )
        pod = fleet.rent(ACCOUNT, rental, _HOST, owner="foreign")
        pod.phase, pod.locked, pod.visible_at = phase, locked, 0
        pod.container_started_at = time.time()
