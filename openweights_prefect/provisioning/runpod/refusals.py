"""What RunPod's other answers mean: each a `ProviderError` that says whether something was created."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import httpx

from openweights_prefect.errors import ProviderError
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    InsufficientFunds,
    NoCapacity,
    ProviderOutage,
    RateLimited,
    RequestRejected,
    Unauthorized,
)
from openweights_prefect.provisioning.runpod.rates import retry_after_seconds

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
    "no instances",
    "no capacity",
    "does not have the resources",
    "resources to deploy",
    "try a different machine",
    "not enough free gpus",
    "insufficient resources",
    "supply_constraint",
    "out of stock",
)
_FUNDS = (
    "insufficient balance",
    "insufficient funds",
    "spending limit",
    "spend limit",
    "budget limit",
    "exceeded your",
)
# This account has no such type; it may have the next one.
_UNKNOWN_TYPE = "unknown gpu type"
_UNKNOWN_OUTCOME = ("something went wrong",)
# RunPod's own translation layer rejects a field that it added itself: every create fails, whatever is asked.
_SCHEMA_OUTAGE = ("got invalid value", "is not defined by type")
_REASON = re.compile(r'Field "\w{1,50}" is not defined by type "\w{1,50}"')
_ADD_CREDIT = "Add credit to the account, or raise its spending limit."
_LONGEST_QUOTE = 500
_SHORTEST_VALUE = 4
"""A shorter value of an environment is no secret, and part of too many words."""


def refused_creation(response: httpx.Response, name: str, *, unsaid: Iterable[str] = ()) -> ProviderError:
    """The error for any answer to a create but 201; only a clear refusal says that nothing was created.

    `unsaid` are the values of the request that no message may repeat.
    """
    status, detail = response.status_code, _detail(response)
    said = f"RunPod answered {status} to the creation of {name!r}: {_quotable(_without(detail, unsaid))}"
    plain = {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.PAYMENT_REQUIRED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    }
    if status in plain:
        return _by_status(response, said)
    clean = 400 <= status < 500 and status != HTTPStatus.REQUEST_TIMEOUT and _problem(response) is not None
    text = detail.lower()
    if not clean or _has(text, _UNKNOWN_OUTCOME):
        return Ambiguous(f"{said}. It may exist all the same: look for that name.")
    if _UNKNOWN_TYPE in text:
        return NoCapacity(f"{said}. Try the next offer.", recognized=False)
    if status != HTTPStatus.BAD_REQUEST:
        return RequestRejected(f"{said}. Mend the request.")
    return _refused_by_its_words(text, said)


def _refused_by_its_words(text: str, said: str) -> ProviderError:
    if all(fragment in text for fragment in _SCHEMA_OUTAGE):
        return ProviderOutage(f"{said}. RunPod fails every creation with this; wait.")
    if _has(text, _BUG):
        return RequestRejected(f"{said}. Mend the request.")
    if _has(text, _FUNDS):
        return InsufficientFunds(f"{said}. {_ADD_CREDIT}")
    return NoCapacity(f"{said}. Try the next offer.", recognized=_has(text, _CAPACITY))


def failed(response: httpx.Response, what: str) -> ProviderError:
    """The error for a bad answer, by its status."""
    return _by_status(
        response, f"RunPod answered {response.status_code} to {what}: {_quotable(_detail(response))}"
    )


def _by_status(response: httpx.Response, said: str) -> ProviderError:
    status = response.status_code
    if status == HTTPStatus.UNAUTHORIZED:
        return Unauthorized(f"{said}. Set RUNPOD_API_KEY to a valid key.")
    if status == HTTPStatus.FORBIDDEN:
        return Unauthorized(f"{said}. The key in RUNPOD_API_KEY may not do this.")
    if status == HTTPStatus.PAYMENT_REQUIRED:
        return InsufficientFunds(f"{said}. {_ADD_CREDIT}")
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        wait = retry_after_seconds(response.headers)
        return RateLimited(f"{said}. Ask less often.", retry_after_seconds=wait)
    if 400 <= status < 500:
        return RequestRejected(f"{said}.")
    return ProviderOutage(f"{said}. Try again later.")


def _problem(response: httpx.Response) -> dict[str, Any] | None:
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) and ("detail" in body or "title" in body) else None


def _detail(response: httpx.Response) -> str:
    """The reason in RunPod's words: to be understood, not to be repeated as it is."""
    problem = _problem(response)
    if problem is None:
        return (
            HTTPStatus(response.status_code).phrase
            if response.status_code in set(HTTPStatus)
            else "no reason given"
        )
    errors = problem.get("errors")
    listed = f" ({'; '.join(map(str, errors))})" if isinstance(errors, list) and errors else ""
    return f"{problem.get('detail') or problem.get('title')}{listed}"


def _quotable(text: str) -> str:
    """RunPod quotes the whole request in some refusals, with the environment in it, and may cut it short.

    Where that ends cannot be told, for a value may hold any brace: of what follows, only the reason is kept.
    """
    said, brace, quoted = text.partition("{")
    if brace:
        reason = _REASON.search(quoted)
        said += "{...}" + (f"; {reason[0]}" if reason else "")
    return said.rstrip(".")[:_LONGEST_QUOTE]


def _without(text: str, values: Iterable[str]) -> str:
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST_VALUE:
            text = text.replace(value, "...")
    return text


def _has(text: str, fragments: Iterable[str]) -> bool:
    return any(fragment in text for fragment in fragments)
