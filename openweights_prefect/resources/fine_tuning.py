"""`ow.fine_tuning`: train a model on conversations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.fine_tuning.params import FineTuningParams
from openweights_prefect.jobs.options import split, validated
from openweights_prefect.jobs.request import MODEL_FOLDER, data_files, data_target, fine_tuning_request
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.jobs import StoredJobs
from openweights_prefect.resources.session import Session
from openweights_prefect.resources.submission import LocalFile, ids, local_file, local_mounts, submit

_FILE_PARAMETERS = ("training_file", "test_file")
_FILE_ID = re.compile(r"[\w-]+:file-[0-9a-f]{12}")
_JOB_ID = re.compile(r"[a-z]+job-[0-9a-f]{12}(-[\w.-]+)?")
_MODEL_FILES = ("config.json", "adapter_config.json")


class FineTuning(StoredJobs):
    """Fine-tuning jobs."""

    def create(self, **parameters: Any) -> Job:
        """Submit a fine-tuning job: the fields of `FineTuningParams`, and the options of every job.

        `training_file` and `test_file` are file ids or local files, `model` is a Hugging Face id or a local
        folder; what is local is uploaded if it is not stored yet. GPU memory is estimated unless
        `requires_vram_gb` or `allowed_hardware` is given. Submitting the same job again gives the job that
        exists.
        """
        options, values = split(parameters, FineTuningParams, job_type="fine_tuning")
        named_files = _local_data(self._session, values)
        model_files = _local_model(self._session, values)
        named_model = values.get("model")
        values |= {name: file.id for name, file in named_files.items()}
        values |= {"model": MODEL_FOLDER} if model_files else {}
        params = validated(FineTuningParams, values, job_type="fine_tuning")
        local_files = {**model_files, **{data_target(name): file for name, file in named_files.items()}}
        request = fine_tuning_request(params, ids(model_files), options, model_name=str(named_model))
        named = {identity: name for name, identity in data_files(params).items()}
        return submit(self._session, request, local_files=local_files, parameters=named)


def _local_data(session: Session, values: dict[str, Any]) -> dict[str, LocalFile]:
    """The parameters that name a file of this machine; they need the purpose of their loss."""
    purpose = "preference" if values.get("loss") in ("dpo", "orpo") else "conversations"
    found = {}
    for name in _FILE_PARAMETERS:
        value = values.get(name)
        if not isinstance(value, str | Path) or _FILE_ID.fullmatch(str(value)):
            continue
        path = Path(value).expanduser()
        if not path.is_file():
            raise InvalidParameterError(
                f"{name}={str(value)!r} is neither a file id, such as `conversations:file-0123456789ab`, "
                f"nor a file here; check the path, relative to {str(Path.cwd())!r}."
            )
        found[name] = local_file(session, path, purpose)
    return found


def _local_model(session: Session, values: dict[str, Any]) -> dict[str, LocalFile]:
    """The files of a model that is a folder of this machine; none when it is a Hugging Face id."""
    model = values.get("model")
    if not isinstance(model, str | Path):
        return {}
    if _JOB_ID.fullmatch(str(model)):
        raise InvalidParameterError(
            f"model={model!r}: training on the result of a job is not available yet. "
            "Download it with `job.download(folder)` and pass the folder of the model."
        )
    folder = Path(model).expanduser()
    if folder.is_dir() and any((folder / name).is_file() for name in _MODEL_FILES):
        return local_mounts(session, {str(folder): MODEL_FOLDER})
    if isinstance(model, Path) or model.startswith(("./", "../", "/", "~")):
        raise InvalidParameterError(
            f"model={str(model)!r} is not a folder with a `config.json`; "
            f"check the path, relative to {str(Path.cwd())!r}."
        )
    return {}
