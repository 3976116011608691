"""What the operations of REST v2 do, once a request has passed all checks of its outside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from openweights_prefect.simulator.bills import billing_body, parse_query
from openweights_prefect.simulator.clock import Clock
from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.faults import Faults, Rule
from openweights_prefect.simulator.fleet import Fleet
from openweights_prefect.simulator.hosts import Inventory
from openweights_prefect.simulator.logs import follow
from openweights_prefect.simulator.market import Market
from openweights_prefect.simulator.model import ENDED, Phase, Pod, pod_facts
from openweights_prefect.simulator.problems import problem
from openweights_prefect.simulator.projection import allowed_actions, pod_body, status_of
from openweights_prefect.simulator.report import Watch
from openweights_prefect.simulator.store import Store
from openweights_prefect.simulator.transport import Connections, Dropped
from openweights_prefect.simulator.validation import Invalid, apply_patch, parse_action, parse_rental

OPERATIONS = {
    "pods": {"GET": "pods.list", "POST": "pods.create"},
    "pods/*": {"GET": "pods.get", "PATCH": "pods.patch", "DELETE": "pods.delete"},
    "pods/*/action": {"POST": "pods.action"},
    "pods/*/logs": {"GET": "pods.logs"},
    "catalog/gpus": {"GET": "catalog"},
    "billing/pods": {"GET": "billing"},
    "account/ssh-keys": {"GET": "ssh_keys.get", "PUT": "ssh_keys.put"},
    "registries/*": {"DELETE": "registries.delete"},
}
"""Path to method to the operation's name; a fault rule's `op` is one of these."""

_NO_FREE_GPUS = "There are not enough free GPUs on the host machine to start this pod."


@dataclass(frozen=True)
class Call:
    """An operation that somebody may do."""

    operation: str
    account: str
    target: str
    """Id in the path."""
    document: object
    request: Request


class Operations:
    """The operations by their names."""

    def __init__(
        self,
        *,
        config: SimulatorConfig,
        clock: Clock,
        fleet: Fleet,
        faults: Faults,
        store: Store,
        market: Market,
        inventory: Inventory,
        watch: Watch,
        connections: Connections,
    ) -> None:
        self._config = config
        self._clock = clock
        self._fleet = fleet
        self._faults = faults
        self._store = store
        self._market = market
        self._inventory = inventory
        self._watch = watch
        self._connections = connections
        self._plain: dict[str, Callable[[Call], Response]] = {
            "pods.create": self._create,
            "pods.list": self._list,
            "catalog": self._catalog,
            "billing": self._billing,
            "ssh_keys.get": lambda call: JSONResponse({"keys": []}),
            "ssh_keys.put": self._replace_ssh_keys,
            "registries.delete": self._delete_registry,
        }
        self._on_pod: dict[str, Callable[[Call, Pod], Response]] = {
            "pods.get": self._get,
            "pods.delete": self._delete,
            "pods.logs": self._logs,
        }

    async def run(self, call: Call) -> Response:
        """The answer of an operation; raises `Invalid`."""
        if call.operation in self._plain:
            return self._plain[call.operation](call)
        pod = self._fleet.find(call.account, call.target)
        if pod is None:
            if call.operation == "pods.get":
                self._watch.asked(call.target)
            return problem(404, "pod not found")
        if call.operation in ("pods.patch", "pods.action", "pods.delete"):
            self._watch.mutation(pod, call.operation)
            if pod.owner == "foreign" and self._config.foreign_policy == "deny":
                return problem(403, "access denied")
        if call.operation == "pods.action":
            return await self._act(call, pod)
        if call.operation == "pods.patch":
            return await self._patch(call, pod)
        return self._on_pod[call.operation](call, pod)

    def _create(self, call: Call) -> Response:
        rental = parse_rental(call.document, self._config)
        self._watch.create(call.account, call.document, rental.name)
        pod, accident = self._market.buy(call.account, rental)
        answer = JSONResponse(self._body(pod, "pods.create", fresh=True), status_code=201)
        if accident is None or accident.name == "duplicate_create":
            return answer
        self._watch.unclear(call.account, call.document)
        return self._created_badly(answer, accident)

    def _created_badly(self, answer: JSONResponse, accident: Rule) -> Response:
        match accident.name:
            case "created_but_timeout":
                hold = accident.number("hold_s", 120)
                return Dropped(self._connections, self._clock, hold_seconds=hold)
            case "created_but_reset":
                return Dropped(self._connections, self._clock)
        if accident.params.get("body") == "pod":
            answer.status_code = 500
            return answer
        return problem(500, "failed to read pod")

    def _list(self, call: Call) -> Response:
        self._watch.listed(call.account)
        pods = self._fleet.listed(call.account)
        rule = self._faults.take("read", {"op": "pods.list"}, among=("list_truncated", "list_page_size"))
        size, hidden = self._config.page_size or max(1, len(pods)), 0
        if rule is not None:
            self._store.record("fault", fault=rule.name, rule=rule.id)
            kept = len(pods) - math.ceil(len(pods) * rule.number("fraction", 0.5))
            if rule.name == "list_page_size":
                size = int(rule.number("n", 1))
            elif rule.params.get("cursor"):
                size = max(1, kept)
            else:
                hidden = len(pods) - kept
        cursor = call.request.query_params.get("cursor", "0")
        start = int(cursor) if cursor.isdecimal() else 0
        shown = pods[: len(pods) - hidden]
        more = start + size < len(shown)
        pagination = {"hasNextPage": more, "nextCursor": str(start + size) if more else None}
        page = shown[start : start + size]
        for pod in page:
            self._fleet.told(pod)
        return JSONResponse(
            {"pods": [self._body(pod, "pods.list") for pod in page], "pagination": pagination}
        )

    def _get(self, call: Call, pod: Pod) -> Response:
        self._watch.asked(pod.id)
        return JSONResponse(self._body(pod, "pods.get"))

    def _delete(self, call: Call, pod: Pod) -> Response:
        if pod.locked:
            return problem(400, "Pod is locked")
        accident = self._faults.take("after", {"op": "pods.delete", **pod_facts(pod)})
        if accident is not None:
            self._store.record("fault", fault=accident.name, rule=accident.id, pod=pod.id)
        name = "" if accident is None else accident.name
        if name == "delete_404":
            return problem(404, "pod not found")
        if name != "delete_ignored":
            self._fleet.terminate(pod)
        return problem(500, "failed to delete pod") if name == "delete_500" else Response(status_code=204)

    async def _act(self, call: Call, pod: Pod) -> Response:
        action = parse_action(call.document)
        if action not in allowed_actions(pod, self._config):
            status = status_of(pod, self._config)
            return problem(409, f'action "{action}" is not valid for pod status {status}')
        if pod.locked and action != "start":
            return problem(400, "Pod is locked")
        match action:
            case "terminate":
                self._fleet.terminate(pod)
                return Response(status_code=204)
            case "stop":
                await self._fleet.stop(pod)
            case "start":
                self.check_start(pod)
                await self._fleet.restart(pod)
            case "restart":
                await self._fleet.restart(pod)
        return JSONResponse(self._body(pod, "pods.action"))

    def check_start(self, pod: Pod) -> None:
        """Whether the host of a stopped pod has cards for it; raises `Invalid`, or leaves it without any."""
        free = self._inventory.free_gpus(pod.host, self._fleet.state.pods.values())
        if free >= pod.gpu_count:
            return
        if self._config.start_no_gpu == "error":
            raise Invalid(400, _NO_FREE_GPUS)
        pod.gpu_count = 0

    async def _patch(self, call: Call, pod: Pod) -> Response:
        if apply_patch(pod, call.document) and pod.phase not in ENDED:
            await self._fleet.restart(pod)
        self._fleet.save()
        return JSONResponse(self._body(pod, "pods.patch"))

    def _logs(self, call: Call, pod: Pod) -> Response:
        query = call.request.query_params
        tail = query.get("tail", "100")
        events = follow(
            lambda: self._fleet.logs.lines(pod.id),
            source=query.get("source", ""),
            tail=min(int(tail), 5000) if tail.isdecimal() else 100,
            after=call.request.headers.get("last-event-id") or query.get("since", ""),
            alive=lambda: pod.phase is not Phase.TERMINATED and not self._fleet.closing,
        )
        return StreamingResponse(events, media_type="text/event-stream")

    def _catalog(self, call: Call) -> Response:
        query = call.request.query_params
        if ("include" in query) != ("product" in query):
            return problem(400, "include and product must be given together")
        count = query.get("count", "1")
        body = self._inventory.catalogue_body(
            self._fleet.state.pods.values(),
            cloud=query.get("cloud", "SECURE"),
            count=int(count) if count.isdecimal() else 1,
            availability=query.get("include") == "AVAILABILITY",
            faults=self._faults,
        )
        return JSONResponse(body)

    def _billing(self, call: Call) -> Response:
        try:
            query = parse_query(call.request.query_params, self._clock.now())
        except ValueError as exc:
            return problem(400, str(exc))
        return JSONResponse(billing_body(self._store.bills(self._fleet.state, call.account), query))

    def _replace_ssh_keys(self, call: Call) -> Response:
        self._watch.note("ssh_keys_replaced", call.account)
        return JSONResponse({"keys": []})

    def _delete_registry(self, call: Call) -> Response:
        if call.target in self._config.foreign_registries:
            self._watch.note("registry_deleted_foreign", call.target)
        elif call.target not in self._config.registries:
            return problem(404, "resource not found")
        return Response(status_code=204)

    def _body(self, pod: Pod, operation: str, *, fresh: bool = False) -> dict[str, Any]:
        rule = self._faults.take("response", {"op": operation, **pod_facts(pod)})
        skew = 0.0 if rule is None else rule.number("seconds", 3600)
        return pod_body(pod, self._clock.now(), self._config, skew_seconds=skew, fresh=fresh)
