"""What a service of the local stack is: a command, its environment, and how to see that it works."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openweights_prefect.settings import STACK_VARIABLE

HOME_VARIABLE = STACK_VARIABLE
"""Marks every process of a stack with its home; inherited by what the process starts."""
SERVICE_VARIABLE = "OW_STACK_SERVICE"
"""Marks the processes of one service; a pod does not carry it."""


@dataclass(frozen=True)
class Folders:
    """Where the stack of one home keeps its things."""

    home: Path

    @property
    def lock(self) -> Path:
        """Held while the stack is being started or stopped."""
        return self.home / "stack.lock"

    @property
    def addresses(self) -> Path:
        """What `Settings.load()` reads."""
        return self.home / "stack.json"

    @property
    def api_key(self) -> Path:
        """The API key of the simulated RunPod."""
        return self.home / "runpod_api_key"

    @property
    def logs(self) -> Path:
        """One log a service."""
        return self.home / "logs"

    @property
    def run(self) -> Path:
        """The records of running services; also their working directory."""
        return self.home / "run"

    @property
    def postgres(self) -> Path:
        """The embedded PostgreSQL server."""
        return self.home / "postgres"

    @property
    def prefect(self) -> Path:
        """`PREFECT_HOME` of the stack."""
        return self.home / "prefect"

    @property
    def simulator_config(self) -> Path:
        """Who may call the simulated RunPod, and what its pods run."""
        return self.home / "simulator.json"

    @property
    def simulator(self) -> Path:
        """State of the simulated RunPod."""
        return self.home / "simulator"


@dataclass(frozen=True)
class ServiceProcess:
    """The process that runs a service; a number that was given to another process is not it."""

    pid: int
    started_at: float
    """Epoch seconds, as the operating system gives them."""
    digest: str
    """What it was started with, see `Service.digest`."""


@dataclass(frozen=True)
class Service:
    """One process of the stack, to be started detached."""

    name: str
    title: str
    argv: tuple[str, ...]
    address: str
    healthy: Callable[[ServiceProcess], bool]
    """Whether the process does its work; quick, and asked often."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What this service needs beside the variables that every service gets."""
    start_seconds: float = 90
    stop_seconds: float = 10
    """From SIGTERM to SIGKILL."""

    @property
    def digest(self) -> str:
        """Names the command and its environment: a running service with another one is started anew."""
        text = json.dumps([self.argv, sorted(self.environment.items())])
        return hashlib.sha256(text.encode()).hexdigest()

    def log(self, folders: Folders) -> Path:
        """Where the output goes."""
        return folders.logs / f"{self.name}.log"

    def record(self, folders: Folders) -> Path:
        """Where the running process is noted."""
        return folders.run / f"{self.name}.json"
