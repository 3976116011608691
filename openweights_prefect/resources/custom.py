"""Job types of users: a subclass of `Jobs` with `@register("name")` becomes `ow.name`."""

from __future__ import annotations

import inspect
import keyword
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from openweights_prefect.errors import ConflictError, InvalidParameterError
from openweights_prefect.jobs.options import split, validated
from openweights_prefect.jobs.request import custom_request
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.jobs import StoredJobs
from openweights_prefect.resources.submission import ids, local_mounts, submit

RESERVED_NAMES = frozenset(
    [
        "api",
        "async_chat",
        "auth_token",
        "chat",
        "close",
        "costs",
        "deploy_kwargs",
        "events",
        "files",
        "fine_tuning",
        "flow",
        "hf_org",
        "inference",
        "inspect_ai",
        "jobs",
        "logprob",
        "mmlu_pro",
        "org_name",
        "organization",
        "organization_id",
        "run",
        "runs",
        "script",
        "secrets",
        "settings",
        "supabase_key",
        "supabase_url",
        "sweep",
        "sync_chat",
        "tokens",
        "use_async",
        "weighted_sft",
    ]
)
"""What a client has or will have of its own."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class NoParams(BaseModel):
    """The parameters of a job type that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Jobs(StoredJobs):
    """Base of custom job types; also lists, finds and cancels jobs of any type.

    The class attributes and `get_entrypoint` say what a job is. Its id covers the parameters, the contents
    of the mounts, the entrypoint and the image (if one is named): a changed script is another job.
    """

    mount: ClassVar[Mapping[str, str]] = {}
    """Local file or folder -> path in the job's folder; folders honour `.owignore` and `.gitignore`."""
    params: ClassVar[type[BaseModel]] = NoParams
    requires_vram_gb: ClassVar[int] = 24
    base_image: ClassVar[str | None] = None
    """Image to run in; None takes the default one."""
    name: ClassVar[str] = ""
    """Set by `register`."""

    def get_entrypoint(self, validated_params: Any) -> str:
        """The shell command that a job with these parameters runs, in a folder with its mounts."""
        raise NotImplementedError(
            f"{type(self).__name__} must define `get_entrypoint(self, validated_params)`."
        )

    def create(self, **parameters: Any) -> Job:
        """Submit a job: the fields of `params`, and the options of every job.

        Options: `allowed_hardware`, `requires_vram_gb`, `docker_image`, `job_id_suffix`, `priority`,
        `max_price_per_hour`, `timeout` (seconds), `retries`, `env`, `secrets` (names). Submitting the same
        job again gives the job that exists.
        """
        kind = type(self)
        if not kind.name:
            raise InvalidParameterError(
                f"{kind.__name__} has no name; put `@register('name')` above the class."
            )
        options, values = split(parameters, kind.params, job_type=kind.name)
        params = validated(kind.params, values, job_type=kind.name)
        entrypoint = self.get_entrypoint(params)
        if not isinstance(entrypoint, str) or not entrypoint.strip():
            raise InvalidParameterError(
                f"{kind.__name__}.get_entrypoint gave {entrypoint!r}, no shell command."
            )
        files = local_mounts(self._session, kind.mount)
        request = custom_request(
            kind.name,
            params.model_dump(mode="json"),
            entrypoint,
            ids(files),
            options,
            image=kind.base_image,
            requires_vram_gb=kind.requires_vram_gb,
        )
        return submit(self._session, request, local_files=files)


JobsType = TypeVar("JobsType", bound=type[Jobs])

_registered: dict[str, type[Jobs]] = {}
_lock = threading.Lock()


def register(name: str) -> Callable[[JobsType], JobsType]:
    """Make a subclass of `Jobs` available as `ow.<name>` on every client.

    Raises `ConflictError` for a name that is taken; the same class may be defined again, as a notebook does.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise InvalidParameterError(
            f"{name!r} cannot be the name of a job type; use small letters, digits and `_`, at most 40."
        )
    if name in RESERVED_NAMES:
        raise ConflictError(f"The name {name!r} belongs to the client itself; choose another one.")

    def decorate(kind: JobsType) -> JobsType:
        if not inspect.isclass(kind) or not issubclass(kind, Jobs):
            raise InvalidParameterError(
                f"{kind!r} is not a subclass of `Jobs`; `@register({name!r})` needs one."
            )
        with _lock:
            held = _registered.get(name)
            if held is not None and (held.__module__, held.__qualname__) != (
                kind.__module__,
                kind.__qualname__,
            ):
                raise ConflictError(
                    f"The job type {name!r} is already registered, by {held.__module__}.{held.__qualname__}; "
                    "choose another name."
                )
            kind.name = name
            _registered[name] = kind
        return kind

    return decorate


def registered() -> Mapping[str, type[Jobs]]:
    """The job types of users, by name."""
    with _lock:
        return dict(_registered)
