"""Work queues with priorities, and a pool or queue that somebody paused; against a real Prefect server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Cancelling, Crashed, Running, Scheduled

from openweights_prefect.orchestration import flow_runs as flow_runs_module
from openweights_prefect.orchestration.deployments import ensure_work_pool
from openweights_prefect.orchestration.flow_runs import Ends, FlowRuns
from openweights_prefect.orchestration.queues import ensure_queues, priority_in, queue_of
from tests.credentials.prefect_server import PrefectServer

T = TypeVar("T")
NONE = Ends(canceled=[], ended=[])


def on(server: PrefectServer, work: Callable[[PrefectClient], Awaitable[T]]) -> T:
    """What `work` returns for a client of the server."""

    async def act() -> T:
        async with PrefectClient(server.url) as client:
            return await work(client)

    return asyncio.run(act())


async def places(client: PrefectClient, pool: str) -> dict[str, int | None]:
    return {each.name: each.priority for each in await client.read_work_queues(work_pool_name=pool)}


async def deploy(
    client: PrefectClient, pool: str, queue: str | None = None, variables: dict[str, int] | None = None
) -> uuid.UUID:
    return await client.create_deployment(
        flow_id=await client.create_flow_from_name("job"),
        name=f"{pool}-{queue}",
        work_pool_name=pool,
        work_queue_name=queue,
        job_variables=variables,
    )


@pytest.mark.parametrize(("priority", "queue"), [(7, "high"), (0, "default"), (-1, "low")])
def test_a_job_is_in_the_queue_of_its_priority(priority: int, queue: str) -> None:
    """Above, at and below zero."""
    assert queue_of(priority) == queue


def test_a_new_pool_has_three_queues(prefect_server: PrefectServer) -> None:
    """`high` before `default` before `low`; asked again, nothing changes."""

    async def make(client: PrefectClient) -> list[dict[str, int | None]]:
        seen = []
        for _ in range(2):
            await ensure_work_pool(client, "fresh")
            seen.append(await places(client, "fresh"))
        return seen

    assert on(prefect_server, make) == [{"high": 1, "default": 2, "low": 3}] * 2


def test_queues_that_exist_stay_where_somebody_put_them(prefect_server: PrefectServer) -> None:
    """Only what is missing is made, around `default`."""

    async def make(client: PrefectClient) -> list[dict[str, int | None]]:
        await ensure_work_pool(client, "arranged")
        queues = {each.name: each for each in await client.read_work_queues(work_pool_name="arranged")}
        await client.update_work_queue(queues["low"].id, priority=1)
        await client.create_work_queue(name="nightly", work_pool_name="arranged")
        before = await places(client, "arranged")
        await ensure_queues(client, "arranged")
        after = await places(client, "arranged")
        await client.delete_work_queue_by_id(queues["high"].id)
        await ensure_queues(client, "arranged")
        return [before, after, await places(client, "arranged")]

    before, after, mended = on(prefect_server, make)
    assert before == after
    assert sorted(mended, key=lambda name: mended[name] or 0) == ["low", "high", "default", "nightly"]


def test_queues_of_other_names_count_by_their_place(prefect_server: PrefectServer) -> None:
    """Before `default` a flow run gains, behind it loses; what a deployment says counts more."""

    async def ask(client: PrefectClient) -> dict[str | None, object]:
        await ensure_work_pool(client, "places")
        await client.create_work_queue(name="urgent", work_pool_name="places", priority=1)
        await client.create_work_queue(name="nightly", work_pool_name="places", priority=9)
        flow_runs, found = FlowRuns(client), {}
        for queue in ("high", None, "low", "urgent", "nightly"):
            deployment = await deploy(client, "places", queue)
            await client.create_flow_run_from_deployment(deployment)
        for polled in await client.get_scheduled_flow_runs_for_work_pool("places"):  # As a worker sees them.
            shown = (await client.read_flow_run(polled.flow_run.id)).work_queue_name
            found[shown] = (await flow_runs.deployment_of(polled.flow_run))[1].get("priority")
        deployment = await deploy(client, "places", "high", {"priority": 3})
        flow_run = await client.create_flow_run_from_deployment(deployment)
        found["own"] = (await flow_runs.deployment_of(flow_run))[1]["priority"]
        queues = await client.read_work_queues(work_pool_name="places")
        assert priority_in("no such queue", queues) == 0
        return found

    assert on(prefect_server, ask) == {
        "high": 10, "default": None, "low": -10, "urgent": 10, "nightly": -10, "own": 3,
    }  # fmt: skip


def test_flow_runs_of_jobs_are_created_in_the_queue_of_their_priority(prefect_server: PrefectServer) -> None:
    """So that the page of the queue shows them."""

    async def create(client: PrefectClient) -> list[str | None]:
        await ensure_work_pool(client, "jobs")
        await deploy(client, "jobs")
        flow_runs, seen = FlowRuns(client), []
        for number, priority in enumerate((5, 0, -5)):
            flow_run_id = await flow_runs.create(
                "job/jobs-None",
                job_id=f"job-{number}",
                attempt=1,
                parameters={},
                variables={"priority": priority},
                tags=[],
            )
            seen.append((await client.read_flow_run(flow_run_id)).work_queue_name)
        return seen

    assert on(prefect_server, create) == ["high", "default", "low"]


def test_a_paused_pool_and_a_paused_queue_are_seen(prefect_server: PrefectServer) -> None:
    """With the reason that a waiting job shows; the limit of the pool is a number."""

    async def look(client: PrefectClient) -> None:
        await ensure_work_pool(client, "pausing")
        deployments = [await deploy(client, "pausing", queue) for queue in ("low", "default")]
        runs = [(await client.create_flow_run_from_deployment(each)).id for each in deployments]
        flow_runs = FlowRuns(client)
        state = await flow_runs.pool_state("pausing")
        assert (state.paused, state.paused_queues, state.concurrency_limit) == (False, frozenset(), None)
        assert await flow_runs.held_back(state, runs) == {}

        [low] = [q for q in await client.read_work_queues(work_pool_name="pausing") if q.name == "low"]
        await client.update_work_queue(low.id, is_paused=True)
        state = await flow_runs.pool_state("pausing")
        assert await flow_runs.held_back(state, runs) == {runs[0]: "the work queue 'low' is paused"}

        await client.update_work_pool("pausing", WorkPoolUpdate(is_paused=True, concurrency_limit=3))
        state = await flow_runs.pool_state("pausing")
        assert state.concurrency_limit == 3
        assert await flow_runs.held_back(state, runs) == dict.fromkeys(runs, "the work pool is paused")

    on(prefect_server, look)


def test_an_end_by_a_stranger_is_noticed_after_a_while_and_undone(
    prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at once: the end of a user's own flow is in Prefect before it is in the ledger."""
    monkeypatch.setattr(flow_runs_module, "FOREIGN_END_SECONDS", 0.5)

    async def crash(client: PrefectClient) -> None:
        await ensure_work_pool(client, "strangers")
        deployment = await deploy(client, "strangers")
        flow_run = (await client.create_flow_run_from_deployment(deployment)).id
        flow_runs = FlowRuns(client)
        await client.set_flow_run_state(flow_run, Running(), force=True)
        assert await flow_runs.ends_among([flow_run]) == NONE
        await client.set_flow_run_state(flow_run, Crashed(message="a stranger"), force=True)
        assert await flow_runs.ends_among([flow_run]) == NONE
        async with asyncio.timeout(10):
            while await flow_runs.ends_among([flow_run]) != Ends(canceled=[], ended=[flow_run]):
                await asyncio.sleep(0.05)
        await flow_runs.restore(flow_run)
        state = (await client.read_flow_run(flow_run)).state
        assert state is not None
        assert state.is_running()
        assert await flow_runs.ends_among([flow_run]) == NONE
        await flow_runs.restore(uuid.uuid4())  # One that is gone is nobody's business.
        await client.set_flow_run_state(flow_run, Scheduled(), force=True)
        assert await flow_runs.ends_among([flow_run]) == NONE

    on(prefect_server, crash)


