"""The settings: read once from the environment and from the local stack's address file.

Precedence: environment variable, then `$OW_HOME/stack.json` (written by `ow up`), then the default.
No other module reads environment variables for configuration.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openweights_prefect.errors import ConfigurationError

LOCAL_ORGANIZATION_ID = "00000000-0000-0000-0000-000000000001"


def _setting(variable: str, default: Any, description: str, *, secret: bool = False) -> Any:
    metadata = {"variable": variable, "description": description, "secret": secret}
    return field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything that can be configured; `Settings.load()` reads it."""

    home: Path = _setting(
        "OW_HOME", Path("~/.openweights"), "Folder of the local stack: data, logs, addresses."
    )
    database_url: str = _setting(
        "OW_DATABASE_URL",
        "",
        "PostgreSQL URL of the ledger; empty means the embedded server of `ow up`.",
        secret=True,
    )
    api_key: str = _setting(
        "OPENWEIGHTS_API_KEY", "", "Token of an organization; empty means the local stack.", secret=True
    )
    organization_id: str = _setting("OW_ORGANIZATION_ID", LOCAL_ORGANIZATION_ID, "The tenant to act for.")
    file_store: str = _setting("OW_FILE_STORE", "", "Folder of the file store; empty means `$OW_HOME/files`.")
    prefect_api_url: str = _setting("PREFECT_API_URL", "", "Address of the Prefect API.")
    work_pool: str = _setting(
        "OW_WORK_POOL", "openweights", "Prefect work pool that the flows are deployed to."
    )
    runpod_api_url: str = _setting(
        "OW_RUNPOD_API_URL", "https://api.runpod.io/v2", "Base URL of RunPod's REST v2."
    )
    runpod_api_key: str = _setting(
        "RUNPOD_API_KEY", "", "RunPod API key of the account that pays.", secret=True
    )
    image: str = _setting("OW_IMAGE", "openweights/fine-tuning:latest", "Image of jobs that name none.")
    job_python: str = _setting("OW_JOB_PYTHON", "", "Interpreter of the job environment (torch, TRL).")
    max_workers: int = _setting("OW_MAX_WORKERS", 8, "Most pods alive at once in the organization.")
    pod_idle_seconds: int = _setting("OW_POD_IDLE_SECONDS", 300, "A pod without work ends after this long.")
    pod_ttl_hours: float = _setting("OW_POD_TTL_HOURS", 24.0, "A pod ends at the latest after this long.")
    lease_seconds: int = _setting(
        "OW_LEASE_SECONDS", 120, "A pod that is silent for this long has lost its run."
    )
    heartbeat_seconds: float = _setting("OW_HEARTBEAT_SECONDS", 5.0, "How often a pod renews its lease.")
    boot_seconds: int = _setting(
        "OW_BOOT_SECONDS", 1500, "A pod that has not reported after this long is replaced."
    )
    prefect_port: int = _setting("OW_PREFECT_PORT", 4200, "Port of the local Prefect server.")
    simulator_port: int = _setting("OW_SIMULATOR_PORT", 4280, "Port of the simulated RunPod.")

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; raises `ConfigurationError` naming the variable with a bad value."""
        env = os.environ if environment is None else environment
        home = Path(env.get("OW_HOME") or cls.home).expanduser().absolute()
        stack = _read_stack_file(home / "stack.json")
        values: dict[str, Any] = {"home": home}
        for spec in dataclasses.fields(cls):
            raw = env.get(spec.metadata["variable"]) or stack.get(spec.name)
            if spec.name != "home" and raw not in (None, ""):
                values[spec.name] = _parse(spec, raw)
        return cls(**values)

    @property
    def files_folder(self) -> Path:
        """Folder of the local file store."""
        return Path(self.file_store).expanduser() if self.file_store else self.home / "files"


def _parse(spec: dataclasses.Field[Any], raw: Any) -> Any:
    kind: type[Any] = type(spec.default)
    try:
        return kind(raw)
    except ValueError as exc:
        variable = spec.metadata["variable"]
        raise ConfigurationError(
            f"{variable}={raw!r} is not a valid {kind.__name__}: {spec.metadata['description']}"
        ) from exc


def _read_stack_file(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise ConfigurationError(
            f"Cannot read {str(path)!r} ({exc.strerror}). "
            "Set `OW_HOME` to a folder that you can read and write."
        ) from exc
    except ValueError as exc:
        raise ConfigurationError(
            f"{str(path)!r} is damaged ({exc}). Delete it and run `ow up`, which writes it again."
        ) from exc
    return data if isinstance(data, dict) else {}
