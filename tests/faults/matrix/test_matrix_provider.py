"""Rows 10, 53 and 55-59: a provider that does not answer, answers wrongly, or does not do what it says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from control_plane import IMAGE, ControlPlane

from openweights_prefect.provisioning.provider import PodRequest, ProviderOutage
from openweights_prefect.provisioning.runpod.client import RunPodClient
from openweights_prefect.worker import fleet

pytestmark = pytest.mark.anyio


async def _active(plane: ControlPlane) -> dict[str, Any]:
    """A pod that has reported; returns its row."""
    plane.submit()
    [row] = await plane.until(lambda: [row for row in plane.living() if row["pod_id"]], "a pod is bought")
    plane.report_in(row["id"])
    return row


async def test_row_10_a_host_vanishes(plane: ControlPlane) -> None:
    """One list without the pod proves nothing; after the second one, and no answer by its id, it is gone."""
    row = await _active(plane)
    plane.runpod.control("POST", f"pods/{row['pod_id']}/kill", {"mode": "host_lost"})
    await plane.observer.reconcile_once()
    assert plane.living() == [{**row, "status": "active", "host": plane.living()[0]["host"]}]
    await plane.until(lambda: row["id"] not in {each["id"] for each in plane.living()}, "it has ended")
    assert ("ended", row["id"]) in plane.announced


async def test_row_53_an_error_page_and_torn_answers(plane: ControlPlane) -> None:
    """They are outages with a type, nobody is declared dead for them, and what was bought is bought once."""
    row = await _active(plane)
    for fault, params in (("http_error", {"status": 502, "html": True}), ("truncated_json", {})):
        plane.fault(fault, times=None, match={"op": "pods.list"}, **params)
        with pytest.raises(ProviderOutage):
            await plane.observer.reconcile_once()
        plane.runpod.control("DELETE", "faults")
    assert [each["id"] for each in plane.living()] == [row["id"]]
    await plane.observer.reconcile_once()
    assert plane.rented() == [row["pod_id"]]


async def test_row_53_an_address_that_speaks_no_tls(plane: ControlPlane) -> None:
    """Nothing was sent, so nothing was created: an outage, and not an unclear answer."""
    url = plane.runpod.rest.replace("http://", "https://")
    request = PodRequest(name="x", image=IMAGE, gpu_id="NVIDIA A40", gpu_count=1, cloud="SECURE", disk_gb=5)
    async with RunPodClient(base_url=url, api_key=plane.runpod.api_key) as client:
        with pytest.raises(ProviderOutage, match="Nothing was created"):
            await client.create(request)


@pytest.mark.parametrize("params", [{"fraction": 1.0}, {"fraction": 0.5}], ids=["empty", "half"])
async def test_row_55_a_list_that_leaves_pods_out(plane: ControlPlane, params: dict[str, Any]) -> None:
    """Nobody is dead because a list does not name it: asked by their ids, the pods are there."""
    row = await _active(plane)
    plane.fault("list_truncated", times=None, **params)
    for _ in range(3):
        await plane.observer.reconcile_once()
    assert [each["id"] for each in plane.living()] == [row["id"]]
    assert plane.rented() == [row["pod_id"]]


@pytest.mark.parametrize(
    ("fault", "params"), [("list_truncated", {"cursor": True}), ("list_page_size", {"n": 1})]
)
async def test_row_55_a_list_in_pages(plane: ControlPlane, fault: str, params: dict[str, Any]) -> None:
    """Every page is read before anything is concluded."""
    row = await _active(plane)
    plane.fault(fault, times=None, **params)
    assert row["pod_id"] in {pod.id for pod in await plane.provider.list()}
    for _ in range(3):
        await plane.observer.reconcile_once()
    assert [each["id"] for each in plane.living()] == [row["id"]]


async def test_row_56_too_many_requests(plane: ControlPlane) -> None:
    """All calls keep to the time that was named, the ends of pods too; the job says why it waits."""
    row = await _active(plane)
    plane.callers.call("lose_pod", for_worker=row["id"], why="by the test")
    plane.fault("rate_limited", match={"op": "pods.create"}, retry_after=2)
    plane.submit()
    loop = asyncio.get_running_loop()
    started = loop.time()
    while not plane.sql("select id from ledger.jobs where pending_reason like '%%rate limit%%'"):
        assert loop.time() < started + 10
        await plane.observer.place_once()
        await asyncio.sleep(0.02)
    await plane.until(lambda: row["pod_id"] not in plane.rented(), "the pod is ended")
    assert loop.time() - started >= 2
    plane.forget_refusals()
    await plane.until(lambda: len(plane.bought()) >= 2, "the next pod is bought")


@pytest.mark.parametrize(
    ("fault", "words"),
    [("key_revoked", "RUNPOD_API_KEY"), ("balance", "Add credit"), ("spend_limit", "spending limit")],
)
async def test_row_57_the_account_may_not_buy(plane: ControlPlane, fault: str, words: str) -> None:
    """Nothing more is tried for a while, the reason is shown, and it goes on by itself when all is well."""
    match = {"op": "pods.create"} if fault == "key_revoked" else {}
    plane.fault(fault, match=match)
    job = plane.submit()
    await plane.until(lambda: words in (plane.job(job)["pending_reason"] or ""), "the reason is shown")
    assert "account" in plane.refusals()
    creates = plane.runpod.report()["requests_by_op"]["pods.create"]
    other = plane.submit()
    for _ in range(3):
        await plane.work()
    assert words in (plane.job(other)["pending_reason"] or "")
    assert plane.runpod.report()["requests_by_op"]["pods.create"] == creates
    assert plane.bought() == []
    plane._heal()
    plane.forget_refusals()
    await plane.until(lambda: len(plane.bought()) == 2, "both jobs get their pods")
    assert plane.job(job)["status"] == "pending"


@pytest.mark.parametrize("fault", ["delete_404", "delete_500", "delete_ignored"])
async def test_row_58_a_delete_is_not_what_it_says(plane: ControlPlane, fault: str) -> None:
    """It is repeated until the pod is gone; only then is its row closed and its bill at an end."""
    row = await _active(plane)
    plane.fault(fault, times=3, match={"op": "pods.delete"})
    plane.callers.call("lose_pod", for_worker=row["id"], why="by the test")

    def closed() -> bool:
        return row["id"] not in {each["id"] for each in plane.living()}

    await plane.observer.reconcile_once()
    assert closed() or row["pod_id"] in plane.rented() or fault == "delete_500"
    await plane.until(closed, "its row is closed")
    assert row["pod_id"] not in plane.rented()


async def test_row_58_an_end_that_does_not_come_is_an_alarm(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person is called once after a quarter of an hour, and the worker goes on trying."""
    monkeypatch.setattr(fleet, "_ALARM_SECONDS", 0.3)
    row = await _active(plane)
    plane.fault("delete_ignored", times=None)
    plane.callers.call("lose_pod", for_worker=row["id"], why="by the test")
    await plane.until(lambda: ("stuck", row["id"]) in plane.announced, "somebody is called")
    for _ in range(3):
        await plane.work()
    assert plane.announced.count(("stuck", row["id"])) == 1
    assert row["pod_id"] in plane.rented()


