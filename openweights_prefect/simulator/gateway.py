"""REST v2, in the order in which RunPod checks a request."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from openweights_prefect.simulator.accounts import Accounts
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.config import Key, SimulatorConfig
from openweights_prefect.simulator.faults import Faults
from openweights_prefect.simulator.model import Pod, pod_facts
from openweights_prefect.simulator.operations import OPERATIONS, Call, Operations
from openweights_prefect.simulator.problems import OUTAGE, problem
from openweights_prefect.simulator.rates import RateLimit, Verdict
from openweights_prefect.simulator.report import Watch
from openweights_prefect.simulator.store import State, Store
from openweights_prefect.simulator.transport import Connections, Dropped, spoiled
from openweights_prefect.simulator.validation import Invalid

MOST_BODY_BYTES = 102_400
OPENAPI = Path(__file__).with_name("openapi.json")


class Refused(Exception):
    """An answer that ends a request early."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


class Gateway:
    """Answers `/v2/...`."""

    def __init__(
        self,
        *,
        config: SimulatorConfig,
        clock: Clock,
        state: State,
        faults: Faults,
        store: Store,
        accounts: Accounts,
        operations: Operations,
        watch: Watch,
        connections: Connections,
    ) -> None:
        self._config = config
        self._clock = clock
        self._state = state
        self._faults = faults
        self._store = store
        self._accounts = accounts
        self._operations = operations
        self._watch = watch
        self._connections = connections
        self._limits: dict[str, RateLimit] = {}

    async def handle(self, request: Request) -> Response:
        """One request, from the first byte to the answer."""
        path = request.path_params["path"].strip("/").split("/")
        operation = operation_of(request.method, path)
        pod = self._state.pods.get(path[1]) if len(path) > 1 else None
        facts = {"op": operation or "", **(pod_facts(pod) if pod else {})}
        accident = self._faults.take("transport", facts)
        if accident is not None:
            self._store.record("fault", fault=accident.name, rule=accident.id, op=operation)
            if accident.name in ("refuse", "hang"):
                hold = accident.number("seconds", 120) if accident.name == "hang" else 0
                return Dropped(self._connections, self._clock, hold_seconds=hold)
        headers: dict[str, str] = {}
        try:
            response = await self._answer(request, path, headers)
        except Refused as refused:
            response = refused.response
        except Invalid as invalid:
            response = problem(invalid.status, invalid.detail, errors=invalid.errors)
        response.headers.update(headers)
        return response if accident is None else spoiled(response, accident, self._clock)

    async def _answer(self, request: Request, path: list[str], headers: dict[str, str]) -> Response:
        agent = request.headers.get("user-agent", "")
        if agent.startswith("Python-urllib/"):
            return PlainTextResponse("error code: 1010", status_code=403)
        body = await _read_body(request)
        if path == ["openapi.json"] and request.method == "GET":
            return Response(OPENAPI.read_bytes(), media_type="application/json")
        operation = operation_of(request.method, path)
        key = self._authenticate(request, operation)
        self._watch.request(operation or "unknown", agent, key.account)
        if any(token in str(request.url) for token in self._config.keys):
            self._watch.note("key_in_url", operation or "unknown")
        verdict = self._count(key.account)
        headers.update(verdict.headers)
        if verdict.exceeded:
            self._watch.refused(key.account, verdict.retry_after_seconds)
            return too_many(verdict.exceeded, verdict.retry_after_seconds)
        if key.scope == "pod" or (key.scope == "read" and request.method != "GET"):
            return problem(403, "access denied")
        if operation is None:
            return _no_route(path)
        return await self._operate(request, key, operation, path, body)

    def _count(self, account: str) -> Verdict:
        limit = self._limits.get(account)
        if limit is None:
            limit = RateLimit(self._config.rate_limits, others_per_minute=self._config.background_rpm)
            self._limits[account] = limit
        return limit.count(self._clock.now())

    def _authenticate(self, request: Request, operation: str | None) -> Key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refused(problem(401, "missing bearer token"))
        key = self._accounts.key(token)
        if key is not None:
            rule = self._faults.take("account", {"op": operation or ""})
            if rule is not None:
                self._store.record("fault", fault=rule.name, rule=rule.id, account=key.account)
                self._accounts.strike(rule, token, key.account)
                key = self._accounts.key(token)
        if key is None:
            raise Refused(problem(401, "invalid bearer token"))
        return key

    async def _operate(
        self, request: Request, key: Key, operation: str, path: list[str], body: bytes
    ) -> Response:
        document = _json(body) if request.method in ("POST", "PATCH", "PUT") else None
        pod = self._state.pods.get(path[1]) if len(path) > 1 else None
        self._break(operation, document, pod, key.account)
        if request.method in ("POST", "PATCH", "PUT") and document is None:
            raise Invalid(400, "invalid JSON body")
        target = path[1] if len(path) > 1 else ""
        return await self._operations.run(Call(operation, key.account, target, document, request))

    def _break(self, operation: str, document: object, pod: Pod | None, account: str) -> None:
        """The faults that answer in place of the operation."""
        rule = self._faults.take("before", {"op": operation, **_facts(document, pod)})
        if rule is None:
            return
        self._store.record("fault", fault=rule.name, rule=rule.id, op=operation)
        if rule.name == "schema_outage":
            raise Refused(problem(400, OUTAGE))
        if rule.name == "rate_limited":
            seconds = int(rule.number("retry_after", 12))
            self._watch.refused(account, seconds)
            raise Refused(too_many(str(rule.params.get("window", "minute")), seconds))
        status, detail = int(rule.number("status", 500)), str(rule.params.get("detail", "injected fault"))
        if rule.params.get("html"):
            raise Refused(Response(f"<html><body>{detail}</body></html>", status, media_type="text/html"))
        raise Refused(problem(status, detail))


def operation_of(method: str, path: list[str]) -> str | None:
    """The name of an operation, as fault rules have it; None for a path or method that is not there."""
    return _methods(path).get(method)


def too_many(window: str, retry_after_seconds: int) -> Response:
    """The 429 of a window that is used up."""
    response = problem(429, f"rate limit exceeded for the {window} window")
    response.headers["Retry-After"] = str(retry_after_seconds)
    return response


def _methods(path: list[str]) -> dict[str, str]:
    for pattern, operations in OPERATIONS.items():
        words = pattern.split("/")
        if len(words) == len(path) and all(
            word in ("*", given) and given for word, given in zip(words, path, strict=True)
        ):
            return operations
    return {}


def _no_route(path: list[str]) -> Response:
    methods = _methods(path)
    if not methods:
        return problem(404, "resource not found")
    refused = problem(405, "The requested method is not allowed for this path.")
    refused.headers["Allow"] = ", ".join(methods)
    return refused


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


def _json(body: bytes) -> object:
    try:
        document: object = json.loads(body)
    except ValueError:
        return None
    return document


def _facts(document: object, pod: Pod | None) -> dict[str, str]:
    if pod is not None:
        return pod_facts(pod)
    body: dict[str, Any] = document if isinstance(document, dict) else {}
    gpu = body.get("gpu")
    return {
        "name": str(body.get("name", "")),
        "image": str(body.get("image", "")),
        "cloud": str(body.get("cloud", "SECURE")),
        "gpu": str(gpu.get("id", "")) if isinstance(gpu, dict) else "",
    }
