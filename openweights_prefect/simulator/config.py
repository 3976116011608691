"""What can be configured in the simulator: a JSON file, over a timing profile."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openweights_prefect.errors import ConfigurationError

MAIN_KEY = "rpa_sim_main"
Seconds = tuple[float, float]
"""A duration, drawn between two bounds."""


@dataclass(frozen=True)
class Timings:
    """How long each step of a pod's life takes."""

    allocate: Seconds
    """From rental to a machine."""
    pull_cold: Seconds
    pull_warm: Seconds
    """Pull of an image that the host already has."""
    container_start: Seconds
    pull_failure: Seconds
    """From a failed pull to EXITED."""
    visibility_delay: Seconds
    """How long a new pod is missing from reads."""
    restart_backoff: Seconds
    """First and longest wait before a container that exited starts again."""
    stop_grace: float
    """From SIGTERM to SIGKILL."""
    terminated_linger: float
    """How long a pod stays listed as TERMINATED."""


PROFILES = {
    "instant": Timings(
        allocate=(0, 0),
        pull_cold=(0, 0),
        pull_warm=(0, 0),
        container_start=(0, 0),
        pull_failure=(0, 0),
        visibility_delay=(0, 0),
        restart_backoff=(0.05, 0.05),
        stop_grace=1,
        terminated_linger=0,
    ),
    "fast": Timings(
        allocate=(0.05, 0.05),
        pull_cold=(0.2, 0.2),
        pull_warm=(0.05, 0.05),
        container_start=(0.05, 0.05),
        pull_failure=(0.1, 0.1),
        visibility_delay=(0, 0),
        restart_backoff=(0.1, 1),
        stop_grace=1,
        terminated_linger=0.5,
    ),
    "realistic": Timings(
        allocate=(15, 80),
        pull_cold=(60, 600),
        pull_warm=(10, 10),
        container_start=(5, 5),
        pull_failure=(6, 6),
        visibility_delay=(0, 3),
        restart_backoff=(0.1, 60),
        stop_grace=10,
        terminated_linger=120,
    ),
}


@dataclass(frozen=True)
class Key:
    """What an API key may do."""

    account: str
    scope: Literal["full", "read", "pod"] = "full"


@dataclass(frozen=True)
class Image:
    """What an image runs. The environment of a container starts from nothing: put all it needs here."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SimulatorConfig:
    """The simulator's settings; the names are the keys of the JSON file."""

    timings: Timings = PROFILES["fast"]
    keys: dict[str, Key] = field(
        default_factory=lambda: {
            MAIN_KEY: Key("main"),
            "rpa_sim_read": Key("main", "read"),
            "rpa_sim_other": Key("other"),
        }
    )
    images: dict[str, Image] = field(default_factory=dict)
    """Image name, or a glob of it, to what it runs; the first that matches counts."""
    rate_limits: dict[str, int] = field(default_factory=lambda: {"minute": 60, "hour": 3000, "day": 50000})
    """Requests of one account in each fixed window; a window that is left out has no limit."""
    balance: float = 1000.0
    spend_limit_per_hour: float = 80.0
    page_size: int = 0
    """Pods in one page of the list; 0 means all."""
    foreign_pods: bool = True
    """Put three pods of somebody else into the main account."""
    foreign_prefix: str = "ow-"
    """Names of the foreign pods begin like this, as a deployment of a colleague would name them."""
    log_limit_mb: float = 16.0
    """A container log that grows beyond this is moved to `container.log.1`."""
    control_token: str = ""
    """Token of `/_sim`; empty means the one in the state folder's file `control_token`."""


def load_config(path: Path | None = None, *, profile: str = "fast") -> SimulatorConfig:
    """Read the JSON file over the profile's timings; raises `ConfigurationError` naming a wrong key."""
    timings = PROFILES[profile]
    if path is None:
        return SimulatorConfig(timings=timings)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return _config(document, timings)
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise ConfigurationError(f"Cannot use the simulator's configuration {str(path)!r}: {exc}") from exc


def _config(document: dict[str, Any], timings: Timings) -> SimulatorConfig:
    values = dict(document)
    overrides: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("timings", {}).items()
    }
    values["timings"] = dataclasses.replace(timings, **overrides)
    if "keys" in values:
        values["keys"] = {token: Key(**key) for token, key in values["keys"].items()}
    images = values.get("images", {})
    values["images"] = {glob: _image(image) for glob, image in images.items()}
    return SimulatorConfig(**values)


def _image(image: dict[str, Any]) -> Image:
    lists: dict[str, Any] = {name: tuple(image[name]) for name in ("entrypoint", "cmd") if name in image}
    return Image(**{**image, **lists})
