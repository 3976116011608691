"""What RunPod's good answers say. One that cannot be read is an error, never a shorter list."""

from __future__ import annotations

import re
from datetime import datetime
from http import HTTPStatus
from typing import Any, NamedTuple, get_args

import httpx

from openweights_prefect.provisioning.hardware import gpu_by_id
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    Availability,
    Cloud,
    Offer,
    ProviderOutage,
    ProviderPod,
)

# Machines in Argentina are known for a network that cannot be worked with; US-AR would be Arkansas.
_UNUSABLE_PLACE = re.compile(r"(?!US-)(\w+-)?AR-")


class PodPage(NamedTuple):
    """One page of a list."""

    pods: list[ProviderPod]
    next_cursor: str | None


def created_pod(response: httpx.Response, name: str) -> ProviderPod:
    """The pod of a 201; an unreadable one exists nevertheless."""
    try:
        pod = _pod(_object(response))
    except ProviderOutage as exc:
        raise Ambiguous(f"{name!r} was created, but the answer cannot be read. Look for that name.") from exc
    if pod.name != name:
        raise Ambiguous(f"Asked for {name!r}, and the answer names {pod.name!r}. Look for the former.")
    return pod


def one_pod(response: httpx.Response) -> ProviderPod:
    """The pod of a GET."""
    return _pod(_object(response))


def pod_page(response: httpx.Response) -> PodPage:
    """A page of pods; raises when it is not one, or holds an entry without id, rather than seem shorter."""
    body = _object(response)
    entries = body.get("pods")
    if not isinstance(entries, list):
        raise _unreadable(response)
    pagination = _mapping(body.get("pagination"))
    cursor = pagination.get("nextCursor")
    if pagination.get("hasNextPage") and not cursor:
        raise ProviderOutage("The list of pods goes on, but without a cursor. Treat it as unknown.")
    more = bool(pagination.get("hasNextPage", cursor))
    return PodPage([_pod(entry) for entry in entries], str(cursor) if more else None)


def specification(response: httpx.Response) -> dict[str, Any]:
    """RunPod's OpenAPI document."""
    if response.status_code != HTTPStatus.OK:
        raise ProviderOutage(f"RunPod answered {response.status_code} to GET /openapi.json.")
    document = _object(response)
    if not isinstance(document.get("paths"), dict):
        raise _unreadable(response)
    return document


def offers(response: httpx.Response, cloud: Cloud) -> list[Offer]:
    """One offer for each number of cards of each type that this cloud sells; other prices mean nothing."""
    entries = _object(response).get("gpus")
    if not isinstance(entries, list):
        raise _unreadable(response)
    return [offer for entry in entries if isinstance(entry, dict) for offer in _offers_of(entry, cloud)]


def _offers_of(entry: dict[str, Any], cloud: Cloud) -> list[Offer]:
    tier = cloud.lower()
    gpu_id, price = entry.get("id"), _mapping(entry.get("price")).get(tier)
    most = _mapping(entry.get("maxCount")).get(tier)
    if not isinstance(gpu_id, str) or gpu_id == "unknown" or not entry.get(tier):
        return []
    if not isinstance(price, int | float) or not price or not isinstance(most, int) or _is_unusable(entry):
        return []
    known = gpu_by_id(gpu_id)
    return [
        Offer(
            gpu_id=gpu_id,
            gpu_name=known.name if known else str(entry.get("name") or gpu_id),
            count=count,
            cloud=cloud,
            price_per_hour=round(price * count, 6),
            memory_gb=int(entry.get("memory") or 0) * count,
            availability=_availability(entry.get("availability")),
        )
        for count in range(1, most + 1)
    ]


def _is_unusable(entry: dict[str, Any]) -> bool:
    """Everything of it is in an unusable place; community machines are in none that is named."""
    places = entry.get("dataCenters")
    if not isinstance(places, list) or not places:
        return False
    return all(_UNUSABLE_PLACE.match(str(_mapping(place).get("id"))) for place in places)


def _availability(word: object) -> Availability:
    known: tuple[Availability, ...] = get_args(Availability)
    return next((level for level in known if level == word), "NONE")


def _pod(entry: object) -> ProviderPod:
    body = _mapping(entry)
    pod_id = body.get("id")
    if not isinstance(pod_id, str) or not pod_id:
        raise ProviderOutage("RunPod sent a pod without an id. Treat the answer as unknown.")
    gpu, runtime = _mapping(body.get("gpu")), _mapping(body.get("runtime"))
    return ProviderPod(
        id=pod_id,
        name=str(body.get("name") or ""),
        status=str(body.get("status") or ""),
        cost_per_hour=float(_number(body.get("cost"))),
        created_at=_time(body.get("createdAt")),
        runtime_up=_number(runtime.get("uptime")) > 0,
        image=str(body.get("image") or ""),
        gpu_id=str(gpu.get("id") or ""),
        gpu_count=int(_number(gpu.get("count"))),
        host=_host(pod_id, _mapping(body.get("ssh"))),
        cuda=_text(body.get("cudaVersion")),
        vcpu=int(_number(gpu.get("vcpuCount"))),
        ram_gb=int(_number(gpu.get("memory"))),
    )


def _host(pod_id: str, ssh: dict[str, Any]) -> str | None:
    """REST v2 does not name the machine: the proxy's user does, `<pod>-<machine>`, and the address almost."""
    user = _text(_mapping(ssh.get("proxy")).get("username")) or ""
    machine = user.removeprefix(f"{pod_id}-")
    if machine and machine != user:
        return machine
    return _text(_mapping(ssh.get("direct")).get("host"))


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError as exc:
        raise _unreadable(response) from exc
    if not isinstance(body, dict):
        raise _unreadable(response)
    return body


def _unreadable(response: httpx.Response) -> ProviderOutage:
    # The body is not quoted: a list holds the environment of other people's pods.
    path = response.request.url.path
    return ProviderOutage(
        f"RunPod's answer ({response.status_code}) for {path!r} is not of the expected form."
    )


def _time(value: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
