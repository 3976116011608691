"""From validated parameters to a row of the ledger: the same job for a script, a form or a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.fine_tuning.params import FineTuningParams
from openweights_prefect.jobs.logprob.params import LogprobParams
from openweights_prefect.jobs.memory import requires_vram_gb
from openweights_prefect.jobs.model_shape import Shape
from openweights_prefect.jobs.models import is_mounted
from openweights_prefect.jobs.naming import RepositoryName
from openweights_prefect.jobs.options import Options, with_secret
from openweights_prefect.jobs.training.params import ModelParams, TrainingParams
from openweights_prefect.jobs.weighted_sft.params import WeightedSftParams
from openweights_prefect.provisioning.hardware import catalogue_offers, choose_offers, explain_no_offer
from openweights_prefect.types.hardware import Needs
from openweights_prefect.types.identity import job_id

HUB_TOKEN = "HF_TOKEN"
"""The organization's secret that a job pushes with."""

_CUSTOM_BEHAVIOUR = 1
_CUSTOM_VRAM_GB = 24
_PRICES_MOVE = 2.0


@dataclass(frozen=True, kw_only=True)
class JobType:
    """A job type of ours: parameters in, one program that does it."""

    name: str
    prefix: str
    params: type[ModelParams]
    entrypoint: str
    behaviour_version: int
    """Raised when the same parameters would give another result: finished jobs are then run again."""

    @property
    def deployment(self) -> str:
        """Its flow and deployment in Prefect."""
        dashed = self.name.replace("_", "-")
        return f"{dashed}/{dashed}"


FINE_TUNING = JobType(
    name="fine_tuning",
    prefix="ftjob",
    params=FineTuningParams,
    entrypoint="python -m openweights_prefect.jobs.training.train",
    behaviour_version=2,
)
WEIGHTED_SFT = JobType(
    name="weighted_sft",
    prefix="sftjob",
    params=WeightedSftParams,
    entrypoint="python -m openweights_prefect.jobs.training.train weighted_sft",
    behaviour_version=1,
)
LOGPROB = JobType(
    name="logprob",
    prefix="logprobjob",
    params=LogprobParams,
    entrypoint="python -m openweights_prefect.jobs.logprob.measure",
    behaviour_version=1,
)
JOB_TYPES = {kind.name: kind for kind in (FINE_TUNING, WEIGHTED_SFT, LOGPROB)}


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
    repository: RepositoryName | None = None
    """Where it pushes to, of which the job's own id may be a part; `params` hold the template."""

    def row(self, *, organization_id: str, default_image: str) -> dict[str, Any]:
        """The argument of `submit_job`; its id says what is computed, the rest how.

        Raises `InvalidParameterError` with the nearest mend when no pod of the catalogue can run it.
        """
        options = self.options
        vram_gb = self.requires_vram_gb if options.requires_vram_gb is None else options.requires_vram_gb
        check_satisfiable(options, requires_vram_gb=vram_gb)
        identity = job_id(
            prefix=self.prefix,
            job_type=self.type,
            params=self.identity,
            mounts=self.mounts,
            image=self.image,
            organization_id=organization_id,
            behaviour_version=self.behaviour_version,
            suffix=options.job_id_suffix or self.suffix,
        )
        return {
            "id": identity,
            "type": self.type,
            "model": self.model,
            "params": {**self._named(identity), "mounted_files": dict(self.mounts)},
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

    def _named(self, identity: str) -> dict[str, Any]:
        """The parameters with the final name of the model, and the template that the id was made of."""
        if self.repository is None:
            return {"validated_params": dict(self.params)}
        field = "finetuned_model_id"
        named = {**self.params, field: self.repository.of(identity)}
        return {"validated_params": named, "templates": {field: self.params[field]}}


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


def model_request(
    kind: JobType,
    params: ModelParams,
    mounts: Mapping[str, str],
    options: Options,
    *,
    model_name: str | None = None,
    base_model: str | None = None,
    shape: Shape | None = None,
) -> JobRequest:
    """A job of one of our types. Data files are mounted by parameter, a model that is files under `model/`.

    `model_name` is the model as the user wrote it, to name the result from, and to estimate the memory from
    without its `shape`; by default the parameter. `base_model` is the one of Hugging Face that a mounted
    model began as.
    """
    document = params.model_dump(mode="json")
    named = params if model_name is None else params.model_copy(update={"model": model_name})
    training = params if isinstance(params, TrainingParams) else None
    if training and training.push:
        options = with_secret(options, HUB_TOKEN)
    return JobRequest(
        type=kind.name,
        prefix=kind.prefix,
        behaviour_version=kind.behaviour_version,
        params=document,
        identity=document,
        mounts={**mounts, **{file.target: str(file.value) for file in data_files(document)}},
        entrypoint=kind.entrypoint,
        options=options,
        image=options.docker_image,
        requires_vram_gb=requires_vram_gb(named, kind=kind.name, shape=shape),
        model=base_model if is_mounted(mounts) else params.model,
        suffix=training.job_id_suffix if training else None,
        repository=training.repository(named.model) if training else None,
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


class DataFile(NamedTuple):
    """A parameter that names a data file, and where that is mounted."""

    path: tuple[str | int, ...]
    target: str
    value: Any

    @property
    def parameter(self) -> str:
        """As an error names it."""
        return ".".join(map(str, self.path))


def data_files(values: Mapping[str, Any]) -> list[DataFile]:
    """The data files of parameters that are validated, or not yet: what has no value is left out."""
    files = [
        DataFile((name,), f"data/{name}.jsonl", values[name])
        for name in ("training_file", "test_file", "dataset")
        if values.get(name) is not None
    ]
    tracked = values.get("logp_callback_datasets")
    if isinstance(tracked, Mapping):
        files += [
            DataFile(("logp_callback_datasets", name), f"data/logp/{number}.jsonl", tracked[name])
            for number, name in enumerate(sorted(tracked, key=str))
        ]
    sampled = values.get("sampling_callbacks")
    if isinstance(sampled, list):
        files += [
            DataFile(
                ("sampling_callbacks", number, "dataset"),
                f"data/sampling/{number}.jsonl",
                callback["dataset"],
            )
            for number, callback in enumerate(sampled)
            if isinstance(callback, Mapping) and "dataset" in callback
        ]
    return files
