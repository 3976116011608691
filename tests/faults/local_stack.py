"""A real local stack with fast settings, and the tools to break it and to look at what is left."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import fault_jobs
import httpx
import psutil
import psycopg
from prefect.client.orchestration import SyncPrefectClient

from openweights_prefect import OpenWeights
from openweights_prefect.ledger import embedded, embedded_layout
from openweights_prefect.ledger.postmaster import find_postmaster
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.resources.job import Job
from openweights_prefect.settings import Settings
from openweights_prefect.simulator.processes import INSTANCE_VARIABLE
from openweights_prefect.stack.down import down
from openweights_prefect.stack.service import HOME_VARIABLE
from openweights_prefect.stack.state import status
from openweights_prefect.stack.up import up

IDLE_SECONDS = 25
AGREEMENT_SECONDS = 30
LEASE_SECONDS = 12

T = TypeVar("T")
_STATES = {"completed": "COMPLETED", "failed": "FAILED", "canceled": "CANCELLED", "lost": "CRASHED"}


def eventually(look: Callable[[], T], seconds: float, what: str) -> T:
    """The first true value that `look` gives; fails naming `what` and the last value after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}; last seen: {seen!r}"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """One local stack. Kills only processes that belong to it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
            "OW_HOME": str(home),
            "OW_PREFECT_PORT": str(_free_port()),
            "OW_SIMULATOR_PORT": str(_free_port()),
            "OW_LEASE_SECONDS": str(LEASE_SECONDS),
            "OW_HEARTBEAT_SECONDS": "1",
            "OW_POD_IDLE_SECONDS": str(IDLE_SECONDS),
            "OW_MAX_WORKERS": "4",
        }
        self._tags = itertools.count(1)

    # Starting, stopping, asking ------------------------------------------------------------------

    def up(self) -> None:
        """`ow up`."""
        services = up(environment=self.environment, job_python=sys.executable, progress=print)
        assert all(service.up for service in services), services

    def down(self) -> None:
        """`ow down`."""
        down(environment=self.environment, progress=print)

    @property
    def settings(self) -> Settings:
        """What a client of this stack reads."""
        return Settings.load(self.environment)

    def tag(self, name: str) -> str:
        """A parameter that no other job of this stack has."""
        return f"{name}-{next(self._tags)}"

    def call(self, function: str, **arguments: Any) -> list[Row]:
        """A function of the ledger."""
        with OpenWeights(settings=self.settings) as ow:
            return ow._session.ledger.call(function, **arguments)

    def simulator(self, method: str, path: str, **body: Any) -> Any:
        """A call of the simulator's control API."""
        token = (self.home / "simulator" / "control_token").read_text(encoding="utf-8")
        url = self.settings.runpod_api_url.removesuffix("/v2") + f"/_sim/{path}"
        headers = {"X-Sim-Token": token}
        answer = httpx.request(method, url, headers=headers, json=body or None, timeout=30, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def prefect(self) -> SyncPrefectClient:
        """A client of the Prefect server."""
        return SyncPrefectClient(self.settings.prefect_api_url)

    def sql(self, statement: str, *values: Any) -> None:
        """A statement as the owner of the ledger's database, to make a state that is hard to hit."""
        url = embedded.EmbeddedPostgres(self.home / "postgres").url()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement, values)

    def select(self, query: str, *values: Any) -> list[Any]:
        """What a query gives, as the owner of the ledger's database."""
        url = embedded.EmbeddedPostgres(self.home / "postgres").url()
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(query, values).fetchall()

    def state_of(self, flow_run_id: str) -> str:
        """Type of a flow run's state."""
        with self.prefect() as client:
            state = client.read_flow_run(UUID(flow_run_id)).state
        return "NONE" if state is None else state.type.value

    # Processes -----------------------------------------------------------------------------------

    def pid(self, service: str) -> int:
        """Process id of a service."""
        [pid] = [each.pid for each in status(self.settings) if each.name == service]
        assert pid is not None, f"{service} does not run"
        return pid

    def pod_of(self, job: Job) -> Row:
        """The ledger's row of the pod that runs the job."""
        [worker] = [row for row in self.call("list_workers") if row["id"] == job.worker_id]
        return worker

    def agent_of(self, job: Job) -> psutil.Process:
        """The agent of the pod that runs the job: the container's first process."""
        provider_id = self.pod_of(job)["pod_id"]
        [pod] = [pod for pod in self.simulator("GET", "state")["pods"] if pod["id"] == provider_id]
        return psutil.Process(pod["pid"])

    def zygote_of(self, job: Job) -> psutil.Process:
        """The preloaded process of that pod."""
        [zygote] = [
            p for p in self.agent_of(job).children() if "openweights_prefect.pod.zygote" in p.cmdline()
        ]
        return zygote

    def flow_process_of(self, job: Job) -> psutil.Process:
        """The forked process that runs the job's flow."""
        [child] = self.zygote_of(job).children()
        return child

    def entrypoint_of(self, job: Job) -> psutil.Process:
        """The job's own process."""
        [child] = self.flow_process_of(job).children()
        return child

    def kill(self, process: psutil.Process | int) -> None:
        """SIGKILL to one process of this stack; returns when it holds no file and no port any more."""
        process = self.own(process)
        process.kill()
        eventually(lambda: _is_gone(process.pid), 10, f"process {process.pid} is gone")

    def kill_group(self, process: psutil.Process) -> None:
        """SIGKILL to a process group whose leader is of this stack."""
        assert os.getpgid(self.own(process).pid) == process.pid
        os.killpg(process.pid, 9)

    def own(self, process: psutil.Process | int) -> psutil.Process:
        """The process, which is one of this stack."""
        process = psutil.Process(process) if isinstance(process, int) else process
        postmaster = find_postmaster(embedded_layout.locate(self.home / "postgres"))
        environment = process.environ()
        marks = {
            environment.get("OW_HOME") == str(self.home),
            environment.get(HOME_VARIABLE) == str(self.home),
            environment.get(INSTANCE_VARIABLE) == self._instance(),
            postmaster is not None and postmaster.pid == process.pid,
        }
        assert True in marks, f"process {process.pid} is not of this stack"
        return process

    def _instance(self) -> str:
        try:
            return str(self.simulator("GET", "state")["instance"])
        except httpx.HTTPError:
            return "no simulator answers"

    def processes(self) -> list[psutil.Process]:
        """Every live process that carries the mark of this stack."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                zombie = process.status() == psutil.STATUS_ZOMBIE
            except (psutil.Error, OSError):
                continue
            if not zombie and str(self.home) in (environment.get(HOME_VARIABLE), environment.get("OW_HOME")):
                found.append(process)
        return found

    def submit_script(self, tag: str, extra: Path, times: int = 1) -> subprocess.Popen[str]:
        """Start a script of a user that submits a job and waits for it."""
        argv = [sys.executable, fault_jobs.__file__, tag, str(extra), str(times)]
        return subprocess.Popen(argv, env=self.environment, stdout=subprocess.PIPE, text=True)

    # What must hold ------------------------------------------------------------------------------

    def running(self, job: Job, events: int = 20) -> Job:
        """Return when the job's newest run has logged so many events that are stored."""

        def has_begun() -> bool:
            run = job.runs[-1:]
            assert job.refresh().status in ("pending", "in_progress"), f"{job} {job.error}"
            return bool(run) and run[0].status == "in_progress" and len(_numbers(job, run[0].id)) >= events

        eventually(has_begun, 60, f"{job.id} runs")
        return job

    def holds(self, job: Job, *, attempts: int | None = None, seconds: float = 90) -> None:
        """The job completes; its last run is whole; Prefect agrees; no pod is forgotten, none touched."""
        job.wait(timeout=seconds, progress=False)
        runs = job.runs
        assert [run.status for run in runs] == ["lost"] * (len(runs) - 1) + ["completed"]
        if attempts is not None:
            assert len(runs) == attempts, [(run.status, run.error) for run in runs]
        events = job.params["validated_params"]["events"]
        assert _numbers(job, runs[-1].id) == list(range(events))
        lines = [line for line in job.logs() if line.startswith(("line ", "done"))]
        assert lines == [*(f"line {number}" for number in range(events)), "done"]
        assert job.outputs is not None
        assert job.outputs["n"] == events - 1
        self.agrees(job)
        self.money_is_safe()

    def agrees(self, job: Job) -> None:
        """Prefect shows for every run what the ledger holds."""
        wanted = {run.id: _STATES[run.status] for run in job.runs}
        seen: dict[str, str] = {}

        def agree() -> bool:
            seen.update({run_id: self.state_of(run_id) for run_id in wanted})
            return seen == wanted

        try:
            eventually(agree, AGREEMENT_SECONDS, "Prefect agrees")
        except AssertionError as exc:
            raise AssertionError(f"Prefect shows {seen}, the ledger {wanted}") from exc

    def money_is_safe(self) -> None:
        """Each pod that bills has a living row, and the other way round; foreign pods are as they were."""

        def same() -> bool:
            rows = {row["pod_id"] for row in self.call("list_workers") if row["status"] != "terminated"}
            return rows == set(self.report()["alive"])

        eventually(same, 30, "the ledger and the provider hold the same pods")
        report = self.report()
        assert report["violations"] == []
        assert len(report["alive_by_owner"]["foreign"]) == 3

    def report(self) -> Any:
        """The simulator's report."""
        return self.simulator("GET", "report")


def _is_gone(pid: int) -> bool:
    """A killed process may be a zombie while other threads of it still hold its sockets."""
    try:
        return (
            psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            and len([*Path(f"/proc/{pid}/task").iterdir()]) == 1
        )
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True


def _numbers(job: Job, run_id: str) -> list[int]:
    events = job._session.ledger.call("list_events", for_run=run_id, max_rows=1000)
    assert [event["sequence"] for event in events] == list(range(len(events)))
    return [event["data"]["n"] for event in events if "n" in event["data"]]
