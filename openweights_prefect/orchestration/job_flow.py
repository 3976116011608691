"""What every job type's flow does: run the entrypoint once per job id, keep its result, finish the run."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State
from prefect.results import get_result_store
from prefect.states import Cancelled

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.orchestration.caching import JobIdCachePolicy
from openweights_prefect.runtime import spool, wire
from openweights_prefect.runtime.entrypoint import RunFolder, describe_exit, run_entrypoint
from openweights_prefect.settings import Settings
from openweights_prefect.types.canonical import decode_event


class EntrypointFailed(OpenWeightsError):
    """The entrypoint did not exit with 0, or was told to end; `result` is failed, canceled or lost."""

    def __init__(self, result: str, why: str) -> None:
        super().__init__(why)
        self.result = result


@task(name="entrypoint", cache_policy=JobIdCachePolicy(), persist_result=True, result_serializer="json")
async def entrypoint(job_id: str, run_id: str) -> dict[str, Any]:
    """Run the job's command; the result is its files, stored under the job id.

    Raises:
        EntrypointFailed: It failed or was told to end. Failures are never cached.
    """
    folder = RunFolder.current()
    code = await run_entrypoint(folder, folder.job(), job_python=Settings.load().job_python)
    collected = await asyncio.to_thread(wire.request, "collect")
    if collected["intent"] is not None:
        raise EntrypointFailed(*collected["intent"])
    if code != 0:
        raise EntrypointFailed("failed", describe_exit(code))
    for file in collected["files"]:
        spool.append(folder.spool, file, file=file["file"])
    # The result is kept when this returns: what it stands for must be in the ledger by then.
    await asyncio.to_thread(wire.request, "flush")
    return {"run_id": run_id, "files": collected["files"]}


async def run_job(run_id: str) -> dict[str, Any] | State[Any]:
    """Run the job of the flow run `run_id` on the pod that opened it, and finish its run.

    Returns the job's outputs. A result that was stored by an attempt that died before it could finish
    is taken as it is: the same work never runs twice.
    """
    folder = RunFolder.current()
    job_id = str(folder.job()["id"])
    try:
        result = await entrypoint(job_id, run_id)
        store = await get_result_store().aupdate_for_task(entrypoint)
        if not await store.aexists(job_id):  # Prefect only logs a result that it could not write
            raise EntrypointFailed("failed", "The result could not be stored; see the log of the flow run.")
    except EntrypointFailed as exc:
        await _finish(exc.result, str(exc))
        if exc.result == "canceled":
            return Cancelled(message=str(exc))
        raise
    if result["run_id"] != run_id:
        print(
            f"Run {result['run_id']} had done the work and died before it could say so; its log has the rest."
        )
        stored = await asyncio.to_thread(wire.request, "events", run_id=result["run_id"])
        for event in stored["events"]:
            spool.append(folder.spool, decode_event(event["data"]), file=event["file"])
    return dict((await _finish("completed"))["outputs"] or {})


async def _finish(result: str, why: str | None = None) -> dict[str, Any]:
    return await asyncio.to_thread(wire.request, "finish", result=result, why=why)
