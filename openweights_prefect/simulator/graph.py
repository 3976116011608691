"""RunPod's GraphQL, as far as runpod-python and runpodctl use it: the same pods, hosts, faults and bills."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from graphql import GraphQLError, GraphQLResolveInfo, build_schema, execute, parse, validate
from graphql.error import GraphQLSyntaxError
from graphql.pyutils import is_awaitable
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openweights_prefect.provisioning.hardware import catalogue, gpu_by_id
from openweights_prefect.simulator.accounts import POD_KEY_PREFIX, Accounts
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.config import Key, SimulatorConfig
from openweights_prefect.simulator.faults import Faults
from openweights_prefect.simulator.fleet import Fleet
from openweights_prefect.simulator.graph_views import gpu_view, pod_view, price_view
from openweights_prefect.simulator.hosts import Inventory
from openweights_prefect.simulator.market import Market, Purchase
from openweights_prefect.simulator.model import ENDED, Phase, Pod, Rental
from openweights_prefect.simulator.operations import Operations
from openweights_prefect.simulator.rates import RateLimit
from openweights_prefect.simulator.report import Watch
from openweights_prefect.simulator.validation import Invalid

_SCHEMA = Path(__file__).with_name("runpod.graphql")
_NO_SPOT = "There are no instances available with the request specifications. Please try again later."
_FAILED = "Something went wrong. Please try again later or contact support."
_POD_KEY_MAY = ("pod", "podStop", "podTerminate")
_TTL_FIELDS = ("stopAfter", "terminateAfter")
_CODES = {402: "INSUFFICIENT_BALANCE", 400: "SUPPLY_CONSTRAINT", 500: "INTERNAL_SERVER_ERROR"}


class Graph:
    """Answers `/graphql`."""

    def __init__(
        self,
        *,
        config: SimulatorConfig,
        clock: Clock,
        fleet: Fleet,
        faults: Faults,
        accounts: Accounts,
        market: Market,
        operations: Operations,
        inventory: Inventory,
        watch: Watch,
    ) -> None:
        self._config = config
        self._clock = clock
        self._fleet = fleet
        self._faults = faults
        self._accounts = accounts
        self._market = market
        self._operations = operations
        self._inventory = inventory
        self._watch = watch
        self._limits: dict[str, RateLimit] = {}
        self._schema = build_schema(_SCHEMA.read_text(encoding="utf-8"))
        self._resolvers: dict[str, Callable[[_Caller, dict[str, Any]], Any]] = {
            "gpuTypes": self._gpu_types,
            "cpuTypes": lambda caller, input_: [],
            "dataCenters": self._data_centers,
            "myself": self._myself,
            "pod": self._pod,
            "podFindAndDeployOnDemand": self._deploy,
            "podRentInterruptable": self._refuse_spot,
            "podBidResume": self._refuse_spot,
            "podStop": self._stop,
            "podResume": self._resume,
            "podTerminate": self._terminate,
        }

    async def handle(self, request: Request) -> Response:
        """One request."""
        token = _token(request)
        key = self._accounts.key(token) if token else None
        if token and key is None:
            return JSONResponse({"errors": [{"message": "Unauthorized"}]}, 401)
        account = key.account if key else ""
        if "api_key" in request.query_params:
            self._watch.note("key_in_url", "graphql")
        limit = self._limits.setdefault(account, RateLimit({"minute": self._config.graphql_per_minute}))
        if limit.count(self._clock.now()).exceeded:
            return Response("<html><body>429 Too Many Requests</body></html>", 429, media_type="text/html")
        self._watch.request("graphql", request.headers.get("user-agent", ""), account)
        rule = self._faults.take("before", {"op": "graphql"})
        if rule is not None:
            return Response(_FAILED, int(rule.number("status", 500)), media_type="text/html")
        return await self._execute(await request.body(), _Caller(key, token))

    async def _execute(self, body: bytes, caller: _Caller) -> Response:
        try:
            request = json.loads(body)
            document = parse(request["query"])
        except (GraphQLSyntaxError, ValueError, KeyError, TypeError) as exc:
            return JSONResponse({"errors": [{"message": str(exc)}]}, 400)
        if errors := validate(self._schema, document):
            return JSONResponse({"errors": [error.formatted for error in errors]}, 400)
        outcome = execute(
            self._schema,
            document,
            context_value=caller,
            variable_values=request.get("variables"),
            field_resolver=self._resolve,
        )
        result = await outcome if is_awaitable(outcome) else outcome
        if result.errors:  # type: ignore[union-attr]
            errors = [dict(error.formatted) for error in result.errors]  # type: ignore[union-attr,misc]
            return JSONResponse({"errors": errors, "data": None})
        return JSONResponse({"data": result.data})  # type: ignore[union-attr]

    def _resolve(self, source: Any, info: GraphQLResolveInfo[Any], **arguments: Any) -> Any:
        name = info.field_name
        if source is not None:
            return self._price(source, arguments) if name == "lowestPrice" else source.get(name)
        caller: _Caller = info.context
        given = arguments.get("input") or {}
        if caller.key and caller.key.scope == "pod" and not self._is_own(caller, name, given):
            raise GraphQLError("Unauthorized", extensions={"code": "FORBIDDEN"})
        is_change = name.startswith("pod") and name != "pod"
        if is_change and (caller.key is None or caller.key.scope == "read"):
            raise GraphQLError("Unauthorized", extensions={"code": "FORBIDDEN"})
        return self._resolvers[name](caller, given)

    def _is_own(self, caller: _Caller, name: str, given: dict[str, Any]) -> bool:
        own = caller.token.removeprefix(POD_KEY_PREFIX)
        # One that is not there is told so: measured with the key of a pod.
        is_there = given.get("podId") in self._fleet.state.pods
        return name in _POD_KEY_MAY and (given.get("podId") == own or not is_there)

    def _gpu_types(self, caller: _Caller, given: dict[str, Any]) -> list[dict[str, Any]]:
        return [gpu_view(gpu) for gpu in catalogue() if given.get("id") in (None, gpu.id)]

    def _price(self, gpu: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
        given = arguments.get("input") or {}
        cloud = "COMMUNITY" if given.get("secureCloud") is False else "SECURE"
        pods = self._fleet.state.pods.values()
        stock = self._inventory.stock(pods, gpu["id"], cloud, given.get("gpuCount") or 1)
        return price_view(gpu["id"], cloud, stock)

    def _data_centers(self, caller: _Caller, given: dict[str, Any]) -> list[dict[str, Any]]:
        places = sorted({host.data_center for host in self._inventory.hosts.values() if host.data_center})
        return [{"id": place, "name": place, "location": place[:2]} for place in places]

    def _myself(self, caller: _Caller, given: dict[str, Any]) -> dict[str, Any] | None:
        if caller.key is None:
            return None
        account = caller.key.account
        pods = self._fleet.listed(account)
        self._watch.listed(account)
        for pod in pods:
            self._fleet.told(pod)
        return {
            "id": f"user_{account}",
            "email": f"{account}@example.invalid",
            "pubKey": "",
            "clientBalance": float(self._accounts.balance(account)),
            "currentSpendPerHr": self._accounts.spending(account),
            "spendLimit": int(self._accounts.spend_limit(account)),
            "networkVolumes": [],
            "pods": [self._view(pod) for pod in pods if pod.phase is not Phase.TERMINATED],
        }

    def _pod(self, caller: _Caller, given: dict[str, Any]) -> dict[str, Any] | None:
        pod = self._find(caller, given)
        return None if pod is None else self._view(pod)

    def _deploy(self, caller: _Caller, given: dict[str, Any]) -> dict[str, Any]:
        for name in _TTL_FIELDS:
            if given.get(name) is not None:
                self._watch.note("ttl_field_used", name)
        if gpu_by_id(given.get("gpuTypeId") or "") is None:
            raise GraphQLError(_FAILED, extensions={"code": "INTERNAL_SERVER_ERROR"})
        self._watch.create(caller.account, given, str(given.get("name") or ""))
        purchase = self._buy(caller, given)
        if purchase.accident is not None and purchase.accident.name != "duplicate_create":
            self._watch.unclear(caller.account, given)
            raise GraphQLError(_FAILED, extensions={"code": "INTERNAL_SERVER_ERROR"})
        return self._view(purchase.pod)

    def _buy(self, caller: _Caller, given: dict[str, Any]) -> Purchase:
        wanted = given.get("cloudType") or "ALL"
        clouds = ("SECURE", "COMMUNITY") if wanted == "ALL" else (wanted,)
        refusal = Invalid(400, "")
        for cloud in clouds:
            try:
                return self._market.buy(caller.account, _rental(given, cloud))
            except Invalid as exc:
                refusal = exc
                if exc.status != 400:
                    break
        code = _CODES.get(refusal.status, "INTERNAL_SERVER_ERROR")
        raise GraphQLError(refusal.detail, extensions={"code": code})

    def _refuse_spot(self, caller: _Caller, given: dict[str, Any]) -> None:
        self._watch.note("spot_field_used", str(given.get("name") or given.get("podId") or ""))
        raise GraphQLError(_NO_SPOT, extensions={"code": "SUPPLY_CONSTRAINT"})

    def _stop(self, caller: _Caller, given: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        return self._change(caller, given, "podStop")

    def _resume(self, caller: _Caller, given: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        return self._change(caller, given, "podResume")

    async def _change(self, caller: _Caller, given: dict[str, Any], name: str) -> dict[str, Any]:
        pod = self._find(caller, given)
        if pod is None:
            raise GraphQLError("pod not found", extensions={"code": "POD_NOT_FOUND"})
        self._watch.mutation(pod, name)
        if name == "podStop":
            await self._fleet.stop(pod)
        elif pod.phase in ENDED:
            self._check_resume(caller, pod)
            await self._fleet.restart(pod)
        return self._view(pod)

    def _check_resume(self, caller: _Caller, pod: Pod) -> None:
        if refusal := self._accounts.refusal(caller.account, pod.price):
            text = refusal.replace("deploy this pod", "resume this on-demand pod")
            raise GraphQLError(text, extensions={"code": _CODES[402]})
        try:
            self._operations.check_start(pod)
        except Invalid as exc:
            raise GraphQLError(exc.detail, extensions={"code": _CODES[400]}) from exc

    def _terminate(self, caller: _Caller, given: dict[str, Any]) -> None:
        pod = self._find(caller, given)
        if pod is None or pod.phase is Phase.TERMINATED:
            raise GraphQLError("pod not found to terminate", extensions={"code": "POD_NOT_FOUND"})
        self._watch.mutation(pod, "podTerminate")
        if pod.locked:
            raise GraphQLError("Pod is locked", extensions={"code": "INTERNAL_SERVER_ERROR"})
        self._fleet.terminate(pod)

    def _find(self, caller: _Caller, given: dict[str, Any]) -> Pod | None:
        return self._fleet.find(caller.account, str(given.get("podId"))) if caller.key else None

    def _view(self, pod: Pod) -> dict[str, Any]:
        return pod_view(pod, self._clock.now(), self._config)


class _Caller:
    def __init__(self, key: Key | None, token: str) -> None:
        self.key = key
        self.token = token
        self.account = key.account if key else ""


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else request.query_params.get("api_key", "")


def _rental(given: dict[str, Any], cloud: str) -> Rental:
    count = given.get("gpuCount") or 1
    return Rental(
        name=str(given.get("name") or ""),
        image=str(given.get("imageName") or ""),
        gpu_id=given["gpuTypeId"],
        gpu_count=count,
        cloud=cloud,
        disk=given.get("containerDiskInGb") or 20,
        args=given.get("dockerArgs") or "",
        env={pair["key"]: pair["value"] for pair in given.get("env") or []},
        ports=[port for port in (given.get("ports") or "").split(",") if port],
        min_cuda=given.get("minCudaVersion"),
        allowed_cuda=given.get("allowedCudaVersions") or [],
        min_vcpu_per_gpu=(given.get("minVcpuCount") or 0) // count,
        min_ram_per_gpu=(given.get("minMemoryInGb") or 0) // count,
        data_centers=[given["dataCenterId"]] if given.get("dataCenterId") else [],
    )
