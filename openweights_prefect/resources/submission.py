"""Turn a validated request into a job of the ledger: one round trip when the ledger knows it already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from openweights_prefect.errors import ConflictError, InvalidParameterError
from openweights_prefect.files.folders import walk_folder
from openweights_prefect.files.hashing import Digest, digest_path
from openweights_prefect.files.validation import validate_jsonl
from openweights_prefect.resources.files import store_file
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.parameters import Options
from openweights_prefect.resources.session import Session
from openweights_prefect.types.identity import file_id, job_id
from openweights_prefect.types.job import JobColumns
from openweights_prefect.types.paths import safe_relative_path

MOUNT_PURPOSE = "custom_job_file"

_ATTEMPTS = 3
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


@dataclass(frozen=True, kw_only=True)
class Request:
    """A job to be."""

    type: str
    prefix: str
    behaviour_version: int
    params: Mapping[str, Any]
    """The validated ones, as JSON."""
    identity: Mapping[str, Any]
    """What is hashed in place of `params`."""
    entrypoint: str
    options: Options
    image: str | None
    """Image that the user named, here or on the class."""
    requires_vram_gb: int
    model: str | None = None
    local_files: Mapping[str, LocalFile] = field(default_factory=dict)
    """Target path -> file to upload when it is missing."""
    stored_files: Mapping[str, str] = field(default_factory=dict)
    """Target path -> id of a file that must be stored."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """File id -> parameter that named it."""


def submit(session: Session, request: Request) -> Job:
    """Submit a job; the same job joins the one that exists, or puts a failed one back to pending.

    Missing files are uploaded, only when the ledger asks for them. Raises `InvalidParameterError` for a file
    that is neither stored nor local.
    """
    row = _row(session, request)
    for _ in range(_ATTEMPTS):
        [answer] = session.ledger.call("submit_job", job=row)
        if answer["outcome"] != "missing_files":
            return Job(session, JobColumns.from_row(answer["job"]))
        _upload(session, request, answer["missing"])
    raise ConflictError(f"Job {row['id']!r} was not stored: somebody deletes its files. Submit it again.")


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
        return [(folder + file.target, file.path) for file in walk_folder(path).files]
    if not path.exists():
        raise InvalidParameterError(
            f"Mount source {source!r} (for target {target!r}) does not exist; "
            f"check the path, relative to {str(Path.cwd())!r}."
        )
    return [(target, path)]


def _row(session: Session, request: Request) -> dict[str, Any]:
    mounts = {**{target: file.id for target, file in request.local_files.items()}, **request.stored_files}
    options = request.options
    return {
        "id": job_id(
            prefix=request.prefix,
            job_type=request.type,
            params=request.identity,
            mounts=mounts,
            image=request.image,
            organization_id=session.organization_id,
            behaviour_version=request.behaviour_version,
            suffix=options.job_id_suffix,
        ),
        "type": request.type,
        "model": request.model,
        "params": {"validated_params": dict(request.params), "mounted_files": mounts},
        "mounts": mounts,
        "files": sorted(set(mounts.values())),
        "entrypoint": request.entrypoint,
        "docker_image": request.image or session.settings.image,
        "requires_vram_gb": request.requires_vram_gb,
        "allowed_hardware": options.allowed_hardware,
        "max_price_per_hour": options.max_price_per_hour,
        "priority": options.priority,
        "timeout_seconds": options.timeout,
        "retries": options.retries,
        "env": options.env,
    }


def _upload(session: Session, request: Request, missing: Iterable[str]) -> None:
    local = {file.id: file for file in request.local_files.values()}
    unknown = [identity for identity in missing if identity not in local]
    if unknown:
        named = ", ".join(
            f"{request.parameters.get(identity, 'a file')}={identity!r}" for identity in unknown
        )
        raise InvalidParameterError(
            f"No such file in this organization: {named}. Upload it with `ow.files.upload` and pass its 'id'."
        )

    def upload(identity: str) -> None:
        file = local[identity]
        validate_jsonl(file.path, file.purpose)
        store_file(session, file.path, file.purpose, file.digest, filename=file.path.name)

    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        list(pool.map(upload, missing))
