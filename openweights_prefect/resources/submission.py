"""Turn a validated request into a job of the ledger: one round trip when the ledger knows it already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from openweights_prefect.errors import ConflictError, InvalidParameterError
from openweights_prefect.files.folders import walk_folder
from openweights_prefect.files.hashing import Digest, digest_path
from openweights_prefect.files.validation import validate_jsonl
from openweights_prefect.jobs.request import JobRequest
from openweights_prefect.jobs.secrets import unknown_secrets
from openweights_prefect.resources.files import store_file
from openweights_prefect.resources.job import Job, spent
from openweights_prefect.resources.session import Session
from openweights_prefect.types.identity import file_id
from openweights_prefect.types.job import JobColumns
from openweights_prefect.types.paths import safe_relative_path

MOUNT_PURPOSE = "custom_job_file"

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_UNCHECKED = "unchecked:file-000000000000"
"""No file: the ledger misses it from a job that it does not know, and only then is that job checked."""
_UPLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine that a job reads."""

    path: Path
    purpose: str
    digest: Digest

    @property
    def id(self) -> str:
        """Its file id, whether it is stored already or not."""
        return file_id(self.purpose, self.digest.id_hex12)


def submit(
    session: Session,
    request: JobRequest,
    *,
    local_files: Mapping[str, LocalFile],
    parameters: Mapping[str, str] | None = None,
    check: Callable[[], JobRequest] | None = None,
) -> Job:
    """Submit a job; the same job joins the one that exists, or puts a failed one back to pending.

    Missing files are uploaded from `local_files` (by target), only when the ledger asks for them. Before
    that `check` is called, for a job that is new, and may raise or change the request. Raises
    `InvalidParameterError` for a file that is neither stored nor local, naming it by `parameters` (file id ->
    parameter), and for secrets that the organization does not have.
    """
    row = _row(session, request)
    local = {file.id: file for file in local_files.values()}
    for _ in range(_ATTEMPTS):
        unchecked = [_UNCHECKED] if check else []
        [answer] = session.ledger.call("submit_job", job={**row, "files": row["files"] + unchecked})
        if answer["outcome"] == "limit":
            raise spent(row["id"])
        if answer["outcome"] == "missing_secrets":
            raise unknown_secrets(answer["missing"])
        if answer["outcome"] != "missing_files":
            return Job(session, JobColumns.from_row(answer["job"]))
        missing = [identity for identity in answer["missing"] if identity != _UNCHECKED]
        _refuse_unknown(local, parameters or {}, missing)
        for identity in missing:
            validate_jsonl(local[identity].path, local[identity].purpose)
        if check is not None and _UNCHECKED in answer["missing"]:
            row, check = _row(session, check()), None
        _upload(session, [local[identity] for identity in missing])
    raise ConflictError(f"Job {row['id']!r} was not stored: somebody deletes its files. Submit it again.")


def ids(files: Mapping[str, LocalFile]) -> dict[str, str]:
    """Target path -> file id."""
    return {target: file.id for target, file in files.items()}


def local_file(session: Session, path: Path, purpose: str) -> LocalFile:
    """Hash a local file."""
    return LocalFile(path, purpose, digest_path(path, session.organization_id))


def local_mounts(session: Session, sources: Mapping[str, str]) -> dict[str, LocalFile]:
    """Hash files and folders (source -> target); ignored files and secrets in folders are left out.

    Raises `InvalidParameterError` for a source that does not exist and for targets that exclude each other.
    """
    mounts: dict[str, LocalFile] = {}
    known: dict[Path, LocalFile] = {}
    for source, target in sources.items():
        for name, path in _files(source, target):
            key = str(safe_relative_path(name))
            if key in mounts:
                raise InvalidParameterError(f"Two mounts have the target {key!r}; give each one its own.")
            if path not in known:
                known[path] = local_file(session, path, MOUNT_PURPOSE)
            mounts[key] = known[path]
    for target in mounts:
        for parent in map(str, PurePosixPath(target).parents):
            if parent in mounts:
                raise InvalidParameterError(
                    f"The mount {parent!r} is a file, so {target!r} cannot lie in it."
                )
    return mounts


def _files(source: str, target: str) -> Iterable[tuple[str, Path]]:
    path = Path(source).expanduser()
    if path.is_dir():
        folder = "" if target in ("", ".", "./") else f"{target}/"
        listing = walk_folder(path)
        if left_out := listing.left_out():
            logger.warning("Mount %r leaves out %s", source, left_out)
        return [(folder + file.target, file.path) for file in listing.files]
    if not path.exists():
        raise InvalidParameterError(
            f"Mount source {source!r} (for target {target!r}) does not exist; "
            f"check the path, relative to {str(Path.cwd())!r}."
        )
    return [(target, path)]


def _row(session: Session, request: JobRequest) -> dict[str, Any]:
    return request.row(organization_id=session.organization_id, default_image=session.settings.image)


def _refuse_unknown(
    local: Mapping[str, LocalFile], parameters: Mapping[str, str], missing: Iterable[str]
) -> None:
    unknown = [identity for identity in missing if identity not in local]
    if unknown:
        named = ", ".join(f"{parameters.get(identity, 'a file')}={identity!r}" for identity in unknown)
        raise InvalidParameterError(
            f"No such file in this organization: {named}. Upload it with `ow.files.upload` and pass its 'id'."
        )


def _upload(session: Session, files: Iterable[LocalFile]) -> None:
    def upload(file: LocalFile) -> None:
        store_file(session, file.path, file.purpose, file.digest, filename=file.path.name)

    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        list(pool.map(upload, files))
