"""Rows 5, 7, 8 and 13: pods that were bought and do not become a machine that works."""

from __future__ import annotations

import pytest
from control_plane import EXITS, ControlPlane

from openweights_prefect.provisioning.runpod import system_log
from openweights_prefect.worker import fleet

pytestmark = pytest.mark.anyio


@pytest.fixture
def logs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logs of starting pods are read in every pass, not every twenty seconds, and fall silent sooner."""
    monkeypatch.setattr(fleet, "_LOG_SECONDS", 0.0)
    monkeypatch.setattr(system_log, "_QUIET_SECONDS", 0.1)


async def _bought(plane: ControlPlane, count: int = 1) -> list[str]:
    """The ledger's ids of so many recorded pods."""
    rows = await plane.until(
        lambda: (found := [row for row in plane.living() if row["pod_id"]])[count - 1 :] and found,
        "they are bought",
    )
    return [row["id"] for row in rows]


async def _replaced(plane: ControlPlane, worker_id: str) -> str:
    """Wait until a pod has ended, and another one is there; returns why it ended."""

    def look() -> str | None:
        rows = {row["id"]: row for row in plane.rows()}
        others = [row for row in plane.living() if row["id"] != worker_id and row["pod_id"]]
        return (
            str(rows[worker_id]["reason"]) if rows[worker_id]["status"] == "terminated" and others else None
        )

    why = await plane.until(look, "it is replaced")
    assert why is not None
    return why


@pytest.mark.usefixtures("logs_at_once")
async def test_row_05_a_pod_that_gets_no_machine(plane: ControlPlane) -> None:
    """Its log stays empty while others' do not: it is replaced, and no machine is blamed."""
    plane.submit()
    [first] = await _bought(plane)
    plane.fault("alloc_stall")
    plane.submit()
    [stalled] = {*await _bought(plane, 2)} - {first}
    plane.age(stalled, plane.settings.first_log_seconds + 1)
    assert "no machine" in await _replaced(plane, stalled)
    assert not [subject for subject in plane.refusals() if subject.startswith("host:")]


async def test_row_05_a_slow_pull_has_its_time(plane: ControlPlane) -> None:
    """A pull that goes on for less than the start-up budget is waited for; the job says what it waits for."""
    plane.fault("slow_pull", seconds=3600)
    job = plane.submit()
    [slow] = await _bought(plane)
    plane.age(slow, plane.settings.boot_seconds - 60)
    for _ in range(3):
        await plane.work()
    assert [row["id"] for row in plane.living()] == [slow]
    assert f"pod {slow}" in plane.job(job)["pending_reason"]


@pytest.mark.parametrize("fault", ["pull_stuck", "runtime_null"])
async def test_row_05_07_a_pod_that_never_reports(plane: ControlPlane, fault: str) -> None:
    """Whatever its provider shows, it is replaced when its start-up budget is used up."""
    plane.fault(fault)
    plane.submit()
    [silent] = await _bought(plane)
    plane.age(silent, plane.settings.boot_seconds + 1)
    assert "no sign of life" in await _replaced(plane, silent)


async def test_row_07_missing_telemetry_is_no_death(plane: ControlPlane) -> None:
    """A pod that reports is alive, although RunPod shows no container for ever."""
    plane.fault("runtime_null", times=None)
    plane.submit()
    [worker] = await _bought(plane)
    plane.report_in(worker)
    plane.age(worker, 10 * plane.settings.boot_seconds)
    for _ in range(4):
        await plane.work()
    assert [(row["id"], row["status"]) for row in plane.living()] == [(worker, "active")]


@pytest.mark.usefixtures("logs_at_once")
@pytest.mark.parametrize("fault", ["cuda_mismatch", "container_error"])
async def test_row_08_13_a_machine_that_starts_no_container(plane: ControlPlane, fault: str) -> None:
    """Its log says so: the pod is replaced, the machine avoided, and the user's retries are not used up."""
    plane.fault(fault)
    job = plane.submit()
    [worker] = await _bought(plane)
    assert (await _replaced(plane, worker)).startswith("unusable host")
    assert plane.job(job)["failed_attempts"] == 0
    assert [row["host"] for row in plane.rows() if row["id"] == worker] != [None]
    assert [subject for subject in plane.refusals() if subject.startswith("host:")]


@pytest.mark.usefixtures("logs_at_once")
async def test_row_08_the_same_bad_machine_again_and_again(plane: ControlPlane) -> None:
    """RunPod may sell a machine that was found unusable again: it is not bought over and over."""
    plane.fault("cuda_mismatch")
    plane.submit()
    [worker] = await _bought(plane)
    await _replaced(plane, worker)
    for _ in range(10):
        await plane.work()
    assert len(plane.bought()) <= 3


@pytest.mark.usefixtures("logs_at_once")
async def test_row_13_a_container_that_exits_again_and_again(plane: ControlPlane) -> None:
    """Each such pod is given up after a few starts, and after three of them the job fails and says why."""
    job = plane.submit(docker_image=EXITS)
    await plane.until(lambda: plane.job(job)["status"] == "failed", "the job fails", seconds=40)
    assert "Lost 3 pods in a row" in plane.job(job)["error"]
    assert "container ended" in plane.job(job)["error"]
    assert len(plane.bought()) == 3
