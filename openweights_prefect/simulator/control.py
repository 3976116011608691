"""`/_sim`: what a test may see and break."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import signal
from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.simulator import chaos, conditions
from openweights_prefect.simulator.accounts import Accounts
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.faults import POD_STAGES, Faults
from openweights_prefect.simulator.fleet import Fleet, KillMode
from openweights_prefect.simulator.foreign import add_foreign_pod
from openweights_prefect.simulator.hosts import Inventory
from openweights_prefect.simulator.model import Pod
from openweights_prefect.simulator.problems import problem
from openweights_prefect.simulator.report import Watch, report
from openweights_prefect.simulator.store import Store

_POLL_SECONDS = 0.02
_WAIT_SECONDS = 30.0


class Control:
    """Answers `/_sim/...` to the holder of the control token."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        faults: Faults,
        store: Store,
        clock: Clock,
        accounts: Accounts,
        inventory: Inventory,
        watch: Watch,
        token: str,
    ) -> None:
        self._fleet = fleet
        self._faults = faults
        self._store = store
        self._clock = clock
        self._accounts = accounts
        self._inventory = inventory
        self._watch = watch
        self._token = token

    async def handle(self, request: Request) -> Response:
        """One request."""
        given = request.headers.get("x-sim-token", "")
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            return problem(401, "missing or wrong X-Sim-Token")
        path = request.path_params["path"].strip("/").split("/")
        try:
            body = json.loads(await request.body() or "{}")
            if request.method == "GET":
                return await self._read(request, path)
            if path[0] == "pods" and len(path) == 3:
                return await self._break(path[1], path[2], body)
            return await self._change(request.method, path, body)
        except (ValueError, TypeError, KeyError, ConfigurationError) as exc:
            return problem(422, str(exc))

    async def _read(self, request: Request, path: list[str]) -> Response:
        query = request.query_params
        match path:
            case ["state"]:
                return JSONResponse(self._state())
            case ["report"]:
                return JSONResponse(report(self._fleet.state, self._store, self._clock))
            case ["journal"]:
                return JSONResponse({"entries": self._store.journal(int(query.get("after", 0)))})
            case ["wait"]:
                return await self._wait(query["expr"], query.get("pod"), float(query.get("timeout", 30)))
        return problem(404, "resource not found")

    async def _change(self, method: str, path: list[str], body: dict[str, Any]) -> Response:
        match method, path:
            case "POST", ["faults"]:
                return self._add_fault(body)
            case "DELETE", ["faults", *rest]:
                self._faults.remove(rest[0] if rest else None)
            case "POST", ["chaos"]:
                self._fleet.accidents.offer(chaos.set_chaos(self._faults, chaos.checked(body)))
            case "POST", ["clock", "advance"]:
                await self._clock.advance(float(body["seconds"]))
                self._accounts.check_balances()
                return JSONResponse({"now": self._clock.now()})
            case "POST", ["scan"]:
                return JSONResponse({"leaks": self._watch.scan([str(path) for path in body["paths"]])})
            case _, ["hosts", *rest]:
                return self._change_host(method, rest, body)
            case "PUT", ["capacity"]:
                places = {key: str(body.get(key, "*")) for key in ("gpu", "cloud", "dc")}
                self._inventory.limit(**places, free=body["free"])
            case "PUT", ["accounts", account]:
                self._accounts.change(account, body)
            case "POST", ["pods", "foreign"]:
                return JSONResponse({"id": add_foreign_pod(self._fleet, **body).id}, status_code=201)
            case _:
                return problem(404, "resource not found")
        return Response(status_code=204)

    def _change_host(self, method: str, rest: list[str], body: dict[str, Any]) -> Response:
        match method, rest:
            case "POST", []:
                return JSONResponse(dataclasses.asdict(self._inventory.add(**body)), status_code=201)
            case "PATCH", [host_id]:
                host = dataclasses.replace(self._inventory.hosts[host_id], **body)
                self._inventory.hosts[host_id] = host
                return JSONResponse(dataclasses.asdict(host))
        return problem(404, "resource not found")

    def _state(self) -> dict[str, Any]:
        state = self._fleet.state
        # Without environments: what a test prints must not hold a token.
        pods = [{k: v for k, v in pod.to_json().items() if k != "env"} for pod in state.pods.values()]
        pids = self._fleet.pids()
        accounts = {
            name: {"balance": float(self._accounts.balance(name)), "spending": self._accounts.spending(name)}
            for name in self._accounts.names()
        }
        return {
            "instance": state.instance,
            "now": self._clock.now(),
            "pods": [{**pod, "pid": pids.get(pod["id"])} for pod in pods],
            "faults": [dataclasses.asdict(rule) for rule in self._faults.rules()],
            "hosts": [dataclasses.asdict(host) for host in self._inventory.hosts.values()],
            "accounts": accounts,
        }

    def _add_fault(self, document: dict[str, Any]) -> Response:
        rule = self._faults.add(document)
        if rule.stage in POD_STAGES:
            self._fleet.accidents.offer({rule.id})
        return JSONResponse(dataclasses.asdict(rule), status_code=201)

    async def _break(self, pod_id: str, how: str, body: dict[str, Any]) -> Response:
        pod = self._fleet.state.pods.get(pod_id)
        if pod is None:
            return problem(404, "pod not found")
        container = self._fleet.container(pod)
        match how:
            case "kill":
                return await self._kill(pod, str(body.get("mode", "restart")))
            case "stall":
                self._fleet.spawn(self._fleet.freeze(pod, float(body.get("seconds", 60))))
            case "exit" if container:
                container.send(signal.SIGTERM)
            case "signal" if container:
                container.send(signal.Signals[str(body["signal"])])
            case "exit" | "signal":
                return problem(409, "the pod has no running container")
            case _:
                return problem(404, "resource not found")
        return Response(status_code=204)

    async def _kill(self, pod: Pod, mode: str) -> Response:
        modes: tuple[KillMode, ...] = get_args(KillMode)
        for known in modes:
            if known == mode:
                await self._fleet.kill(pod, known)
                return Response(status_code=204)
        return problem(422, f"mode must be one of {', '.join(modes)}")

    async def _wait(self, expression: str, pod_id: str | None, timeout_seconds: float) -> Response:
        holds = conditions.parse(expression, pod_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(timeout_seconds, 10 * _WAIT_SECONDS)
        while not holds(self._fleet.state):
            if loop.time() > deadline or self._fleet.closing:
                return problem(408, f"{expression!r} did not come true in {timeout_seconds} seconds")
            await asyncio.sleep(_POLL_SECONDS)
        return Response(status_code=204)