async def test_row_59_foreign_pods_with_similar_names(plane: ControlPlane) -> None:
    """Names that begin like ours, or that we might have given: all are left alone."""
    row = await _active(plane)
    names = [plane.name_of("pod-000000000000"), plane.name_of(row["id"]) + "-copy", plane.name_of("pod-")]
    ids = plane.add_foreign(*names)
    for _ in range(5):
        await plane.work()
    state = {pod["id"]: pod["phase"] for pod in plane.runpod.control("GET", "state")["pods"]}
    assert [state.get(pod) for pod in ids] == ["up"] * len(ids)


@pytest.mark.parametrize("seconds", [-3600, 3600])
async def test_row_24_the_providers_clock_is_off(plane: ControlPlane, seconds: float) -> None:
    """Whatever it says of when a pod was created, no pod is taken for old, and the bill is right."""
    plane.fault("clock_skew", times=None, seconds=seconds)
    row = await _active(plane)
    for _ in range(3):
        await plane.work()
    assert [(each["id"], each["status"]) for each in plane.living()] == [(row["id"], "active")]


async def test_row_53_a_termination_that_is_refused_is_not_forgotten(plane: ControlPlane) -> None:
    """A pod that cannot be ended now keeps neither others nor itself from being ended later."""
    for _ in range(2):
        plane.submit()
    rows = await plane.until(
        lambda: (found := [row for row in plane.living() if row["pod_id"]])[1:] and found,
        "two pods are bought",
    )
    for row in rows:
        plane.callers.call("lose_pod", for_worker=row["id"], why="by the test")
    plane.fault("http_error", match={"op": "pods.delete", "podId": rows[0]["pod_id"]}, status=403, times=1)
    await plane.work()
    assert rows[1]["pod_id"] not in plane.rented()
    await plane.until(lambda: rows[0]["pod_id"] not in plane.rented(), "the first one is ended too")
