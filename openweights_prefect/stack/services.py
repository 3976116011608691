"""The three services beside PostgreSQL: the Prefect server, the simulated RunPod, the worker."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.settings import Settings
from openweights_prefect.stack import health
from openweights_prefect.stack.addresses import write_private
from openweights_prefect.stack.environment import QUIET_PREFECT, REFUSE_OUTSIDE
from openweights_prefect.stack.ports import HOST
from openweights_prefect.stack.service import HOME_VARIABLE, Folders, Service, ServiceProcess

WORKER_NAME = "local"
POD_IMAGES = "openweights/*"
_POD_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")


class Services(NamedTuple):
    """Each may need those before it, so they are stopped in the other order: pods report while they end."""

    prefect: Service
    simulator: Service
    worker: Service


def plan(
    settings: Settings,
    folders: Folders,
    *,
    prefect_database_url: str,
    api_key: str,
    simulator_profile: str = "fast",
) -> Services:
    """The services for these settings, whose addresses are complete."""
    return Services(
        prefect=_prefect(settings, folders, prefect_database_url),
        simulator=_simulator(settings, folders, simulator_profile),
        worker=_worker(settings, api_key),
    )


def prefect_api_url(port: int) -> str:
    """Address of the local Prefect API."""
    return f"http://{HOST}:{port}/api"


def runpod_api_url(port: int) -> str:
    """Base URL of the simulated RunPod's REST v2."""
    return f"http://{HOST}:{port}/v2"


def write_simulator_config(
    folders: Folders, api_key: str, common: Mapping[str, str], *, chaos: Mapping[str, float]
) -> None:
    """Tell the simulator who may call it, what a pod of our images runs, and what is to go wrong."""
    passed = {name: common[name] for name in _POD_PASSED if name in common}
    environment = {
        **passed,
        **QUIET_PREFECT,
        "OW_HOME": str(folders.home),
        HOME_VARIABLE: str(folders.home),
        "PYTHONUNBUFFERED": "1",
        "OW_GPU_CHECK": "inventory",  # Simulated cards compute nothing.
    }
    image = {"entrypoint": module_command("openweights_prefect.pod"), "env": environment}
    document = {
        "keys": {api_key: {"account": "main"}},
        "images": {POD_IMAGES: image},
        "rate_limits": {"minute": 600, "hour": 30_000, "day": 500_000},
        "chaos": dict(chaos),
    }
    write_private(folders.simulator_config, json.dumps(document, indent=2) + "\n")


def _simulator(settings: Settings, folders: Folders, profile: str) -> Service:
    url = runpod_api_url(settings.simulator_port)
    command = ("openweights_prefect.simulator", "--port", str(settings.simulator_port))
    places = ("--state-dir", str(folders.simulator), "--config", str(folders.simulator_config))
    return Service(
        name="simulator",
        title="simulated RunPod",
        argv=module_command(*command, *places, "--profile", profile),
        address=url,
        # Without the key, so that the question does not count against the rate limit of its account.
        healthy=lambda process: health.answers(f"{url}/pods", expected=401),
        start_seconds=30,
        stop_seconds=20,  # It ends its pods first.
    )


def _prefect(settings: Settings, folders: Folders, database_url: str) -> Service:
    port, api_url = settings.prefect_port, settings.prefect_api_url
    origins = ",".join(f"http://{host}:{port}" for host in (HOST, "localhost"))
    environment = {
        **REFUSE_OUTSIDE,
        "PREFECT_API_URL": api_url,
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database_url,
        # By default any web page that the user opens could start runs here.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # A job that waits for hardware is not late.
        "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "86400",
        "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "300",
    }
    return Service(
        name="prefect",
        title="Prefect server",
        argv=module_command("prefect", "server", "start", "--host", HOST, "--port", str(port)),
        address=f"http://{HOST}:{port}",
        healthy=lambda process: health.answers(f"{api_url}/health"),
        environment=environment,
        start_seconds=240,  # The first start creates Prefect's tables; a loaded machine takes its time.
    )


def _worker(settings: Settings, api_key: str) -> Service:
    pool = settings.work_pool

    def is_online(process: ServiceProcess) -> bool:
        workers = health.prefect_workers(settings)
        ours = [worker for worker in workers if worker.get("name") == WORKER_NAME]
        return any(health.is_online(worker, since=process.started_at) for worker in ours)

    return Service(
        name="worker",
        title="worker",
        argv=module_command(*worker_command(pool, name=WORKER_NAME)),
        address=f"work pool {pool}",
        healthy=is_online,
        environment={
            "PREFECT_API_URL": settings.prefect_api_url,
            "OW_DATABASE_URL": settings.database_url,
            "OW_RUNPOD_API_URL": settings.runpod_api_url,
            "RUNPOD_API_KEY": api_key,
        },
        start_seconds=120,
    )


def worker_command(pool: str, *, name: str | None) -> tuple[str, ...]:
    """Module and arguments of a Prefect worker for the pool; without a name Prefect makes one up."""
    names = () if name is None else ("--name", name)
    return ("prefect", "worker", "start", "--pool", pool, "--type", "runpod", *names)


def foreground_worker(
    settings: Settings, *, pool: str | None, name: str | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The command of a worker beside the stack's own, and the variables that it needs."""
    if not settings.prefect_api_url:
        raise ConfigurationError("No Prefect API is configured. Run `ow up`, or set `PREFECT_API_URL`.")
    key = settings.runpod_api_key or stored_api_key(settings)
    variables = {**QUIET_PREFECT, "PREFECT_API_URL": settings.prefect_api_url, "RUNPOD_API_KEY": key}
    return module_command(*worker_command(pool or settings.work_pool, name=name)), variables


def stored_api_key(settings: Settings) -> str:
    """The API key of the simulated RunPod if the settings point there, else nothing."""
    if settings.runpod_api_url != runpod_api_url(settings.simulator_port):
        return ""
    try:
        return Folders(settings.home).api_key.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def module_command(*arguments: str) -> tuple[str, ...]:
    """The command that runs a module; -P: a file of the user's cannot stand in for a library."""
    # By one of the interpreter's names, whichever `ow` was called with: another command is another service.
    python = Path(sys.executable).with_name("python")
    return (str(python) if python.exists() else sys.executable, "-P", "-m", *arguments)
