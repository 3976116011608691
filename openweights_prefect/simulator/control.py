"""`/_sim`: what a test may see and break."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openweights_prefect.simulator.faults import BadRule, Faults
from openweights_prefect.simulator.fleet import Fleet, KillMode
from openweights_prefect.simulator.gateway import problem
from openweights_prefect.simulator.report import report


class Control:
    """Answers `/_sim/...` to the holder of the control token."""

    def __init__(self, *, fleet: Fleet, faults: Faults, token: str) -> None:
        self._fleet = fleet
        self._faults = faults
        self._token = token

    async def handle(self, request: Request) -> Response:
        """One request."""
        given = request.headers.get("x-sim-token", "")
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            return problem(401, "missing or wrong X-Sim-Token")
        path = request.path_params["path"].strip("/").split("/")
        match request.method, path:
            case "GET", ["state"]:
                return JSONResponse(self._state())
            case "GET", ["report"]:
                return JSONResponse(report(self._fleet.state))
            case "POST", ["faults"]:
                return await self._add_fault(request)
            case "DELETE", ["faults", *rest]:
                self._faults.remove(rest[0] if rest else None)
                return Response(status_code=204)
            case "POST", ["pods", pod_id, "kill"]:
                return await self._kill(request, pod_id)
        return problem(404, "resource not found")

    def _state(self) -> dict[str, Any]:
        state = self._fleet.state
        # Without environments: what a test prints must not hold a token.
        pods = [{k: v for k, v in pod.to_json().items() if k != "env"} for pod in state.pods.values()]
        faults = [dataclasses.asdict(rule) for rule in self._faults.rules()]
        pids = self._fleet.pids()
        return {
            "instance": state.instance,
            "pods": [{**p, "pid": pids.get(p["id"])} for p in pods],
            "faults": faults,
        }

    async def _add_fault(self, request: Request) -> Response:
        try:
            rule = self._faults.add(await request.json())
        except (BadRule, ValueError, TypeError) as exc:
            return problem(422, str(exc))
        return JSONResponse(dataclasses.asdict(rule), status_code=201)

    async def _kill(self, request: Request, pod_id: str) -> Response:
        body = await request.body()
        mode = (await request.json()).get("mode") if body else "restart"
        pod = self._fleet.state.pods.get(pod_id)
        if pod is None:
            return problem(404, "pod not found")
        modes: tuple[KillMode, ...] = get_args(KillMode)
        for known in modes:
            if known == mode:
                await self._fleet.kill(pod, known)
                return Response(status_code=204)
        return problem(422, f"mode must be one of {', '.join(modes)}")
