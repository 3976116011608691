"""The simulator as one ASGI application with its parts wired."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from openweights_prefect.simulator.accounts import Accounts
from openweights_prefect.simulator.chaos import set_chaos
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.control import Control
from openweights_prefect.simulator.faults import Faults
from openweights_prefect.simulator.fleet import Fleet
from openweights_prefect.simulator.foreign import add_foreign_pods
from openweights_prefect.simulator.gateway import Gateway
from openweights_prefect.simulator.graph import Graph
from openweights_prefect.simulator.hosts import Inventory
from openweights_prefect.simulator.market import Market
from openweights_prefect.simulator.operations import Operations
from openweights_prefect.simulator.processes import sweep
from openweights_prefect.simulator.report import Watch
from openweights_prefect.simulator.store import Store

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Simulator:
    """One simulated RunPod over one state folder."""

    def __init__(self, *, config: SimulatorConfig, folder: Path, seed: int) -> None:
        self.config = config
        self.connections: list[Any] | set[Any] = []
        """The server's open connections; whoever serves the application puts them here."""
        clock = Clock(scale=config.time_scale, manual=config.clock == "manual")
        store = Store(folder, clock)
        state = store.load()
        self._last_instance, state.instance = state.instance, secrets.token_hex(8)
        self.instance = state.instance
        faults = Faults(seed)
        set_chaos(faults, config.chaos)
        self._fleet = Fleet(config=config, clock=clock, store=store, state=state, faults=faults, seed=seed)
        self._accounts = Accounts(config=config, clock=clock, fleet=self._fleet, store=store)
        inventory = Inventory(config, seed=seed)
        watch = Watch(state=state, store=store, clock=clock)
        market = Market(
            config=config,
            fleet=self._fleet,
            faults=faults,
            store=store,
            accounts=self._accounts,
            inventory=inventory,
        )
        operations = Operations(
            config=config,
            clock=clock,
            fleet=self._fleet,
            faults=faults,
            store=store,
            market=market,
            inventory=inventory,
            watch=watch,
            connections=lambda: self.connections,
        )
        gateway = Gateway(
            config=config,
            clock=clock,
            state=state,
            faults=faults,
            store=store,
            accounts=self._accounts,
            operations=operations,
            watch=watch,
            connections=lambda: self.connections,
        )
        graph = Graph(
            config=config,
            clock=clock,
            fleet=self._fleet,
            faults=faults,
            accounts=self._accounts,
            market=market,
            operations=operations,
            inventory=inventory,
            watch=watch,
        )
        control = Control(
            fleet=self._fleet,
            faults=faults,
            store=store,
            clock=clock,
            accounts=self._accounts,
            inventory=inventory,
            watch=watch,
            token=store.control_token(config.control_token),
        )
        self.app = Starlette(
            routes=[
                Route("/v2/{path:path}", gateway.handle, methods=_METHODS),
                Route("/graphql", graph.handle, methods=["POST"]),
                Route("/_proxy/{pod}/{port}/{path:path}", self._proxy, methods=_METHODS),
                Route("/_sim/{path:path}", control.handle, methods=_METHODS),
                Route("/v1/{path:path}", _retired, methods=_METHODS),
                Route("/pods{path:path}", _retired, methods=_METHODS),
            ]
        )

    async def open(self, base_url: str) -> None:
        """Clear what a killed predecessor left, and bring its pods up again."""
        if self._last_instance:
            sweep(self._last_instance)
        add_foreign_pods(self._fleet, self.config)
        await self._fleet.open(base_url)
        self._fleet.spawn(self._accounts.watch())

    def stop_streams(self) -> None:
        """Let open log streams end, so that the server can."""
        self._fleet.closing = True

    async def close(self) -> None:
        """Stop all containers."""
        await self._fleet.close()

    async def _proxy(self, request: Request) -> Response:
        parameters = request.path_params
        pod = self._fleet.state.pods.get(parameters["pod"])
        return await self._fleet.ports.proxy(pod, parameters["port"], request)


async def _retired(request: Request) -> Response:
    return JSONResponse({"error": "REST API v1 was retired on November 15, 2026", "status": 410}, 410)
