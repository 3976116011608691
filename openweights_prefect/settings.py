"""The settings: read once from the environment, from where one is signed in, and from the local stack's file.

Precedence: environment variable, then `$OW_HOME/credentials.json` (written by `ow login`), then
`$OW_HOME/stack.json` (written by `ow up`), then the default. No other module reads environment variables for
configuration.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openweights_prefect.errors import ConfigurationError

LOCAL_ORGANIZATION_ID = "00000000-0000-0000-0000-000000000001"
STACK_VARIABLE = "OW_STACK_HOME"
"""In the environment of every process of a local stack: it serves that stack, whoever is signed in here."""

Source = Literal["environment", "login", "stack", "default"]

_OF_THE_LOGIN = ("supabase_url", "supabase_key", "api_key", "organization_id")
_OF_THE_STACK_ALONE = ("database_url", "prefect_api_url", "runpod_api_url", "organization_id", "file_store")


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
    supabase_url: str = _setting(
        "SUPABASE_URL", "", "Address of the Supabase project that holds the ledger; empty means PostgreSQL."
    )
    supabase_key: str = _setting(
        "SUPABASE_ANON_KEY", "", "The project's publishable key (once called anon key); it is public."
    )
    file_store: str = _setting(
        "OW_FILE_STORE",
        "",
        "Folder or `s3://bucket/prefix` of the files; empty: the Supabase project, else `$OW_HOME/files`.",
    )
    prefect_api_url: str = _setting("PREFECT_API_URL", "", "Address of the Prefect API.")
    prefect_api_key: str = _setting("PREFECT_API_KEY", "", "Key of a Prefect Cloud account.", secret=True)
    prefect_auth: str = _setting(
        "PREFECT_API_AUTH_STRING", "", "`user:password` of a Prefect server that demands it.", secret=True
    )
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
    warm_price_factor: float = _setting(
        "OW_WARM_PRICE_FACTOR",
        2.0,
        "A warm pod is taken when it costs at most so many times the cheapest offer that could be bought.",
    )
    min_cuda: str = _setting(
        "OW_MIN_CUDA", "12.8", "Lowest CUDA version of a host's driver for jobs that name none."
    )
    max_workers: int = _setting("OW_MAX_WORKERS", 8, "Most pods alive at once in the organization.")
    pod_idle_seconds: int = _setting("OW_POD_IDLE_SECONDS", 300, "A pod without work ends after this long.")
    pod_ttl_hours: float = _setting("OW_POD_TTL_HOURS", 24.0, "A pod ends at the latest after this long.")
    lease_seconds: int = _setting(
        "OW_LEASE_SECONDS", 120, "A pod that is silent for this long has lost its run."
    )
    heartbeat_seconds: float = _setting("OW_HEARTBEAT_SECONDS", 5.0, "How often a pod renews its lease.")
    first_log_seconds: int = _setting(
        "OW_POD_FIRST_LOG_SECONDS", 180, "A pod whose machine has logged nothing after this long is replaced."
    )
    boot_seconds: int = _setting(
        "OW_BOOT_SECONDS", 1500, "A pod that has not reported after this long is replaced."
    )
    cancel_grace_seconds: float = _setting(
        "OW_CANCEL_GRACE_SECONDS", 3.0, "From SIGTERM to SIGKILL for the processes of a canceled run."
    )
    checkpoint_grace_seconds: float = _setting(
        "OW_CHECKPOINT_GRACE_SECONDS", 60.0, "The same for a run whose pod reached its deadline."
    )
    gpu_check: str = _setting(
        "OW_GPU_CHECK",
        "full",
        "What a pod checks before it takes work: `full`, `inventory` (no computation) or `off`.",
    )
    event_retention_days: int = _setting(
        "OW_EVENT_RETENTION_DAYS", 0, "Days to keep events of ended runs; 0 keeps them for ever."
    )
    prefect_proxy_url: str = _setting(
        "OW_PREFECT_PROXY_URL", "", "Address that pods use as their Prefect API; empty: the API itself."
    )
    prefect_port: int = _setting("OW_PREFECT_PORT", 4200, "Port of the local Prefect server.")
    simulator_port: int = _setting("OW_SIMULATOR_PORT", 4280, "Port of the simulated RunPod.")

    @classmethod
    def load(
        cls, environment: Mapping[str, str] | None = None, *, given: Mapping[str, str | None] | None = None
    ) -> Settings:
        """Read the settings; what is `given`, by name, counts like its variable, and before it.

        Raises `ConfigurationError` naming the variable with a bad value.
        """
        env = os.environ if environment is None else environment
        layers = _layers(env, given)
        values: dict[str, Any] = {"home": _home(env)}
        for spec in dataclasses.fields(cls):
            raw = next((layer[spec.name] for layer in layers.values() if spec.name in layer), None)
            if spec.name != "home" and raw is not None:
                values[spec.name] = _parse(spec, raw)
        return cls(**values)

    def with_given(self, given: Mapping[str, str | None]) -> Settings:
        """These settings with the texts that are given by name."""
        texts: dict[str, Any] = {name: value for name, value in given.items() if value}
        return dataclasses.replace(self, **texts)

    @classmethod
    def source_of(cls, name: str, environment: Mapping[str, str] | None = None) -> Source:
        """Where `load()` takes the setting `name` from."""
        layers = _layers(os.environ if environment is None else environment)
        return next((source for source, layer in layers.items() if name in layer), "default")

    @classmethod
    def origin_of(cls, name: str, environment: Mapping[str, str] | None = None) -> str:
        """The same for people: the variable, or the command that wrote it down."""
        variable: str = next(f.metadata["variable"] for f in dataclasses.fields(cls) if f.name == name)
        texts = {"environment": variable, "login": "`ow login`", "stack": "`ow up`", "default": "the default"}
        return texts[cls.source_of(name, environment)]

    @property
    def files_folder(self) -> Path:
        """Folder of the local file store."""
        return Path(self.file_store).expanduser() if self.file_store else self.home / "files"


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("OW_HOME") or Settings.home).expanduser().absolute()


def _layers(
    env: Mapping[str, str], given: Mapping[str, str | None] | None = None
) -> dict[Source, dict[str, Any]]:
    """What each source says, without empty values; the first that names a setting counts."""
    home = _home(env)
    environment: dict[str, str] = {}
    for spec in dataclasses.fields(Settings):
        if value := (given or {}).get(spec.name) or env.get(spec.metadata["variable"]):
            environment[spec.name] = value
    login = {}
    if not env.get(STACK_VARIABLE):
        login = _applicable(_read_file(home / "credentials.json", written_by="ow login"), environment)
    stack = _read_file(home / "stack.json", written_by="ow up")
    if "supabase_url" in environment or "supabase_url" in login:
        stack = {name: value for name, value in stack.items() if name not in _OF_THE_STACK_ALONE}
    if "api_key" in environment:
        stack.pop("organization_id", None)
    return {"environment": environment, "login": login, "stack": stack}


def _applicable(login: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """What a login says, unless the environment names another ledger: a token is never shown to that one.

    A token of the environment decides for itself which organization it acts for.
    """
    url = login.get("supabase_url")
    named = environment.get("supabase_url", "").rstrip("/")
    if named != url if named else "database_url" in environment:
        return {}
    names = _OF_THE_LOGIN[:2] if "api_key" in environment else _OF_THE_LOGIN
    return {name: login[name] for name in names if name in login}


def _parse(spec: dataclasses.Field[Any], raw: Any) -> Any:
    kind: type[Any] = type(spec.default)
    try:
        return kind(raw)
    except ValueError as exc:
        variable = spec.metadata["variable"]
        raise ConfigurationError(
            f"{variable}={raw!r} is not a valid {kind.__name__}: {spec.metadata['description']}"
        ) from exc


def _read_file(path: Path, *, written_by: str) -> dict[str, Any]:
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
            f"{str(path)!r} is damaged ({exc}). Delete it and run `{written_by}`, which writes it again."
        ) from exc
    return {name: value for name, value in data.items() if value != ""} if isinstance(data, dict) else {}
