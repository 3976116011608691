"""Flow runs that somebody else created, a schedule, a form, another flow: which job each of them means."""

from __future__ import annotations

from typing import Any, TypedDict
from uuid import UUID

from pydantic import ValidationError

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.fine_tuning.params import FineTuningParams
from openweights_prefect.jobs.request import JobOptions, custom_request, fine_tuning_request
from openweights_prefect.provisioning.hardware import parse_hardware
from openweights_prefect.settings import Settings

DEPLOYMENTS = {"fine_tuning": "fine-tuning/fine-tuning"}
CUSTOM_DEPLOYMENT = "custom-job/custom-job"


class _Place(TypedDict):
    organization_id: str
    default_image: str


def deployment_of(job_type: str) -> str:
    """The deployment that runs a job type."""
    return DEPLOYMENTS.get(job_type, CUSTOM_DEPLOYMENT)


def parameters_of(
    job_type: str, params: dict[str, Any], mounts: dict[str, str], entrypoint: str
) -> dict[str, Any]:
    """The parameters of a job's flow run; `job_of_flow_run` reads the same job back from them."""
    values = params["validated_params"]
    if job_type in DEPLOYMENTS:
        return {"params": values, "mounts": mounts}
    return {"name": job_type, "entrypoint": entrypoint, "params": values, "mounts": mounts}


def job_of_flow_run(
    flow_run_id: UUID,
    deployment: str | None,
    parameters: dict[str, Any],
    variables: dict[str, Any],
    settings: Settings,
) -> dict[str, Any]:
    """The row of the job that a flow run means.

    Raises:
        InvalidParameterError: The parameters or job variables are wrong; the message is for the person who started it.
    """
    try:
        options = JobOptions(**variables)
        if options.allowed_hardware is not None:
            names = tuple(str(parse_hardware(name)) for name in options.allowed_hardware)
            options = options.model_copy(update={"allowed_hardware": names})
        place: _Place = {"organization_id": settings.organization_id, "default_image": settings.image}
        mounts = parameters.get("mounts") or {}
        if deployment == DEPLOYMENTS["fine_tuning"]:
            return fine_tuning_request(FineTuningParams(**parameters["params"]), mounts, options, **place)
        if deployment == CUSTOM_DEPLOYMENT:
            return custom_request(
                parameters["name"],
                parameters.get("params") or {},
                parameters["entrypoint"],
                mounts,
                options,
                **place,
            )
    except (ValidationError, KeyError, TypeError) as exc:
        raise InvalidParameterError(f"The flow run's parameters are not those of a job: {exc}") from exc
    return _flow_row(flow_run_id, deployment, options, settings)


def _flow_row(
    flow_run_id: UUID, deployment: str | None, options: JobOptions, settings: Settings
) -> dict[str, Any]:
    """A flow of the user's own is a job that runs once: its id is its flow run's."""
    return {
        "id": f"flow-{flow_run_id}",
        "type": "flow",
        "params": {"validated_params": {"deployment": deployment}, "mounted_files": {}},
        "docker_image": options.docker_image or settings.image,
        "requires_vram_gb": options.requires_vram_gb or 0,
        "allowed_hardware": options.allowed_hardware and list(options.allowed_hardware),
        "max_price_per_hour": options.max_price_per_hour,
        "priority": options.priority,
        "timeout_seconds": options.timeout_seconds,
    }
