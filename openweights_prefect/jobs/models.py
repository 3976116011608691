"""Models that are files: where they lie in a job's folder, and those that a finished job left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.types.canonical import decode_event
from openweights_prefect.types.identity import parse_file_id
from openweights_prefect.types.paths import safe_relative_path

MODEL_FOLDER = "model"
"""Where a model that is files is mounted: a whole one, or an adapter."""
BASE_FOLDER = "base"
"""Where the base model of a mounted adapter is, if that is files, too."""
ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"

_RESULTS = (("adapter", ADAPTER_CONFIG), ("model", MODEL_CONFIG))
_PAGE_ROWS = 500


class JobModel(NamedTuple):
    """The model of a finished job."""

    mounts: dict[str, str]
    """Target path -> file id."""
    base: str | None
    """The Hugging Face model that the training began with, if it was one."""


def is_mounted(mounts: Mapping[str, str]) -> bool:
    """Whether the model of a job is among its files."""
    return any(target.startswith(f"{MODEL_FOLDER}/") for target in mounts)


def model_of_job(ledger: Ledger, job_id: str) -> JobModel:
    """The files that a completed job of the caller's organization left as its model, and their base.

    Its adapter, to go on with it, else its model. Raises `InvalidParameterError` when there is none yet.
    """
    rows = ledger.call("get_job", job_id=job_id)
    if not rows:
        raise InvalidParameterError(
            f"model={job_id!r}: no such job in this organization; `ow.jobs.list()` shows those that exist."
        )
    [job] = rows
    if job["status"] != "completed":
        raise InvalidParameterError(
            f"model={job_id!r}: the job is {job['status']}, and has a model once it is completed. "
            f"`ow.jobs.retrieve({job_id!r}).wait()` waits for that."
        )
    files = _result_files(ledger, job_id)
    for folder, config in _RESULTS:
        if f"{folder}/{config}" not in files:
            continue
        mounts = _moved(files, folder, MODEL_FOLDER)
        if config == ADAPTER_CONFIG:
            mounts |= _base_files(job["mounts"])
        return JobModel(mounts, job["model"])
    raise InvalidParameterError(f"model={job_id!r}: the job left no model{_instead(job)}")


def _result_files(ledger: Ledger, job_id: str) -> dict[str, str]:
    """Path -> file id of what the run left that completed the job, its newest."""
    files: dict[str, str] = {}
    for run in ledger.call("list_runs", for_job=job_id, max_rows=1):
        for event in _events(ledger, run["id"]):
            data = decode_event(event["data"])
            try:
                # Jobs log what they like: `path` and `file` may be any values.
                files[str(safe_relative_path(data["path"]))] = str(parse_file_id(data["file"]))
            except (KeyError, InvalidParameterError):
                continue
    return files


def _events(ledger: Ledger, run_id: str) -> Iterator[Row]:
    after = 0
    while True:
        rows = ledger.call("list_events", for_run=run_id, after_id=after, max_rows=_PAGE_ROWS)
        yield from rows
        if len(rows) < _PAGE_ROWS:
            return
        after = rows[-1]["id"]


def _base_files(mounts: Mapping[str, str]) -> dict[str, str]:
    """What the adapter of a job with these mounts was trained on, if that was files."""
    if base := _moved(mounts, BASE_FOLDER, BASE_FOLDER):
        return base
    whole = f"{MODEL_FOLDER}/{ADAPTER_CONFIG}" not in mounts
    return _moved(mounts, MODEL_FOLDER, BASE_FOLDER) if whole else {}


def _moved(files: Mapping[str, str], source: str, target: str) -> dict[str, str]:
    """The files of a folder, in another folder."""
    return {
        f"{target}/{path.removeprefix(f'{source}/')}": file
        for path, file in files.items()
        if path.startswith(f"{source}/")
    }


def _instead(job: Mapping[str, Any]) -> str:
    params = job["params"].get("validated_params", {})
    if params.get("push") and params.get("finetuned_model_id"):
        return f", but pushed one: pass model={params['finetuned_model_id']!r}."
    return ", neither `adapter/adapter_config.json` nor `model/config.json`. Pass a job that trained one."
