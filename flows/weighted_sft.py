"""Fine-tune a language model on conversations whose parts have weights, on a pod."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from openweights_prefect.jobs.weighted_sft.params import WeightedSftParams
from openweights_prefect.orchestration.job_flow import run_job


@flow(name="weighted-sft")
async def weighted_sft(params: WeightedSftParams, mounts: dict[str, str] | None = None) -> Any:
    """Fine-tune a language model on conversations whose parts have weights.

    Args:
        params: What to train, on which file, and how.
        mounts: Files to lay out beside the data: target path -> file id.
    """
    return await run_job(flow_run.id)
