"""Fine-tune a language model on a pod."""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from openweights_prefect.jobs.fine_tuning.params import FineTuningParams
from openweights_prefect.orchestration.job_flow import run_job


@flow(name="fine-tuning")
async def fine_tuning(params: FineTuningParams, mounts: dict[str, str] | None = None) -> Any:
    """Fine-tune a language model.

    Args:
        params: What to train, on which file, and how.
        mounts: Files to lay out beside the training script: target path -> file id.
    """
    return await run_job(flow_run.id)
