"""Flow runs that somebody else created, a schedule, a form, another flow: which job each of them means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.models import MODEL_FOLDER, JobModel, is_mounted
from openweights_prefect.jobs.options import Options, validated
from openweights_prefect.jobs.request import (
    JOB_TYPES,
    JobRequest,
    JobType,
    check_satisfiable,
    custom_request,
    model_request,
)
from openweights_prefect.jobs.training.params import is_job_id
from openweights_prefect.settings import Settings

DEPLOYMENTS = {name: kind.deployment for name, kind in JOB_TYPES.items()}
CUSTOM_DEPLOYMENT = "custom-job/custom-job"
_HOST = ("cloud", "min_cuda", "min_vcpu", "min_ram_gb")
_KINDS = {kind.deployment: kind for kind in JOB_TYPES.values()}
_OTHER_TYPES = frozenset({*DEPLOYMENTS, "flow", "script"})


def deployment_of(job_type: str) -> str:
    """The deployment that runs a job type."""
    return DEPLOYMENTS.get(job_type, CUSTOM_DEPLOYMENT)


def parameters_of(
    job_type: str, params: dict[str, Any], mounts: dict[str, str], entrypoint: str
) -> dict[str, Any]:
    """The parameters of a job's flow run; `job_of_flow_run` reads the same job back from them."""
    values = params["validated_params"]
    if job_type in DEPLOYMENTS:
        return {"params": {**values, **params.get("templates", {})}, "mounts": mounts}
    return {"name": job_type, "entrypoint": entrypoint, "params": values, "mounts": mounts}


def model_job_of(deployment: str | None, parameters: Mapping[str, Any]) -> str | None:
    """The job whose model a flow run of ours names; None when its model is another one, or mounted."""
    if deployment not in _KINDS or is_mounted(parameters.get("mounts") or {}):
        return None
    model = parameters["params"].get("model")
    return model if isinstance(model, str) and is_job_id(model) else None


def job_of_flow_run(
    flow_run_id: UUID,
    deployment: str | None,
    parameters: dict[str, Any],
    variables: dict[str, Any],
    settings: Settings,
    *,
    job_model: JobModel | None = None,
) -> dict[str, Any]:
    """The row of the job that a flow run means; `job_model` is the model of the job that it names.

    Raises:
        InvalidParameterError: The parameters or job variables are wrong, in words for who started it.
    """
    options = validated(Options, variables, job_type=deployment or "flow")
    mounts = parameters.get("mounts") or {}
    if kind := _KINDS.get(deployment or ""):
        request = _model_request(kind, parameters["params"], mounts, options, job_model)
    elif deployment == CUSTOM_DEPLOYMENT:
        _check_custom(parameters["name"], parameters["entrypoint"])
        values = parameters.get("params") or {}
        request = custom_request(parameters["name"], values, parameters["entrypoint"], mounts, options)
    else:
        return _flow_row(flow_run_id, deployment, options, settings)
    return request.row(organization_id=settings.organization_id, default_image=settings.image)


def _model_request(
    kind: JobType,
    values: Mapping[str, Any],
    mounts: Mapping[str, str],
    options: Options,
    job_model: JobModel | None,
) -> JobRequest:
    if job_model is None:
        return model_request(kind, validated(kind.params, values, job_type=kind.name), mounts, options)
    params = validated(kind.params, {**values, "model": MODEL_FOLDER}, job_type=kind.name)
    return model_request(
        kind,
        params,
        {**mounts, **job_model.mounts},
        options,
        model_name=job_model.base or values["model"],
        base_model=job_model.base,
    )


def variables_of(row: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The job variables of a job's flow run: how it is to run, as far as that is not the default."""
    image = row["docker_image"]
    wishes = {
        "docker_image": None if image == settings.image else image,
        "requires_vram_gb": row["requires_vram_gb"],
        "allowed_hardware": row["allowed_hardware"],
        "max_price_per_hour": row["max_price_per_hour"],
        **{name: row[name] or None for name in _HOST},
        "priority": row["priority"],
    }
    return {name: value for name, value in wishes.items() if value is not None}


def _check_custom(name: str, entrypoint: str) -> None:
    if name in _OTHER_TYPES:
        raise InvalidParameterError(f"name={name!r} is a built-in job type; choose another name.")
    if not entrypoint.strip():
        raise InvalidParameterError(f"entrypoint={entrypoint!r} is no shell command; give the one to run.")


def _flow_row(
    flow_run_id: UUID, deployment: str | None, options: Options, settings: Settings
) -> dict[str, Any]:
    """A flow of the user's own is a job that runs once: its id is its flow run's."""
    check_satisfiable(options, requires_vram_gb=options.requires_vram_gb or 0)
    return {
        "id": f"flow-{flow_run_id}",
        "type": "flow",
        "params": {"validated_params": {"deployment": deployment}, "mounted_files": {}},
        "docker_image": options.docker_image or settings.image,
        "requires_vram_gb": options.requires_vram_gb or 0,
        "allowed_hardware": options.allowed_hardware,
        "max_price_per_hour": options.max_price_per_hour,
        "cloud": options.cloud,
        "min_cuda": options.min_cuda,
        "min_vcpu": options.min_vcpu,
        "min_ram_gb": options.min_ram_gb,
        "priority": options.priority,
        "timeout_seconds": options.timeout,
        "secrets": options.secrets,
    }
