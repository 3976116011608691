"""What happens to pods is in Prefect's event feed; against a real server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from openweights_prefect.orchestration.deployments import ensure_work_pool
from openweights_prefect.orchestration.pod_events import PodEvents
from tests.credentials.prefect_server import PrefectServer

KINDS = ("created", "active", "lost", "ended")


async def emit_life(url: str, worker_id: str) -> None:
    async with PrefectClient(url) as client:
        await ensure_work_pool(client, "openweights")
        events = PodEvents(client, work_pool="openweights", organization_id="an-organization")
        for kind in KINDS:
            details = {"runpod_id": "abc", "job": "job-1", "hardware": "1x L4", "price_per_hour": "0.4"}
            events.emit(kind, worker_id, {**details, "env": "HF_TOKEN=x", "token": "owb_secret"})
        events.emit("created", worker_id, {"runpod_id": "abc"})  # Seen by another worker, too.
        await events.close()


def found(url: str, worker_id: str) -> list[dict[str, Any]]:
    wanted = {"event": {"prefix": ["openweights.pod."]}, "resource": {"id": [f"openweights.pod.{worker_id}"]}}
    answer = httpx.post(f"{url}/events/filter", json={"filter": wanted, "limit": 50}, trust_env=False)
    answer.raise_for_status()
    events: list[dict[str, Any]] = answer.json()["events"]
    return events


def test_the_life_of_a_pod_can_be_read_and_matched(prefect_server: PrefectServer) -> None:
    """Each step once, with its work pool, job, hardware and price, and nothing secret."""
    asyncio.run(emit_life(prefect_server.url, "pod-1"))
    deadline = time.monotonic() + 20
    while len(events := found(prefect_server.url, "pod-1")) < len(KINDS):
        assert time.monotonic() < deadline, events
        time.sleep(0.1)
    assert sorted(event["event"] for event in events) == sorted(f"openweights.pod.{kind}" for kind in KINDS)
    [lost] = [event for event in events if event["event"] == "openweights.pod.lost"]
    assert lost["resource"]["openweights.hardware"] == "1x L4"
    assert lost["resource"]["openweights.price_per_hour"] == "0.4"
    pool = httpx.get(f"{prefect_server.url}/work_pools/openweights", trust_env=False).json()
    related = {(each["prefect.resource.role"], each["prefect.resource.id"]) for each in lost["related"]}
    assert related == {("work-pool", f"prefect.work-pool.{pool['id']}"), ("job", "openweights.job.job-1")}
    assert "owb_secret" not in str(events)
    assert "HF_TOKEN" not in str(events)

    trigger = EventTrigger(
        expect={"openweights.pod.lost"},
        match={"prefect.resource.id": "openweights.pod.*"},
        match_related={"prefect.resource.role": "job", "prefect.resource.id": "openweights.job.job-1"},
        posture=Posture.Reactive,
        threshold=1,
    )
    on_server = ServerTrigger.model_validate(trigger.model_dump(mode="json"))
    matched = [on_server.covers(ReceivedEvent.model_validate(event)) for event in events]
    assert matched.count(True) == 1


def test_without_prefect_nothing_is_disturbed() -> None:
    """The caller hears nothing, and is not held up."""

    async def emit() -> float:
        async with PrefectClient("http://127.0.0.1:9/api", httpx_settings={"timeout": 1}) as client:
            events = PodEvents(client, work_pool="openweights", organization_id="an-organization")
            started = time.monotonic()
            for number in range(1000):
                events.emit("created", f"pod-{number}", {"runpod_id": "abc"})
            taken = time.monotonic() - started
            await events.close()
            return taken

    assert asyncio.run(emit()) < 1
