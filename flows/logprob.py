"""Measure how likely a language model finds conversations, on a pod."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from openweights_prefect.jobs.logprob.params import LogprobParams
from openweights_prefect.orchestration.job_flow import run_job


@flow(name="logprob")
async def logprob(params: LogprobParams, mounts: dict[str, str] | None = None) -> Any:
    """Measure how likely a language model finds conversations.

    Args:
        params: Which model, and which conversations.
        mounts: Files to lay out beside the data: target path -> file id.
    """
    return await run_job(flow_run.id)
