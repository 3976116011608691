"""What values of the blocks must look like. No message quotes one: it may be a secret, or hold one."""

from __future__ import annotations

import base64
import json
import re
import urllib.parse

from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.filesystems import LocalFileSystem
from pydantic import ConfigDict, HttpUrl

from openweights_prefect.errors import ConfigurationError

HIDDEN = ConfigDict(hide_input_in_errors=True)
"""Configuration of every block: by itself pydantic quotes what it refuses."""
# Prefect's form for block types shows a picture from the web, and these of its own are there.
SECRET_LOGO = Secret._logo_url
STORE_LOGO = HttpUrl(LocalFileSystem._logo_url)

RUNPOD_KEY = re.compile(r"rpa_[A-Za-z0-9_-]{8,}|[A-Z0-9]{40}")  # The second has been made until 2024.
HUGGING_FACE_TOKEN = re.compile(r"hf_[A-Za-z0-9_]{8,}")
API_TOKEN = re.compile(r"ow_[A-Za-z0-9_-]{8,}")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_KNOWN = {
    "rpa_": "an API key of RunPod",
    "hf_": "a token of Hugging Face",
    "ow_": "an API token of an organization",
    "owb_": "the one-time token of a pod",
    "owp_": "the session of a pod",
    "owi_": "an invitation",
    "sb_publishable_": "a publishable key of Supabase",
    "sb_secret_": "a secret key of Supabase",
    "eyJ": "a JWT",
}


def check_token(block: Block, field: str, variable: str, form: re.Pattern[str]) -> None:
    """Raise `ConfigurationError` unless the secret field has the form, saying what it looks like instead."""
    value = getattr(block, field).get_secret_value()
    if not form.fullmatch(value):
        begins = form.pattern.partition("[")[0]
        raise _wrong(
            block,
            field,
            variable,
            f"is not {_KNOWN[begins]} (those start with {begins!r}): it {_seems(value)}",
        )


def check_publishable(block: Block, field: str, variable: str) -> None:
    """Raise `ConfigurationError` for a key that must not leave a server, or that is none."""
    value = getattr(block, field)
    if value.startswith("sb_secret_") or _jwt_role(value) == "service_role":
        raise _wrong(
            block,
            field,
            variable,
            "is a secret key, which opens every organization. Make a new one in Supabase, as this one may be "
            "known now, and use the publishable key",
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]{8,}", value) or value.startswith(("ow_", "hf_", "rpa_")):
        raise _wrong(block, field, variable, f"is not a publishable key: it {_seems(value)}")


def checked_url(block: Block, field: str, variable: str) -> str:
    """The address without a slash at its end; raises `ConfigurationError`."""
    value: str = getattr(block, field)
    try:
        parts = urllib.parse.urlsplit(value)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or re.search(r"\s", value):
        raise _wrong(block, field, variable, "is not an address like `https://...`")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise _wrong(
            block, field, variable, "holds more than an address: leave out user, password, `?` and `#`"
        )
    return value.rstrip("/")


def check_bucket(block: Block, field: str, variable: str) -> None:
    """Raise `ConfigurationError` unless the field can name a bucket."""
    if not _BUCKET.fullmatch(getattr(block, field)):
        raise _wrong(
            block, field, variable, "cannot name a bucket (lowercase letters, digits, `.`, `_` and `-`)"
        )


def _wrong(block: Block, field: str, variable: str, what: str) -> ConfigurationError:
    kind = type(block).__name__
    return ConfigurationError(
        f"`{field}` of {kind} {what}. Give another one to `{kind}({field}=...)`, or set {variable} and run "
        "`ow blocks apply` to save it."
    )


def _seems(value: str) -> str:
    if not value.strip():
        return "is empty"
    if value != value.strip() or re.search(r"\s", value):
        return "has blanks or line breaks"
    kind = next((kind for prefix, kind in _KNOWN.items() if value.startswith(prefix)), None)
    if kind is None:
        return "is something else"
    return f"looks like {kind}, cut short or damaged"


def _jwt_role(value: str) -> object:
    """The role in a legacy key of Supabase, which is a JWT; None for anything else."""
    try:
        payload = value.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, RecursionError):
        return None
    return claims.get("role") if isinstance(claims, dict) else None
