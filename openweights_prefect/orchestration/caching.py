"""Prefect's cache policy for jobs: the cache key is the job id, and so content-addressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefect.cache_policies import CachePolicy
from prefect.context import TaskRunContext


@dataclass
class JobIdCachePolicy(CachePolicy):
    """The key is the task's argument `job_id`: it covers type, parameters, files, image, organization."""

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        """The job id."""
        return str(inputs["job_id"])
