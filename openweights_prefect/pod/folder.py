"""Lays out a run's folder: mounts, parameters, and our package alone for the job's interpreter."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import openweights_prefect
from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.runtime.entrypoint import RunFolder
from openweights_prefect.types.paths import safe_relative_path

Fetch = Callable[[str, Path], None]


def prepare(folder: RunFolder, job: Mapping[str, Any], *, job_socket: Path, fetch: Fetch) -> None:
    """Make the folder for one run; `fetch(file_id, target)` brings a file and verifies its hash.

    Raises what `fetch` raises: a run never starts with a missing or damaged file.
    """
    remove(folder)
    (folder.work / "uploads").mkdir(parents=True, mode=0o700)
    folder.temporary.mkdir(mode=0o700)
    folder.log.touch(mode=0o600)
    folder.spool.touch(mode=0o600)
    folder.library.mkdir()
    package = Path(openweights_prefect.__file__).parent
    (folder.library / package.name).symlink_to(package)
    for target, file_id in job["mounts"].items():
        path = folder.work / safe_relative_path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch(file_id, path)
    params = {**_validated(job), "files": {file_id: target for target, file_id in job["mounts"].items()}}
    (folder.work / "params.json").write_text(json.dumps(params, indent=2), encoding="utf-8")
    (folder.path / "job.json").write_text(
        json.dumps({**job, "job_socket": str(job_socket)}), encoding="utf-8"
    )


def left_files(folder: RunFolder) -> list[tuple[str, Path]]:
    """What the run left in `uploads/`, each file with its path in there; links are not followed.

    Raises `InvalidParameterError` for a name that is not legal everywhere, before anything is stored.
    """
    uploads = folder.work / "uploads"
    if uploads.is_symlink():
        raise InvalidParameterError("`uploads` is a link; leave files in the folder that was there.")
    paths = sorted(path for path in uploads.rglob("*") if path.is_file() and not path.is_symlink())
    return [(str(safe_relative_path(path.relative_to(uploads).as_posix())), path) for path in paths]


def remove(folder: RunFolder) -> None:
    """Delete a run's folder; silent when it is not there."""
    shutil.rmtree(folder.path, ignore_errors=True)


def short_temporary_folder() -> str:
    """A temporary folder whose socket paths stay below the 107 bytes that Unix allows."""
    folder = tempfile.gettempdir()
    return folder if len(folder) < 60 else "/tmp"


def _validated(job: Mapping[str, Any]) -> dict[str, Any]:
    params = job["params"]
    return dict(params.get("validated_params", params))
