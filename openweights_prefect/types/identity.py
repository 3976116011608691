"""Identities by content: the same work has the same job id, the same bytes the same file id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.types.canonical import canonical_json
from openweights_prefect.types.paths import safe_relative_path

_ID_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PURPOSE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{12}")
_FILE_ID = re.compile(rf"({_PURPOSE.pattern}):file-({_DIGEST.pattern})")
_ORGANIZATION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class FileId:
    """The two parts of a file id; `str()` puts them together again."""

    purpose: str
    digest: str
    """First 12 hexadecimal digits of sha256(content + organization id)."""

    @property
    def name(self) -> str:
        """The part after the purpose, which is legal as a file name everywhere."""
        return f"file-{self.digest}"

    def __str__(self) -> str:
        return f"{self.purpose}:{self.name}"


def job_id(
    *,
    prefix: str,
    job_type: str,
    params: Mapping[str, object],
    mounts: Mapping[str, str],
    image: str | None,
    organization_id: str,
    behaviour_version: int,
    suffix: str | None,
) -> str:
    """Name a job by what it does: `{prefix}-{12 hex digits}`, then `-{suffix}` when there is one.

    `params` are the validated ones, defaults written out; leave hardware wishes out of them. `mounts` maps
    target paths to file ids. `image` is None unless the user named one. Key and mount order do not matter.
    """
    _check(_ID_PART, "prefix", prefix)
    if suffix is not None:
        _check(_ID_PART, "job_id_suffix", suffix)
    identity = {
        "behaviour_version": behaviour_version,
        "image": image,
        "job_type": job_type,
        "mounts": _checked_mounts(mounts),
        "organization_id": checked_organization_id(organization_id),
        "params": params,
    }
    digest = hashlib.sha256(canonical_json(identity, name="job").encode("ascii")).hexdigest()[:12]
    return f"{prefix}-{digest}" if suffix is None else f"{prefix}-{digest}-{suffix}"


def file_id(purpose: str, digest: str) -> str:
    """Put a file id together; `digest` is `Digest.id_hex12` of `openweights_prefect.files.hashing`."""
    _check(_PURPOSE, "purpose", purpose)
    _check(_DIGEST, "digest", digest)
    return str(FileId(purpose, digest))


def parse_file_id(text: str) -> FileId:
    """Take a file id apart; raises `InvalidParameterError` when its form is not exactly that."""
    match = _FILE_ID.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise InvalidParameterError(
            f"{text!r:.120} is not a file id: expected `purpose:file-` and 12 hexadecimal digits, "
            "as `ow.files.upload(...)` gives it."
        )
    return FileId(purpose=match[1], digest=match[2])


def checked_organization_id(text: str) -> str:
    """Return `text` if it can be an organization id, which is also a folder name of the file store."""
    _check(_ORGANIZATION_ID, "organization_id", text)
    return text


def _check(pattern: re.Pattern[str], field: str, value: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise InvalidParameterError(
            f"{field}={value!r:.120} is not allowed; it must match `{pattern.pattern}`."
        )


def _checked_mounts(mounts: Mapping[str, str]) -> dict[str, str]:
    """Spellings of one target (`./a`, `a`) are one target, so that they give one id."""
    result: dict[str, str] = {}
    for target, file in mounts.items():
        normal = str(safe_relative_path(target))
        if normal in result:
            raise InvalidParameterError(f"Two mounts have the target {normal!r}; give each one its own.")
        result[normal] = str(parse_file_id(file))
    return result
