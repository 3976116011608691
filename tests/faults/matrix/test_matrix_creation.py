"""Rows 1-4 and 6: what may go wrong between the decision to buy a pod and its container."""

from __future__ import annotations

import pytest
from control_plane import ControlPlane

pytestmark = pytest.mark.anyio

_SHORTAGES = [
    "There are no longer any instances available with the requested specifications. Please refresh.",
    "create pod: There are no instances currently available",
    "There are not enough free GPUs on the host machine to start this pod.",
    "This machine does not have the resources to deploy your pod. Please try a different machine",
]


@pytest.mark.parametrize("text", _SHORTAGES)
async def test_row_01_no_capacity_in_all_words(plane: ControlPlane, text: str) -> None:
    """The next offer is tried; what was refused is avoided for a while, and not only by this worker."""
    plane.fault("capacity", times=2, text=text)
    plane.submit()
    await plane.until(lambda: plane.rented(), "the third offer is sold")
    assert len(plane.rented()) == 1
    assert len(plane.refusals()) == 2
    assert all(text.rstrip(".") in why for why in plane.refusals().values())


async def test_row_01_no_capacity_anywhere_is_a_reason_and_not_an_end(plane: ControlPlane) -> None:
    """The job waits and says why; when there is capacity again it is served."""
    plane.fault("capacity", times=None)
    job = plane.submit()
    await plane.until(lambda: "no capacity" in (plane.job(job)["pending_reason"] or ""), "a reason is shown")
    assert plane.job(job)["status"] == "pending"
    assert plane.living() == []
    plane.runpod.control("DELETE", "faults")
    plane.forget_refusals()
    await plane.until(lambda: plane.rented(), "a pod is bought")


@pytest.mark.parametrize("body", [None, "pod"])
async def test_row_02_create_answers_500_but_the_pod_exists(plane: ControlPlane, body: str | None) -> None:
    """It is found by its name and adopted; no second one is bought."""
    plane.fault("created_but_500", body=body)
    plane.submit()
    [row] = await plane.until(lambda: [row for row in plane.living() if row["pod_id"]], "the pod is adopted")
    assert plane.bought() == [row["pod_id"]]
    assert row["status"] == "starting"


@pytest.mark.parametrize("fault", ["created_but_timeout", "created_but_reset"])
async def test_row_03_create_is_not_answered_but_the_pod_exists(plane: ControlPlane, fault: str) -> None:
    """Likewise."""
    plane.fault(fault, hold_s=0.5)
    plane.submit()
    [row] = await plane.until(lambda: [row for row in plane.living() if row["pod_id"]], "the pod is adopted")
    assert plane.bought() == [row["pod_id"]]


async def test_row_03_a_pod_that_shows_up_late_is_ended(plane: ControlPlane) -> None:
    """Given up as never created, and there after all: it is paid for and ended, another one has the job."""
    plane.extra_pods = 1
    plane.fault("created_but_reset")
    plane.fault("visibility", seconds=3)
    plane.submit()
    [late] = await plane.until(plane.living, "the intent is written")
    await plane.until(lambda: plane.rented(), "it was created")
    plane.age(late["id"], 600)
    await plane.until(lambda: len(plane.bought()) == 2, "it was given up, and another one bought")
    gone = await plane.until(lambda: set(plane.bought()) - set(plane.rented()), "the late one is ended")
    await plane.until(lambda: len(plane.living()) == 1, "its row is closed")
    [other] = plane.living()
    assert gone == set(plane.bought()) - {other["pod_id"]}


async def test_row_04_two_pods_for_one_create(plane: ControlPlane) -> None:
    """One is kept, the other ended, and both are paid for, also if the answer comes when both are listed."""
    plane.extra_pods = 1
    for _ in range(4):
        plane.fault("duplicate_create")
        plane.fault("slow_body", match={"op": "pods.create"}, seconds=0.5)
        plane.fault("hang", match={"op": "pods.delete"}, seconds=0.8)
        job, before = plane.submit(), len(plane.created())
        await plane.until(lambda b=before: len(plane.created()) == b + 2, "two are there")  # type: ignore[misc]
        await plane.until(lambda: len(plane.rented()) == 1, "one of two is left")
        await plane.all_bought()
        assert plane.rented() == [row["pod_id"] for row in plane.living()]
        answered, other = plane.created()[before:]
        if answered > other:
            return  # by its id, the other one looks like the one to keep
        plane.callers.call("cancel_job", job_id=job)
        await plane.wind_down()


async def test_row_04_the_second_pod_shows_up_when_the_first_has_ended(plane: ControlPlane) -> None:
    """It is ours by its name and its image, and it is ended as well."""
    plane.extra_pods = 1
    plane.fault("duplicate_create")
    plane.fault("visibility", match={"nth": 2}, seconds=3)
    job = plane.submit()
    [row] = await plane.until(lambda: [row for row in plane.living() if row["pod_id"]], "a pod is bought")
    plane.callers.call("cancel_job", job_id=job)
    plane.callers.call("lose_pod", for_worker=row["id"], why="by the test")
    await plane.until(lambda: not plane.living(), "it has ended")
    await plane.until(lambda: not plane.rented(), "the other one is ended too", seconds=8)


@pytest.mark.parametrize("fault", ["pull_missing", "pull_auth"])
async def test_row_06_an_image_that_cannot_be_had(plane: ControlPlane, fault: str) -> None:
    """The job fails at once with words that name the image; no second pod is bought for it."""
    plane.fault(fault, times=None)
    job = plane.submit()
    await plane.until(lambda: plane.job(job)["status"] == "failed", "the job fails")
    assert "openweights/idle" in plane.job(job)["error"]
    await plane.until(lambda: not plane.living(), "its pod is ended")
    assert len(plane.bought()) == 1
