"""Choose the file store that the settings name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from urllib.parse import SplitResult, parse_qsl, urlsplit

from openweights_prefect.errors import ConfigurationError, InvalidParameterError
from openweights_prefect.files.store import FileStore, LocalFileStore
from openweights_prefect.types.paths import safe_relative_path

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_FORM = "`s3://bucket/prefix?endpoint_url=https://...&region=...`"


def connect(file_store: str, folder: Path, *, hosted: Callable[[], FileStore] | None = None) -> FileStore:
    """Make the store that `OW_FILE_STORE` names; it makes no request before it is used.

    An `s3://` URL is a bucket, any other text a folder. Nothing is the store of the hosted service when there
    is one, else `folder`. Raises `ConfigurationError` for a URL that cannot be one.
    """
    if not file_store:
        return hosted() if hosted is not None else LocalFileStore(folder)
    if _URL.match(file_store):
        return _bucket(file_store)
    if not file_store.isprintable():
        _refuse(f"OW_FILE_STORE={file_store!r}", "it holds control characters")
    return LocalFileStore(Path(file_store).expanduser())


def _bucket(value: str) -> FileStore:
    try:
        url = urlsplit(value)
        options = parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
    except ValueError:
        _refuse("The value of OW_FILE_STORE", "it is not a URL")
    names = [name for name, _ in options]
    endpoint = dict(options).get("endpoint_url")
    # Whatever looks like a secret is not repeated: messages end up in logs.
    if "@" in url.netloc or (endpoint and "@" in endpoint) or not set(names) <= {"endpoint_url", "region"}:
        _refuse(
            "The value of OW_FILE_STORE",
            "it holds a user, a password or an unknown option. Credentials are never part of it: set "
            "`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or configure an AWS profile",
        )
    if reason := _reason_against(url, names, dict(options)):
        _refuse(f"OW_FILE_STORE={value!r}", reason)
    try:
        from openweights_prefect.files.s3 import S3FileStore  # imports boto3, which takes a while
    except ImportError as exc:
        raise ConfigurationError(
            f"OW_FILE_STORE={value!r} needs {exc.name}: pip install 'openweights-prefect[s3]'."
        ) from exc
    region = dict(options).get("region")
    return S3FileStore(url.netloc, url.path.strip("/"), endpoint_url=endpoint, region=region)


def _reason_against(url: SplitResult, names: list[str], options: dict[str, str]) -> str | None:
    prefix, endpoint = url.path.strip("/"), options.get("endpoint_url", "https://default")
    reason = None
    if url.scheme != "s3":
        reason = f"there is no file store for {url.scheme!r}"
    elif not _BUCKET.fullmatch(url.netloc) or ".." in url.netloc:
        reason = f"{url.netloc!r} cannot be the name of a bucket"
    elif url.fragment or len(set(names)) < len(names):
        reason = "it has a `#`, or an option twice"
    elif not re.match(r"https?://[^/?#\s]+", endpoint):
        reason = f"endpoint_url={endpoint!r} is not an address"
    elif not _REGION.fullmatch(options.get("region", "none")):
        reason = f"region={options['region']!r} is not a region"
    elif prefix:
        reason = _reason_against_prefix(prefix)
    return reason


def _reason_against_prefix(prefix: str) -> str | None:
    try:
        same = str(safe_relative_path(prefix)) == prefix
    except InvalidParameterError as exc:
        return str(exc)
    return None if same else f"the prefix {prefix!r} has empty or `.` parts"


def _refuse(subject: str, reason: str) -> NoReturn:
    raise ConfigurationError(
        f"{subject} cannot be used: {reason}. Set it to a folder or to {_FORM}, or leave it empty."
    )
