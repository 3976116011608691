"""Starts the local stack, or what is missing of it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from openweights_prefect.errors import ConfigurationError, StackError
from openweights_prefect.ledger import embedded
from openweights_prefect.settings import Settings
from openweights_prefect.stack import databases, health, ports, processes, services
from openweights_prefect.stack.addresses import (
    ensure_api_key,
    make_home,
    stack_environment,
    write_addresses,
    write_private,
)
from openweights_prefect.stack.databases import Databases
from openweights_prefect.stack.environment import common_environment
from openweights_prefect.stack.locking import exclusive
from openweights_prefect.stack.registration import Registration
from openweights_prefect.stack.service import Folders, Service, ServiceProcess
from openweights_prefect.stack.services import Services
from openweights_prefect.stack.state import ServiceStatus, status

LEAST_FREE_BYTES = 1 << 30
_ADOPT_SECONDS = 10.0  # A busy machine may keep a healthy service from answering for a while.

Progress = Callable[[str], None]


def up(
    *,
    environment: Mapping[str, str],
    job_python: str | None = None,
    chaos: Mapping[str, float] | None = None,
    profile: str = "fast",
    progress: Progress,
) -> list[ServiceStatus]:
    """Start what is not running and healthy, and return the state of all.

    Idempotent; two at once give one stack. When a step fails, what this call started is stopped again and the
    error says why. Services get an allow-list of `environment`, the user's. `job_python` is remembered.
    `chaos` and `profile` are the simulated RunPod's until the next call.
    """
    environment = stack_environment(environment)
    settings = Settings.load(environment)
    folders = Folders(settings.home)
    _check_disk(folders)
    _make_folders(folders, settings)
    with exclusive(folders, progress), contextlib.ExitStack() as undo:
        settings = Settings.load(environment)  # Another `ow up` may have chosen meanwhile.
        interpreter = _find_interpreter(job_python or settings.job_python)
        settings = dataclasses.replace(settings, job_python=interpreter)
        start = _Start(folders, environment, progress, undo, chaos=chaos or {}, profile=profile)
        settings = start.run(settings)
        undo.pop_all()
    return status(settings)


class _Start:
    """One call of `up()`; every step puts what undoes it on the stack `undo`."""

    def __init__(
        self,
        folders: Folders,
        environment: Mapping[str, str],
        progress: Progress,
        undo: contextlib.ExitStack,
        *,
        chaos: Mapping[str, float],
        profile: str,
    ) -> None:
        self._folders = folders
        self._environment = environment
        self._common = common_environment(folders, environment)
        self._progress = progress
        self._undo = undo
        self._chaos = chaos
        self._profile = profile
        self._started: set[str] = set()

    def run(self, settings: Settings) -> Settings:
        folders = self._folders
        where = databases.locate(folders, own=self._environment.get("OW_DATABASE_URL", ""))
        key = ensure_api_key(folders)

        def plan(chosen: Settings) -> Services:
            return services.plan(
                chosen,
                folders,
                prefect_database_url=where.prefect_url,
                api_key=key,
                simulator_profile=self._profile,
            )

        settings = dataclasses.replace(settings, database_url=where.ledger_url)
        settings = self._choose_ports(settings, plan)
        stack = plan(settings)
        services.write_simulator_config(folders, key, self._common, chaos=self._chaos)
        self._write_addresses(settings)  # Pods that come back with the simulator read them at once.
        # In this order because each waits for another part: what is slow boots while the next is prepared.
        simulator = self._begin(stack.simulator)
        self._start_postgres(where)
        databases.prepare_prefect(where)
        prefect = self._begin(stack.prefect)
        is_new = stack.prefect.name in self._started
        registration = self._begin_registration(settings) if is_new else None
        applied = databases.prepare_ledger(where, settings)
        self._progress(f"Ledger ready ({len(applied)} migrations applied)" if applied else "Ledger ready")
        self._finish(stack.simulator, simulator)
        self._set_chaos(stack.simulator, settings)
        self._finish(stack.prefect, prefect)
        self._start_worker(stack.worker, settings, registration)
        return settings

    def _choose_ports(self, settings: Settings, plan: Callable[[Settings], Services]) -> Settings:
        """Keep the ports of what runs as it should; else take free ones."""
        settings = _with_addresses(settings)
        service = plan(settings).simulator
        port = self._choose_port(service, settings.simulator_port, "OW_SIMULATOR_PORT", taken=frozenset())
        settings = _with_addresses(dataclasses.replace(settings, simulator_port=port))
        service = plan(settings).prefect
        port = self._choose_port(service, settings.prefect_port, "OW_PREFECT_PORT", taken=frozenset({port}))
        return _with_addresses(dataclasses.replace(settings, prefect_port=port))

    def _choose_port(self, service: Service, wanted: int, variable: str, *, taken: frozenset[int]) -> int:
        process = processes.find(service, self._folders)
        if process is not None and process.digest == service.digest:
            return wanted
        if process is not None:
            self._progress(f"The {service.title} runs with other settings; stopping it")
            processes.stop(service, self._folders)
        return ports.choose(wanted, variable=variable, required=variable in self._environment, taken=taken)

    def _begin(self, service: Service) -> ServiceProcess:
        """Launch the service unless it is running as planned; does not wait for it."""
        process = processes.find(service, self._folders)
        if process is not None and process.digest == service.digest and _recovers(service, process):
            return process
        if process is not None:
            self._progress(f"The {service.title} has other settings or does not answer; starting it again")
            processes.stop(service, self._folders)
        self._undo.callback(processes.stop, service, self._folders)
        self._started.add(service.name)
        return processes.launch(service, self._folders, self._common)

    def _finish(self, service: Service, process: ServiceProcess) -> None:
        if service.name not in self._started:
            self._progress(f"{_sentence(service.title)} already running ({service.address})")
            return
        processes.await_healthy(service, process, self._folders)
        self._progress(f"{_sentence(service.title)} started ({service.address})")

    def _set_chaos(self, simulator: Service, settings: Settings) -> None:
        """One that was running has read its configuration long ago; told now, it need not start again."""
        if simulator.name not in self._started:
            url = f"http://{ports.HOST}:{settings.simulator_port}/_sim/chaos"
            token = (self._folders.simulator / "control_token").read_text(encoding="utf-8")
            answer = health.ask(url, headers={"X-Sim-Token": token}, payload=dict(self._chaos))
            if answer is None or answer.status != 204:
                raise StackError(
                    f"The simulated RunPod at {url!r} did not take the chaos ({answer}). "
                    "Call `ow down`, then `ow up` again."
                )
        if self._chaos:
            shares = ", ".join(f"{name}={share:g}" for name, share in self._chaos.items())
            self._progress(f"Chaos in the simulated RunPod: {shares}")

    def _start_postgres(self, where: Databases) -> None:
        if not where.is_embedded:
            databases.await_server(where)
            self._progress("PostgreSQL of `OW_DATABASE_URL` reached")
            return
        running = embedded.is_running(self._folders.postgres)
        if not running:
            self._undo.callback(embedded.stop, self._folders.postgres)
        embedded.start(self._folders.postgres)
        self._progress("PostgreSQL already running" if running else "PostgreSQL started")

    def _write_addresses(self, settings: Settings) -> None:
        path = self._folders.addresses
        before = path.read_text(encoding="utf-8") if path.exists() else None
        if before is None:
            self._undo.callback(path.unlink, missing_ok=True)
        else:
            self._undo.callback(write_private, path, before)
        write_addresses(self._folders, settings)

    def _begin_registration(self, settings: Settings) -> Registration:
        registration = Registration(self._folders, settings, self._common)
        self._undo.callback(registration.kill)
        return registration

    def _start_worker(self, worker: Service, settings: Settings, registration: Registration | None) -> None:
        has_pool = health.answers(f"{settings.prefect_api_url}/work_pools/{settings.work_pool}")
        # Without a pool the worker would create it too, and one of the two would fail.
        process = self._begin(worker) if has_pool else None
        if registration is None and not has_pool:
            registration = self._begin_registration(settings)
        if registration is not None:
            registration.finish()
            self._progress("Deployments registered")
        self._finish(worker, process or self._begin(worker))


def _recovers(service: Service, process: ServiceProcess) -> bool:
    deadline = time.monotonic() + _ADOPT_SECONDS
    while not service.healthy(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _with_addresses(settings: Settings) -> Settings:
    return dataclasses.replace(
        settings,
        prefect_api_url=services.prefect_api_url(settings.prefect_port),
        runpod_api_url=services.runpod_api_url(settings.simulator_port),
    )


def _find_interpreter(job_python: str) -> str:
    """The absolute path of the job interpreter; links are kept, because a virtual environment is one."""
    if not job_python:
        return ""
    found = shutil.which(str(Path(job_python).expanduser()))
    if found is None:
        raise ConfigurationError(
            f"The job interpreter {job_python!r} is not a program. Set `--job-python` or `OW_JOB_PYTHON` to "
            "the Python of the environment that has torch and TRL."
        )
    return str(Path(found).absolute())


def _make_folders(folders: Folders, settings: Settings) -> None:
    try:
        make_home(folders.home)
        for folder in (folders.logs, folders.run, folders.prefect, folders.simulator):
            folder.mkdir(mode=0o700, exist_ok=True)
        if "://" not in settings.file_store:
            settings.files_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StackError(
            f"The home of the stack {str(folders.home)!r} cannot be used: {exc}. "
            "Set `OW_HOME` to a folder that you can write to."
        ) from exc


def _check_disk(folders: Folders) -> None:
    existing = next(path for path in (folders.home, *folders.home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < LEAST_FREE_BYTES:
        raise StackError(
            f"Only {free / 2**30:.2f} GiB are free on the disk of {str(folders.home)!r}; the stack needs "
            f"{LEAST_FREE_BYTES / 2**30:.0f} GiB. Make room, or set `OW_HOME` to a folder on another disk."
        )


def _sentence(title: str) -> str:
    return title[0].upper() + title[1:]
