"""What can be configured in the simulator: a JSON file, over a timing profile."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.simulator.chaos import checked

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
    preempt_grace: float
    """From SIGTERM to SIGKILL of a preempted pod."""
    balance_check: float
    """Between two looks at the balances."""


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
        preempt_grace=0.2,
        balance_check=5,
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
        preempt_grace=0.5,
        balance_check=5,
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
        preempt_grace=5,
        balance_check=300,
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
    cuda: str = ""
    """The CUDA version that it needs of its host's driver; empty: any."""
    private: bool = False
    """A pull without a registry credential is `unauthorized`."""


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
    chaos: dict[str, float] = field(default_factory=dict)
    """Fault to its probability, see `chaos.py`."""
    clock: Literal["real", "manual"] = "real"
    """A manual clock moves by `POST /_sim/clock/advance` alone."""
    time_scale: float = 1.0
    """Simulated seconds in a real one."""
    placement: Literal["first", "random"] = "first"
    """Which of the hosts with room gets a pod: always the first gives the same bad machine again."""
    vcpu_per_gpu: int = 8
    ram_gb_per_gpu: int = 32
    registries: tuple[str, ...] = ()
    """Ids of the registry credentials that a create may name."""
    foreign_registries: tuple[str, ...] = ("reg_of_a_colleague",)
    """Credentials of somebody else; to delete one is a violation."""
    foreign_pods: bool = True
    """Put three pods of somebody else into the main account."""
    foreign_prefix: str = "ow-"
    """Names of the foreign pods begin like this, as a deployment of a colleague would name them."""
    foreign_policy: Literal["report", "deny"] = "report"
    """What happens to a change of a foreign pod beside its entry in the report."""
    log_limit_mb: float = 16.0
    """A container log that grows beyond this is moved to `container.log.1`."""
    background_rpm: int = 0
    """Requests a minute that colleagues take from the same quota."""
    graphql_per_minute: int = 1000
    """Choice: RunPod does not tell the limit of its GraphQL."""
    status_mode: Literal["measured", "documented"] = "measured"
    """Choice: measured is RUNNING from rental on; the documents tell of PROVISIONING and STARTING."""
    spec_level: Literal["newest", "aug2026"] = "newest"
    """Choice: whether the server knows `entrypoint` and `cmd`, which the documents have since September."""
    quirk_missing_count: bool = True
    """Measured once: a create without `gpu.count` finds no instances, in spite of the default of 1."""
    cost_when_exited: Literal["price", "zero"] = "price"
    """Choice: measured is that `cost` keeps the rate; the documents say 0."""
    bill_disks: bool = False
    """Choice: RunPod bills disks beside `cost`, 0.10 USD/GB/month. Off, so that the bill is price x time."""
    bill_from: Literal["rental", "container"] = "rental"
    """Choice: one report saw billing from the container's start only."""
    pull_failure: Literal["exit", "stuck"] = "exit"
    """Choice: both were seen: EXITED after some seconds, and RUNNING for ever."""
    start_no_gpu: Literal["error", "zero"] = "error"
    """Choice: a stopped pod whose cards were taken is refused, or starts with none."""
    wipe_on_autorestart: bool = False
    """Choice: whether the container disk is empty after the container has exited by itself."""
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
    for name in ("registries", "foreign_registries"):
        if name in values:
            values[name] = tuple(values[name])
    values["chaos"] = checked(values.get("chaos", {}))
    if "keys" in values:
        values["keys"] = {token: Key(**key) for token, key in values["keys"].items()}
    images = values.get("images", {})
    values["images"] = {glob: _image(image) for glob, image in images.items()}
    return SimulatorConfig(**values)


def _image(image: dict[str, Any]) -> Image:
    lists: dict[str, Any] = {name: tuple(image[name]) for name in ("entrypoint", "cmd") if name in image}
    return Image(**{**image, **lists})
