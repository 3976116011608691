"""Job variables of the work pool type `runpod`: what a deployment or a flow run may ask of its pod."""

from __future__ import annotations

from typing import Any

from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorkerResult
from pydantic import Field

from openweights_prefect.jobs.options import Options


class RunPodJobConfiguration(BaseJobConfiguration):
    """What the worker reads of a flow run's job variables."""

    docker_image: str | None = Field(default=None)
    requires_vram_gb: int | None = Field(default=None)
    allowed_hardware: list[str] | None = Field(default=None)
    max_price_per_hour: float | None = Field(default=None)
    cloud: str | None = Field(default=None)
    min_cuda: str | None = Field(default=None)
    min_vcpu: int | None = Field(default=None)
    min_ram_gb: int | None = Field(default=None)
    priority: int = Field(default=0)
    timeout: int | None = Field(default=None)
    secrets: list[str] | None = Field(default=None)


class RunPodVariables(BaseVariables):
    """The form of the work pool."""

    docker_image: str | None = Field(
        default=None, description="Image of the pod; leave empty for the installation's default."
    )
    requires_vram_gb: int | None = Field(
        default=None, ge=0, le=4096, description="GPU memory that the run needs, in GB; estimated when empty."
    )
    allowed_hardware: list[str] | None = Field(
        default=None,
        description="Hardware in order of preference, such as `1x H200` or `2x A100`; overrides the memory.",
    )
    max_price_per_hour: float | None = Field(
        default=None, gt=0, description="Dearest pod to use, in USD per hour for the whole pod."
    )
    cloud: str | None = Field(
        default=None,
        description=(
            "`secure` for machines in data centers, `community` for the cheaper ones of other people; "
            "leave empty for either."
        ),
    )
    min_cuda: str | None = Field(
        default=None,
        pattern=r"^\d{1,3}\.\d{1,3}$",
        description=(
            "Lowest CUDA version of the machine's driver, such as `12.8`; the CUDA version of the image "
            "decides. Leave empty for the installation's default."
        ),
    )
    min_vcpu: int | None = Field(
        default=None, ge=1, le=1024, description="Virtual CPUs that the whole pod has at least."
    )
    min_ram_gb: int | None = Field(
        default=None, ge=1, le=16_384, description="RAM in GB that the whole pod has at least."
    )
    priority: int = Field(default=0, ge=-100, le=100, description="Higher goes first.")
    timeout: int | None = Field(default=None, gt=0, description="The run fails when it takes longer.")
    secrets: list[str] | None = Field(
        default=None,
        description=(
            "Names of the organization's secrets that the job finds in its environment, such as `HF_TOKEN`. "
            "Never a value: `ow env set NAME` stores it, and the pod fetches it from there."
        ),
    )


class RunPodWorkerResult(BaseWorkerResult):
    """Answer of `RunPodWorker.run`."""


def job_variables_of(job_variables: dict[str, Any] | None, base_template: dict[str, Any]) -> dict[str, Any]:
    """The variables of a flow run over the pool's defaults, without empty ones."""
    properties = base_template.get("variables", {}).get("properties", {})
    defaults = {name: spec.get("default") for name, spec in properties.items()}
    merged = {**defaults, **(job_variables or {})}
    return {name: merged[name] for name in Options.model_fields if merged.get(name) is not None}
