"""From validated parameters to a row of the ledger: the same job for a script, a form or a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.fine_tuning.params import FineTuningParams, requires_vram_gb
from openweights_prefect.jobs.options import Options
from openweights_prefect.provisioning.hardware import catalogue_offers, choose_offers, explain_no_offer
from openweights_prefect.types.hardware import Needs
from openweights_prefect.types.identity import job_id

FINE_TUNING = "fine_tuning"
FINE_TUNING_ENTRYPOINT = "python -m openweights_prefect.jobs.fine_tuning.train"
FINE_TUNING_BEHAVIOUR = 1
"""Raised when the same parameters would give another result: finished jobs are then run again."""
MODEL_FOLDER = "model"
"""Where a model that is a local folder is mounted."""

_CUSTOM_BEHAVIOUR = 1
_CUSTOM_VRAM_GB = 24
_PRICES_MOVE = 2.0


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """A job to be."""

    type: str
    prefix: str
    behaviour_version: int
    params: Mapping[str, Any]
    """The validated ones, as JSON."""
    identity: Mapping[str, Any]
    """What is hashed in place of `params`."""
    mounts: Mapping[str, str]
    """Target path -> file id."""
    entrypoint: str
    options: Options
    image: str | None
    """Image that the user named, here or on the class."""
    requires_vram_gb: int
    """Unless the options say otherwise."""
    model: str | None = None
    suffix: str | None = None

    def row(self, *, organization_id: str, default_image: str) -> dict[str, Any]:
        """The argument of `submit_job`; its id says what is computed, the rest how.

        Raises `InvalidParameterError` with the nearest mend when no pod of the catalogue can run it.
        """
        options = self.options
        vram_gb = self.requires_vram_gb if options.requires_vram_gb is None else options.requires_vram_gb
        check_satisfiable(options, requires_vram_gb=vram_gb)
        return {
            "id": job_id(
                prefix=self.prefix,
                job_type=self.type,
                params=self.identity,
                mounts=self.mounts,
                image=self.image,
                organization_id=organization_id,
                behaviour_version=self.behaviour_version,
                suffix=options.job_id_suffix or self.suffix,
            ),
            "type": self.type,
            "model": self.model,
            "params": {"validated_params": dict(self.params), "mounted_files": dict(self.mounts)},
            "mounts": dict(self.mounts),
            "files": sorted(set(self.mounts.values())),
            "entrypoint": self.entrypoint,
            "docker_image": self.image or default_image,
            "requires_vram_gb": vram_gb,
            "allowed_hardware": options.allowed_hardware,
            "max_price_per_hour": options.max_price_per_hour,
            "cloud": options.cloud,
            "min_cuda": options.min_cuda,
            "min_vcpu": options.min_vcpu,
            "min_ram_gb": options.min_ram_gb,
            "priority": options.priority,
            "timeout_seconds": options.timeout,
            "retries": options.retries,
            "env": options.env,
            "secrets": options.secrets,
        }


def check_satisfiable(options: Options, *, requires_vram_gb: int) -> None:
    """Refuse what nothing in the packaged catalogue satisfies, rather than let it wait for ever.

    The catalogue is of one day. Prices move: only a ceiling of less than half of what it has is hopeless.
    """
    allowed = options.allowed_hardware
    needs = Needs(
        requires_vram_gb=requires_vram_gb,
        allowed_hardware=None if allowed is None else tuple(allowed),
        max_price_per_hour=options.max_price_per_hour,
        cloud=options.cloud,
    )
    if why := _unsatisfiable(needs):
        raise InvalidParameterError(f"No pod can run this job. {why}")


@lru_cache(maxsize=1024)
def _unsatisfiable(needs: Needs) -> str | None:
    offers, ceiling = catalogue_offers(), needs.max_price_per_hour
    hopeful = replace(needs, max_price_per_hour=None if ceiling is None else ceiling * _PRICES_MOVE)
    return None if choose_offers(offers, hopeful) else explain_no_offer(offers, needs)


def fine_tuning_request(
    params: FineTuningParams, mounts: Mapping[str, str], options: Options, *, model_name: str | None = None
) -> JobRequest:
    """A fine-tuning job. Data files are mounted by parameter, a local model under `model/`.

    `model_name` is the model as the user wrote it, to estimate the memory from; by default the parameter.
    """
    document = params.model_dump(mode="json")
    data = {data_target(name): identity for name, identity in data_files(params).items()}
    is_local = any(target.startswith(f"{MODEL_FOLDER}/") for target in mounts)
    named = params if model_name is None else params.model_copy(update={"model": model_name})
    return JobRequest(
        type=FINE_TUNING,
        prefix="ftjob",
        behaviour_version=FINE_TUNING_BEHAVIOUR,
        params=document,
        identity=document,
        mounts={**mounts, **data},
        entrypoint=FINE_TUNING_ENTRYPOINT,
        options=options,
        image=options.docker_image,
        requires_vram_gb=requires_vram_gb(named),
        model=None if is_local else params.model,
        suffix=params.job_id_suffix,
    )


def custom_request(
    name: str,
    params: Mapping[str, Any],
    entrypoint: str,
    mounts: Mapping[str, str],
    options: Options,
    *,
    image: str | None = None,
    requires_vram_gb: int = _CUSTOM_VRAM_GB,
) -> JobRequest:
    """A job of a user's own type. The command is part of its identity, for it is the user's code."""
    return JobRequest(
        type=name,
        prefix=name,
        behaviour_version=_CUSTOM_BEHAVIOUR,
        params=params,
        identity={"entrypoint": entrypoint, "params": dict(params)},
        mounts=mounts,
        entrypoint=entrypoint,
        options=options,
        image=options.docker_image or image,
        requires_vram_gb=requires_vram_gb,
        model=params["model"] if isinstance(params.get("model"), str) else None,
    )


def data_files(params: FineTuningParams) -> dict[str, str]:
    """The parameters that name data files, and the file ids."""
    named = {"training_file": params.training_file, "test_file": params.test_file}
    return {name: identity for name, identity in named.items() if identity is not None}


def data_target(parameter: str) -> str:
    """Where the file of a parameter is mounted."""
    return f"data/{parameter}.jsonl"
