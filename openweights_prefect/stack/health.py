"""Asks the stack's HTTP services of this machine whether they work."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from openweights_prefect.settings import Settings

_TIMEOUT_SECONDS = 5.0


class Answer(NamedTuple):
    """What a server answered."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body as JSON, None when it is not."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


def ask(url: str, *, headers: Mapping[str, str] | None = None, payload: object = None) -> Answer | None:
    """GET `url`, or POST the payload as JSON; None when nobody answers in time. Proxies are not used."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = connect(parts.hostname or "", parts.port, timeout=_TIMEOUT_SECONDS)
    body = None if payload is None else json.dumps(payload)
    all_headers = {"Content-Type": "application/json", **(headers or {})}
    try:
        connection.request("GET" if body is None else "POST", parts.path or "/", body, all_headers)
        response = connection.getresponse()
        return Answer(response.status, response.read())
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def answers(url: str, *, expected: int = 200) -> bool:
    """Whether GET is answered with the expected status."""
    answer = ask(url)
    return answer is not None and answer.status == expected


def ask_prefect(settings: Settings, path: str, *, payload: object = None) -> Answer | None:
    """Ask the Prefect API of the settings, with their credential as Prefect's own client sends it."""
    headers = {}
    if settings.prefect_api_key:
        headers["Authorization"] = f"Bearer {settings.prefect_api_key}"
    elif settings.prefect_auth:
        headers["Authorization"] = f"Basic {base64.b64encode(settings.prefect_auth.encode()).decode()}"
    return ask(f"{settings.prefect_api_url}{path}", headers=headers, payload=payload)


def prefect_workers(settings: Settings) -> list[dict[str, Any]]:
    """The workers that Prefect knows in the pool; empty when it knows none or does not answer."""
    answer = ask_prefect(settings, f"/work_pools/{settings.work_pool}/workers/filter", payload={})
    workers = answer.json() if answer is not None and answer.status == 200 else None
    return workers if isinstance(workers, list) else []


def is_online(worker: Mapping[str, Any], *, since: float = 0.0) -> bool:
    """Whether the worker has sent a heartbeat lately, and one after `since` (epoch seconds)."""
    heartbeat = str(worker.get("last_heartbeat_time") or "")
    if worker.get("status") != "ONLINE" or not heartbeat:
        return False
    return datetime.fromisoformat(heartbeat) >= datetime.fromtimestamp(since, UTC)
