"""The simulator as one ASGI application with its parts wired."""

from __future__ import annotations

import secrets
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Route

from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.control import Control
from openweights_prefect.simulator.faults import Faults
from openweights_prefect.simulator.fleet import Fleet
from openweights_prefect.simulator.foreign import add_foreign_pods
from openweights_prefect.simulator.gateway import Gateway
from openweights_prefect.simulator.processes import INSTANCE_VARIABLE, sweep
from openweights_prefect.simulator.report import Watch
from openweights_prefect.simulator.store import Store

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Simulator:
    """One simulated RunPod over one state folder."""

    def __init__(self, *, config: SimulatorConfig, folder: Path, seed: int) -> None:
        self.config = config
        self._store = Store(folder)
        self._state = self._store.load()
        self._last_instance, self._state.instance = self._state.instance, secrets.token_hex(8)
        self.instance = self._state.instance
        faults = Faults(seed)
        self._fleet = Fleet(config=config, store=self._store, state=self._state, faults=faults, seed=seed)
        watch = Watch(state=self._state, store=self._store)
        gateway = Gateway(config=config, fleet=self._fleet, faults=faults, store=self._store, watch=watch)
        token = self._store.control_token(config.control_token)
        control = Control(fleet=self._fleet, faults=faults, token=token)
        self.app = Starlette(
            routes=[
                Route("/v2/{path:path}", gateway.handle, methods=_METHODS),
                Route("/_sim/{path:path}", control.handle, methods=_METHODS),
            ]
        )

    async def open(self) -> None:
        """Clear what a killed predecessor left, and bring its pods up again."""
        if self._last_instance:
            sweep({INSTANCE_VARIABLE: self._last_instance})
        add_foreign_pods(self._fleet, self.config)
        await self._fleet.open()

    def stop_streams(self) -> None:
        """Let open log streams end, so that the server can."""
        self._fleet.closing = True

    async def close(self) -> None:
        """Stop all containers."""
        await self._fleet.close()