def test_cancellations_and_ends_are_one_question(
    prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many runs there are, and nothing is asked about none."""
    monkeypatch.setattr(flow_runs_module, "FOREIGN_END_SECONDS", 0.0)

    async def look(client: PrefectClient) -> None:
        await ensure_work_pool(client, "ends")
        deployment = await deploy(client, "ends")
        runs = [(await client.create_flow_run_from_deployment(deployment)).id for _ in range(4)]
        for run, state in zip(runs, (Cancelling(), Cancelled(), Crashed(), Running()), strict=True):
            await client.set_flow_run_state(run, state, force=True)
        asked: list[int] = []
        read = client.read_flow_runs

        async def count(**filters: Any) -> list[FlowRun]:
            found = await read(**filters)
            asked.append(len(found))
            return found

        monkeypatch.setattr(client, "read_flow_runs", count)
        flow_runs = FlowRuns(client)
        assert await flow_runs.ends_among([]) == NONE
        assert asked == []
        ends = await flow_runs.ends_among([*runs, uuid.uuid4()])
        assert ({*ends.canceled}, ends.ended, asked) == ({*runs[:2]}, [runs[2]], [3])
        monkeypatch.setattr(flow_runs_module, "_PAGE", 2)
        ends = await flow_runs.ends_among(runs)
        assert ({*ends.canceled}, ends.ended, asked) == ({*runs[:2]}, [runs[2]], [3, 2, 1])

    on(prefect_server, look)
