"""What RunPod's answers mean: values from the good ones, errors from the others."""

from __future__ import annotations

import re
from datetime import datetime
from http import HTTPStatus
from typing import Any, NamedTuple, get_args

import httpx

from openweights_prefect.errors import ProviderError
from openweights_prefect.provisioning.hardware import gpu_by_id
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    Availability,
    Cloud,
    InsufficientFunds,
    NoCapacity,
    Offer,
    ProviderOutage,
    ProviderPod,
    RateLimited,
    RequestRejected,
    Unauthorized,
)

_DEFAULT_WAIT_SECONDS = 10.0
# A 400 has no code: these are the texts recorded from RunPod, matched without regard to case.
_BUG = (
    "is not defined by type",
    "got invalid value",
    "mutually exclusive",
    "missing property",
    "is not a valid",
)
_CAPACITY = (
    "no longer any instances available",
    "no instances currently available",
    "no instances available",
    "does not have the resources",
    "try a different machine",
    "not enough free gpus",
    "insufficient resources",
    "supply_constraint",
    "out of stock",
)
_UNKNOWN_OUTCOME = ("something went wrong",)
# RunPod's own translation layer rejects a field that it added itself: every create fails, whatever is asked.
_SCHEMA_OUTAGE = ("got invalid value", "is not defined by type")
_QUOTED_REQUEST = re.compile(r"\{.*\}", re.DOTALL)
_EXHAUSTED_WINDOW = re.compile(r";\s*r=0\s*;\s*t=(\d+)")


class PodPage(NamedTuple):
    """One page of a list."""

    pods: list[ProviderPod]
    next_cursor: str | None


def refused_creation(response: httpx.Response, name: str) -> ProviderError:
    """The error for any answer to a create but 201; only a clear refusal says that nothing was created."""
    status, detail = response.status_code, _detail(response)
    said = f"RunPod answered {status} to the creation of {name!r}: {detail}"
    plain = {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.PAYMENT_REQUIRED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
    if status in plain or status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return failed(response, f"the creation of {name!r}")
    clean = 400 <= status < 500 and status != HTTPStatus.REQUEST_TIMEOUT and _problem(response) is not None
    text = detail.lower()
    if not clean or any(fragment in text for fragment in _UNKNOWN_OUTCOME):
        return Ambiguous(f"{said}. It may exist all the same: look for that name.")
    if status != HTTPStatus.BAD_REQUEST:
        return RequestRejected(f"{said}. Mend the request.")
    if all(fragment in text for fragment in _SCHEMA_OUTAGE):
        return ProviderOutage(f"{said}. RunPod fails every creation with this; wait.")
    if any(fragment in text for fragment in _BUG):
        return RequestRejected(f"{said}. Mend the request.")
    recognized = any(fragment in text for fragment in _CAPACITY)
    return NoCapacity(f"{said}. Try the next offer.", recognized=recognized)


def failed(response: httpx.Response, what: str) -> ProviderError:
    """The error for a bad answer, by its status."""
    status = response.status_code
    said = f"RunPod answered {status} to {what}: {_detail(response)}"
    if status == HTTPStatus.UNAUTHORIZED:
        return Unauthorized(f"{said}. Set RUNPOD_API_KEY to a valid key.")
    if status == HTTPStatus.FORBIDDEN:
        return Unauthorized(f"{said}. The key in RUNPOD_API_KEY may not do this.")
    if status == HTTPStatus.PAYMENT_REQUIRED:
        return InsufficientFunds(f"{said}. Add credit to the account, or raise its spending limit.")
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return RateLimited(f"{said}. Ask less often.", retry_after_seconds=_retry_after_seconds(response))
    if 400 <= status < 500:
        return RequestRejected(f"{said}.")
    return ProviderOutage(f"{said}. Try again later.")


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
    if not isinstance(price, int | float) or not price or not isinstance(most, int):
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
    )


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


def _problem(response: httpx.Response) -> dict[str, Any] | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) and ("detail" in body or "title" in body) else None


def _detail(response: httpx.Response) -> str:
    problem = _problem(response)
    if problem is None:
        return (
            HTTPStatus(response.status_code).phrase
            if response.status_code in set(HTTPStatus)
            else "no reason given"
        )
    errors = problem.get("errors")
    listed = f" ({'; '.join(map(str, errors))})" if isinstance(errors, list) and errors else ""
    # RunPod quotes the whole request in some refusals, with the environment in it.
    text = _QUOTED_REQUEST.sub("{...}", f"{problem.get('detail') or problem.get('title')}{listed}")
    return text.rstrip(".")[:500]


def _retry_after_seconds(response: httpx.Response) -> float:
    waits = [float(seconds) for seconds in _EXHAUSTED_WINDOW.findall(response.headers.get("RateLimit", ""))]
    header = response.headers.get("Retry-After", "")
    if header.isdecimal():
        waits.append(float(header))
    return max(waits, default=_DEFAULT_WAIT_SECONDS)


def _time(value: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
