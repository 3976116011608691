"""What the stack writes down in its home: addresses and choices for `Settings.load()`, and the API key."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from openweights_prefect.settings import Settings
from openweights_prefect.stack.service import HOME_VARIABLE, Folders

_ADDRESSES = ("database_url", "prefect_api_url", "runpod_api_url")
_CHOICES = ("prefect_port", "simulator_port", "job_python", "organization_id", "file_store")
STORED = (*_ADDRESSES, *_CHOICES)
"""The settings in `stack.json`."""


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read; a reader sees the old text or the new, never half of it."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600, exist_ok=False)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_addresses(folders: Folders, settings: Settings) -> None:
    """Tell every process of this home where the running stack is, and what was chosen for it."""
    values = {name: vars(settings)[name] for name in STORED}
    _write(folders, {name: value for name, value in values.items() if value != ""})


def forget_addresses(folders: Folders) -> None:
    """The stack is stopped: keep what was chosen, so that the next start chooses the same."""
    try:
        values = json.loads(folders.addresses.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    _write(folders, {name: values[name] for name in _CHOICES if name in values})


def make_home(home: Path) -> None:
    """Make the folder of the installation; one that is there is left as it is."""
    if home.exists():
        return
    home.parent.mkdir(parents=True, exist_ok=True)
    home.mkdir(exist_ok=True)
    # The embedded server of root runs as another account, which must walk through, but sees nothing.
    home.chmod(0o711 if os.geteuid() == 0 else 0o700)


def choose_organization(folders: Folders, organization_id: str) -> None:
    """Act for another organization from the next start of the stack on; commands and scripts at once."""
    try:
        values = json.loads(folders.addresses.read_text(encoding="utf-8"))
    except FileNotFoundError:
        values = {}
    make_home(folders.home)
    _write(folders, {**values, "organization_id": organization_id})


def running_settings(environment: Mapping[str, str]) -> Settings:
    """The settings of the stack that runs: an address in `stack.json` counts, not one in the environment."""
    variables = {f.metadata["variable"] for f in dataclasses.fields(Settings) if f.name in STORED}
    own = stack_environment(environment)
    return Settings.load({name: value for name, value in own.items() if name not in variables})


def stack_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment as the stack reads it: it is its own installation, whoever is signed in elsewhere."""
    elsewhere = {
        f.metadata["variable"]
        for f in dataclasses.fields(Settings)
        if f.name in ("supabase_url", "supabase_key", "api_key")
    }
    own = {name: value for name, value in environment.items() if name not in elsewhere}
    return {**own, HOME_VARIABLE: environment.get("OW_HOME") or "default"}


def ensure_api_key(folders: Folders) -> str:
    """The API key of this home's simulated RunPod, made at the first call."""
    try:
        return folders.api_key.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        key = f"rpa_local_{secrets.token_urlsafe(32)}"
        write_private(folders.api_key, key + "\n")
        return key


def _write(folders: Folders, values: Mapping[str, object]) -> None:
    write_private(folders.addresses, json.dumps(values, indent=2) + "\n")
