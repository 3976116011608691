"""REST v2, in the order in which RunPod checks a request."""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from openweights_prefect.simulator.config import Key, SimulatorConfig
from openweights_prefect.simulator.faults import Faults, Rule
from openweights_prefect.simulator.fleet import Fleet, pod_facts
from openweights_prefect.simulator.hosts import Inventory, price_per_hour
from openweights_prefect.simulator.logs import follow
from openweights_prefect.simulator.model import Phase, Pod, pod_body
from openweights_prefect.simulator.rates import RateLimit, Verdict
from openweights_prefect.simulator.report import Watch, spent
from openweights_prefect.simulator.store import Store
from openweights_prefect.simulator.validation import Invalid, parse_rental

MOST_BODY_BYTES = 102_400
NO_CAPACITY = (
    "There are no longer any instances available with the requested specifications. "
    "Please refresh and try again."
)
OPENAPI = {
    "openapi": "3.1.0",
    "info": {"title": "Simulated RunPod API", "version": "2"},
    "paths": {
        "/v2/pods": {"get": {}, "post": {}},
        "/v2/pods/{id}": {"get": {}, "delete": {}},
        "/v2/pods/{id}/logs": {"get": {}},
        "/v2/catalog/gpus": {"get": {}},
    },
}
_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    500: "Internal Server Error",
}


