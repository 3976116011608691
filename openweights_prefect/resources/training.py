"""What `ow.fine_tuning`, `ow.weighted_sft` and `ow.logprob` share: from arguments to a job."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.model_shape import Shape, shape_from_name, shape_of_folder
from openweights_prefect.jobs.models import (
    ADAPTER_CONFIG,
    BASE_FOLDER,
    MODEL_CONFIG,
    MODEL_FOLDER,
    model_of_job,
)
from openweights_prefect.jobs.options import split, validated
from openweights_prefect.jobs.request import DataFile, JobRequest, JobType, data_files, model_request
from openweights_prefect.jobs.training.params import is_file_id, is_job_id, purpose_of
from openweights_prefect.resources.check import check_training
from openweights_prefect.resources.check_report import CheckReport
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.preflight import ON_CREATE, ON_REQUEST, Limits
from openweights_prefect.resources.session import Session
from openweights_prefect.resources.submission import LocalFile, ids, local_file, local_mounts, submit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A job to be, with the files of this machine that it reads."""

    request: JobRequest
    local_files: Mapping[str, LocalFile]
    """By target."""
    parameters: Mapping[str, str]
    """File id -> the parameter that names it."""
    shape: Shape | None
    """Of the model, as far as it is known here."""


def create(session: Session, kind: JobType, arguments: Mapping[str, Any], *, check: bool = False) -> Job:
    """Submit a job of one of our types; the same arguments give the job that exists.

    With `check`, a job that is new is checked first, as far as that is quickly done.
    """
    if not isinstance(check, bool):
        raise InvalidParameterError(f"check={check!r} is neither True nor False.")
    prepared = prepare(session, kind, arguments)
    return submit(
        session,
        prepared.request,
        local_files=prepared.local_files,
        parameters=prepared.parameters,
        check=partial(_checked, session, prepared) if check else None,
    )


def check(session: Session, kind: JobType, arguments: Mapping[str, Any]) -> CheckReport:
    """Look at the data and the needs of a training without submitting it."""
    prepared = prepare(session, kind, arguments)
    return _check(session, prepared, ON_REQUEST)


def prepare(session: Session, kind: JobType, arguments: Mapping[str, Any]) -> Prepared:
    """Validate everything and hash what is local; nothing is stored yet.

    Raises `InvalidParameterError` for bad parameters, and for files and models that are not there.
    """
    options, values = split(arguments, kind.params, job_type=kind.name)
    values = copy.deepcopy(values)
    local_data = _local_data(session, values)
    model = _model(session, values.get("model"))
    if model.mounts:
        values["model"] = MODEL_FOLDER
    params = validated(kind.params, values, job_type=kind.name)
    shape = model.shape or shape_from_name(model.name)
    request = model_request(
        kind, params, model.mounts, options, model_name=model.name, base_model=model.base, shape=model.shape
    )
    named = dict.fromkeys(model.mounts.values(), "model")
    named |= {str(file.value): file.parameter for file in data_files(request.params)}
    return Prepared(request, {**model.local, **local_data}, named, shape)


def _check(session: Session, prepared: Prepared, limits: Limits) -> CheckReport:
    return check_training(
        session, prepared.request, prepared.local_files, shape=prepared.shape, limits=limits
    )


def _checked(session: Session, prepared: Prepared) -> JobRequest:
    """The request with the memory that the check found; raises the first error that it found."""
    report = _check(session, prepared, ON_CREATE)
    report.raise_for_errors()
    if report.not_checked is not None:
        logger.info("The data is not checked before the job runs: %s", report.not_checked)
    for warning in report.warnings:
        logger.warning("%s", warning)
    if report.memory.source != "config":
        return prepared.request
    return replace(prepared.request, requires_vram_gb=report.memory.requires_vram_gb)


@dataclass(frozen=True)
class _Model:
    """A model as the user named it, and its files, if it is not one of Hugging Face."""

    name: str
    mounts: Mapping[str, str]
    local: Mapping[str, LocalFile]
    base: str | None = None
    shape: Shape | None = None


def _local_data(session: Session, values: dict[str, Any]) -> dict[str, LocalFile]:
    """The data files of this machine, by target; in `values` their ids take the places of the paths."""
    found = {}
    for file in data_files(values):
        if not isinstance(file.value, str | Path) or is_file_id(str(file.value)):
            continue
        path = Path(file.value).expanduser()
        if not path.is_file():
            raise InvalidParameterError(
                f"{file.parameter}={str(file.value)!r} is neither a file id, such as "
                "`conversations:file-0123456789ab`, nor a file here; check the path, relative to "
                f"{str(Path.cwd())!r}."
            )
        found[file.target] = local_file(session, path, _purpose(file, values))
        _replace(values, file.path, found[file.target].id)
    return found


def _purpose(file: DataFile, values: Mapping[str, Any]) -> str:
    """Preferences are what their losses train and are evaluated on; anything else reads conversations."""
    trained_on = file.path[0] in ("training_file", "test_file")
    return purpose_of(str(values.get("loss"))) if trained_on else "conversations"


def _replace(values: Any, path: tuple[str | int, ...], value: str) -> None:
    *parents, last = path
    for key in parents:
        values = values[key]
    values[last] = value


def _model(session: Session, model: Any) -> _Model:
    """What `model` means; what it cannot be is left to validation."""
    if not isinstance(model, str | Path):
        return _Model(str(model), {}, {})
    if is_job_id(str(model)):
        found = model_of_job(session.ledger, str(model))
        return _Model(found.base or str(model), found.mounts, {}, found.base)
    files = _local_model(session, model)
    return _Model(str(model), ids(files), files, shape=_shape(files))


def _shape(files: Mapping[str, LocalFile]) -> Shape | None:
    """The shape of a model on this machine; of an adapter's base, if that is here."""
    folder = BASE_FOLDER if f"{MODEL_FOLDER}/{ADAPTER_CONFIG}" in files else MODEL_FOLDER
    config = files.get(f"{folder}/{MODEL_CONFIG}")
    return shape_of_folder(config.path.parent) if config else None


def _local_model(session: Session, model: str | Path) -> dict[str, LocalFile]:
    """The files of a model that is a folder of this machine; none when it is a Hugging Face id."""
    folder = Path(model).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        return local_mounts(session, {str(folder): MODEL_FOLDER, **_local_base(folder)})
    if (folder / MODEL_CONFIG).is_file():
        return local_mounts(session, {str(folder): MODEL_FOLDER})
    if isinstance(model, Path) or model.startswith(("./", "../", "/", "~")):
        raise InvalidParameterError(
            f"model={str(model)!r} is not a folder with a `config.json`; "
            f"check the path, relative to {str(Path.cwd())!r}."
        )
    return {}


def _local_base(adapter: Path) -> dict[str, str]:
    """The base model of an adapter, if that is a folder of this machine, too: folder -> target."""
    path = adapter / ADAPTER_CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise InvalidParameterError(
            f"{str(path)!r} names no `base_model_name_or_path`, so the adapter has no model to be put on."
        ) from exc
    if base in (MODEL_FOLDER, BASE_FOLDER):
        raise InvalidParameterError(
            f"model={str(adapter)!r} is an adapter for a model that was a local folder. Pass the id of the "
            f"job that trained it, or write that folder into `base_model_name_or_path` of {str(path)!r}."
        )
    folder = Path(str(base)).expanduser()
    return {str(folder): BASE_FOLDER} if (folder / MODEL_CONFIG).is_file() else {}
