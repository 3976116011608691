"""Run a command with mounted files on a pod."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from openweights_prefect.orchestration.job_flow import run_job


@flow(name="custom-job")
async def custom_job(
    name: str, entrypoint: str, params: dict[str, Any] | None = None, mounts: dict[str, str] | None = None
) -> Any:
    """Run a command.

    Args:
        name: The job type, as registered; the prefix of the job id.
        entrypoint: The command, run by bash in a fresh folder.
        params: Its parameters, found in `params.json`.
        mounts: Files to lay out in that folder: target path -> file id.
    """
    return await run_job(flow_run.id)
