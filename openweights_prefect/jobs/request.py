"""From validated parameters to a row of the ledger: the same job whoever asks, the SDK, a form or a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from openweights_prefect.jobs.fine_tuning.params import FineTuningParams, requires_vram_gb
from openweights_prefect.types.identity import job_id

FINE_TUNING = "fine_tuning"
FINE_TUNING_COMMAND = "python -m openweights_prefect.jobs.fine_tuning.train"
FINE_TUNING_BEHAVIOUR = 1
"""Raised when the same parameters would give another result; never for a mere change of code."""

CUSTOM_BEHAVIOUR = 1
_CUSTOM_VRAM_GB = 24
_FILE_PARAMETERS = ("training_file", "test_file")


class JobOptions(BaseModel):
    """How to run a job, as opposed to what it is: none of these changes its id, but an image that is named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_hardware: tuple[str, ...] | None = Field(None, min_length=1)
    requires_vram_gb: int | None = Field(None, ge=0, le=4096)
    docker_image: str | None = Field(None, min_length=1, max_length=500)
    job_id_suffix: str | None = None
    max_price_per_hour: float | None = Field(None, gt=0)
    priority: int = Field(0, ge=-100, le=100)
    timeout_seconds: int | None = Field(None, gt=0)
    retries: int = Field(0, ge=0, le=100)
    env: dict[str, str] = Field(default_factory=dict)

    @field_validator("allowed_hardware", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def fine_tuning_request(
    params: FineTuningParams,
    mounts: Mapping[str, str],
    options: JobOptions,
    *,
    organization_id: str,
    default_image: str,
) -> dict[str, Any]:
    """The row of a fine-tuning job. Its data files are mounted as `data/<parameter>.jsonl`."""
    values = params.model_dump(mode="json")
    data = {f"data/{name}.jsonl": values[name] for name in _FILE_PARAMETERS if values[name] is not None}
    return _row(
        job_type=FINE_TUNING,
        prefix="ftjob",
        values=values,
        identity=values,
        mounts={**mounts, **data},
        entrypoint=FINE_TUNING_COMMAND,
        behaviour=FINE_TUNING_BEHAVIOUR,
        options=options,
        model=params.model,
        vram_gb=requires_vram_gb(params),
        suffix=params.job_id_suffix,
        organization_id=organization_id,
        default_image=default_image,
    )


def custom_request(
    name: str,
    params: Mapping[str, Any],
    entrypoint: str,
    mounts: Mapping[str, str],
    options: JobOptions,
    *,
    organization_id: str,
    default_image: str,
    vram_gb: int = _CUSTOM_VRAM_GB,
) -> dict[str, Any]:
    """The row of a custom job. The command is part of its identity: it is the user's code."""
    return _row(
        job_type=name,
        prefix=name.replace("_", "-").lower(),
        values=dict(params),
        identity={"params": dict(params), "entrypoint": entrypoint},
        mounts=dict(mounts),
        entrypoint=entrypoint,
        behaviour=CUSTOM_BEHAVIOUR,
        options=options,
        model=_model_of(params),
        vram_gb=vram_gb,
        suffix=None,
        organization_id=organization_id,
        default_image=default_image,
    )


def _row(
    *,
    job_type: str,
    prefix: str,
    values: dict[str, Any],
    identity: dict[str, Any],
    mounts: dict[str, str],
    entrypoint: str,
    behaviour: int,
    options: JobOptions,
    model: str | None,
    vram_gb: int,
    suffix: str | None,
    organization_id: str,
    default_image: str,
) -> dict[str, Any]:
    return {
        "id": job_id(
            prefix=prefix,
            job_type=job_type,
            params=identity,
            mounts=mounts,
            image=options.docker_image,
            organization_id=organization_id,
            behaviour_version=behaviour,
            suffix=options.job_id_suffix or suffix,
        ),
        "type": job_type,
        "model": model,
        "params": {"validated_params": values, "mounted_files": mounts},
        "mounts": mounts,
        "files": sorted(set(mounts.values())),
        "entrypoint": entrypoint,
        "docker_image": options.docker_image or default_image,
        "requires_vram_gb": vram_gb if options.requires_vram_gb is None else options.requires_vram_gb,
        "allowed_hardware": _names(options.allowed_hardware),
        "max_price_per_hour": options.max_price_per_hour,
        "priority": options.priority,
        "timeout_seconds": options.timeout_seconds,
        "retries": options.retries,
        "env": dict(options.env),
    }


def _names(allowed: Sequence[str] | None) -> list[str] | None:
    return None if allowed is None else list(allowed)


def _model_of(params: Mapping[str, Any]) -> str | None:
    model = params.get("model")
    return model if isinstance(model, str) else None