class Refused(Exception):
    """An answer that ends a request early."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


class Gateway:
    """Answers `/v2/...`."""

    def __init__(
        self, *, config: SimulatorConfig, fleet: Fleet, faults: Faults, store: Store, watch: Watch
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._faults = faults
        self._store = store
        self._watch = watch
        self._inventory = Inventory()
        self._limits: dict[str, RateLimit] = {}

    async def handle(self, request: Request) -> Response:
        """One request, from the first byte to the answer."""
        headers: dict[str, str] = {}
        try:
            response = await self._answer(request, headers)
        except Refused as refused:
            response = refused.response
        except Invalid as invalid:
            response = problem(invalid.status, invalid.detail, errors=invalid.errors)
        response.headers.update(headers)
        return response

    async def _answer(self, request: Request, headers: dict[str, str]) -> Response:
        agent = request.headers.get("user-agent", "")
        if agent.startswith("Python-urllib/"):
            return PlainTextResponse("error code: 1010", status_code=403)
        body = await _read_body(request)
        path = request.path_params["path"].strip("/").split("/")
        if path == ["openapi.json"] and request.method == "GET":
            return JSONResponse(OPENAPI)
        key = self._authenticate(request)
        self._watch.user_agent(agent)
        verdict = self._limits.setdefault(key.account, RateLimit(self._config.rate_limits)).count(time.time())
        headers.update(verdict.headers)
        if verdict.exceeded:
            return _too_many(verdict)
        if key.scope == "pod" or (key.scope == "read" and request.method != "GET"):
            return problem(403, "access denied")
        return await self._route(request, key, path, body)

    def _authenticate(self, request: Request) -> Key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refused(problem(401, "missing bearer token"))
        pods = self._fleet.state.pods
        if token.startswith("rpa_pod_") and token.removeprefix("rpa_pod_") in pods:
            return Key(pods[token.removeprefix("rpa_pod_")].account, "pod")
        if token not in self._config.keys:
            raise Refused(problem(401, "invalid bearer token"))
        return self._config.keys[token]

    async def _route(self, request: Request, key: Key, path: list[str], body: bytes) -> Response:
        match path:
            case ["pods"]:
                operations = {"GET": "pods.list", "POST": "pods.create"}
            case ["pods", _]:
                operations = {"GET": "pods.get", "DELETE": "pods.delete"}
            case ["pods", _, "logs"]:
                operations = {"GET": "pods.logs"}
            case ["catalog", "gpus"]:
                operations = {"GET": "catalog"}
            case _:
                return problem(404, "resource not found")
        operation = operations.get(request.method)
        if operation is None:
            refused = problem(405, "The requested method is not allowed for this path.")
            refused.headers["Allow"] = ", ".join(operations)
            return refused
        document = _json(body) if operation == "pods.create" else None
        pod = self._fleet.state.pods.get(path[1]) if len(path) > 1 else None
        self._break(operation, document, pod)
        match operation:
            case "pods.create":
                return self._create(key, document)
            case "pods.list":
                return self._list(request, key)
            case "catalog":
                return self._catalog(request)
            case _:
                return self._one(operation, request, key, path[1])

    def _one(self, operation: str, request: Request, key: Key, pod_id: str) -> Response:
        pod = self._fleet.find(key.account, pod_id)
        if pod is None:
            return problem(404, "pod not found")
        if operation == "pods.get":
            return JSONResponse(pod_body(pod, time.time()))
        return self._delete(pod) if operation == "pods.delete" else self._logs(request, pod)

    def _break(self, operation: str, document: object, pod: Pod | None) -> None:
        """The faults that answer in place of the operation."""
        rule = self._faults.take("before", {"op": operation, **_facts(document, pod)})
        if rule is None:
            return
        self._store.record("fault", fault=rule.name, rule=rule.id, op=operation)
        status, detail = int(rule.params.get("status", 500)), str(rule.params.get("detail", "injected fault"))
        if rule.params.get("html"):
            raise Refused(Response(f"<html><body>{detail}</body></html>", status, media_type="text/html"))
        raise Refused(problem(status, detail))

    def _create(self, key: Key, document: object) -> Response:
        if document is None:
            raise Invalid(400, "invalid JSON body")
        rental = parse_rental(document)
        price = price_per_hour(rental.gpu_id, rental.cloud) * rental.gpu_count
        self._check_funds(key.account, price)
        facts = {"op": "pods.create", **_facts(document, None)}
        shortage = self._faults.take("scheduler", facts)
        if shortage is not None:
            self._store.record("fault", fault=shortage.name, rule=shortage.id)
            return problem(
                int(shortage.params.get("status", 400)), str(shortage.params.get("text", NO_CAPACITY))
            )
        host = rental.gpu_count and self._inventory.place(
            self._fleet.state.pods.values(),
            gpu_id=rental.gpu_id,
            count=rental.gpu_count,
            cloud=rental.cloud,
            min_cuda=rental.min_cuda,
            data_centers=rental.data_centers,
        )
        if not host:
            return problem(400, NO_CAPACITY)
        self._watch.name(rental.name)
        pod = self._fleet.rent(key.account, rental, host)
        accident = self._faults.take("after", {**facts, **pod_facts(pod)})
        return self._created(pod) if accident is None else self._created_badly(pod, accident)

    def _created(self, pod: Pod) -> Response:
        return JSONResponse(pod_body(pod, time.time()), status_code=201)

    def _created_badly(self, pod: Pod, rule: Rule) -> Response:
        self._store.record("fault", fault=rule.name, rule=rule.id, pod=pod.id)
        if rule.params.get("body") == "pod":
            return JSONResponse(pod_body(pod, time.time()), status_code=500)
        return problem(500, "failed to read pod")

    def _check_funds(self, account: str, price: float) -> None:
        pods = [pod for pod in self._fleet.state.pods.values() if pod.account == account]
        balance = self._config.balance - spent(self._fleet.state, time.time())
        if balance < price:
            need = (
                f"You need at least ${price:.2f} (current: ${balance:.2f}, deficit: ${price - balance:.2f})."
            )
            raise Invalid(402, f"Insufficient balance to deploy this pod. {need}")
        spending = sum(pod.price for pod in pods if pod.billed_until is None and pod.owner == "client")
        if spending + price > self._config.spend_limit_per_hour:
            raise Invalid(402, "You have exceeded your spending limit.")

    def _list(self, request: Request, key: Key) -> Response:
        pods, now = self._fleet.listed(key.account), time.time()
        size = self._config.page_size or max(1, len(pods))
        cursor = request.query_params.get("cursor", "0")
        start = int(cursor) if cursor.isdecimal() else 0
        more = start + size < len(pods)
        pagination = {"hasNextPage": more, "nextCursor": str(start + size) if more else None}
        page = [pod_body(pod, now) for pod in pods[start : start + size]]
        return JSONResponse({"pods": page, "pagination": pagination})

    def _catalog(self, request: Request) -> Response:
        query = request.query_params
        if ("include" in query) != ("product" in query):
            return problem(400, "include and product must be given together")
        count = query.get("count", "1")
        body = self._inventory.catalogue_body(
            self._fleet.state.pods.values(),
            cloud=query.get("cloud", "SECURE"),
            count=int(count) if count.isdecimal() else 1,
            availability=query.get("include") == "AVAILABILITY",
        )
        return JSONResponse(body)

    def _delete(self, pod: Pod) -> Response:
        self._watch.mutation(pod, "pods.delete")
        if pod.locked:
            return problem(400, "Pod is locked")
        self._fleet.terminate(pod)
        return Response(status_code=204)

    def _logs(self, request: Request, pod: Pod) -> Response:
        tail = request.query_params.get("tail", "100")
        events = follow(
            system=lambda: self._fleet.logs.lines(pod.id),
            container=self._store.pod_folder(pod.id) / "container.log",
            source=request.query_params.get("source", ""),
            tail=min(int(tail), 5000) if tail.isdecimal() else 100,
            alive=lambda: pod.phase is not Phase.TERMINATED and not self._fleet.closing,
        )
        return StreamingResponse(events, media_type="text/event-stream")


def problem(status: int, detail: str, *, errors: list[str] | None = None) -> JSONResponse:
    """An error as `application/problem+json`."""
    body: dict[str, Any] = {"title": _TITLES.get(status, "Error"), "status": status, "detail": detail}
    if errors:
        body["errors"] = errors
    return JSONResponse(body, status_code=status, media_type="application/problem+json")


async def _read_body(request: Request) -> bytes:
    chunks: deque[bytes] = deque()
    size = 0
    declared = request.headers.get("content-length", "0")
    too_large = declared.isdecimal() and int(declared) > MOST_BODY_BYTES
    async for chunk in request.stream():
        size += len(chunk)
        too_large = too_large or size > MOST_BODY_BYTES
        if not too_large:
            chunks.append(chunk)
    if too_large:
        raise Refused(problem(413, f"request body exceeds {MOST_BODY_BYTES} bytes"))
    return b"".join(chunks)


def _too_many(verdict: Verdict) -> Response:
    response = problem(429, f"rate limit exceeded for the {verdict.exceeded} window")
    response.headers["Retry-After"] = str(verdict.retry_after_seconds)
    return response


def _json(body: bytes) -> object:
    try:
        document: object = json.loads(body)
    except ValueError:
        return None
    return document


def _facts(document: object, pod: Pod | None) -> dict[str, str]:
    if pod is not None:
        return pod_facts(pod)
    body = document if isinstance(document, dict) else {}
    gpu = body.get("gpu")
    return {
        "name": str(body.get("name", "")),
        "image": str(body.get("image", "")),
        "cloud": str(body.get("cloud", "SECURE")),
        "gpu": str(gpu.get("id", "")) if isinstance(gpu, dict) else "",
    }
