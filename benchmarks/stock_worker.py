"""The peer: Prefect's own process worker with a no-op deployment, on a Prefect server that runs already."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from openweights_prefect.errors import StackError
from openweights_prefect.settings import Settings
from openweights_prefect.stack import health, processes

_POOL = "stock-process"
_WORKER = "stock"
_MARK = "OW_BENCHMARK_PEER"
"""Marks the worker and all that it starts, so that nothing of it is left behind."""
_ONLINE_SECONDS = 120.0
_RUN_SECONDS = 180.0
_STOP_SECONDS = 15.0
# Async, because a sync flow waits a second for a thread of its own at the end: the peer is to look its best.
_FLOW = """
import time
from pathlib import Path

from prefect import flow


@flow
async def noop(note: str) -> None:
    unfinished = Path(note + ".new")
    unfinished.write_text(repr(time.time()))
    unfinished.rename(note)
"""


@dataclass(frozen=True)
class StockRun:
    """A flow run that was created, and the file into which it writes the time of its first line."""

    id: str
    submitted_at: float
    note: Path


class StockTimes(NamedTuple):
    """Seconds from just before the flow run was created."""

    claimed: float
    """The worker's poll found it."""
    first_line: float
    finished: float


class StockWorker:
    """Runs from `__enter__`, which returns when the worker is online, to `__exit__`, which ends its group."""

    def __init__(self, *, api_url: str, folder: Path, environment: Mapping[str, str], slots: int) -> None:
        self._api_url = api_url
        self._folder = folder
        self._marks = {_MARK: str(folder)}
        self._environment = {
            **environment,
            **self._marks,
            "PREFECT_API_URL": api_url,
            "PREFECT_HOME": str(folder / "prefect"),
        }
        self._slots = slots
        # A proxy of the user's must not see, or slow down, what stays on this machine.
        self._client = httpx.Client(base_url=api_url, trust_env=False, timeout=30)
        self._process: subprocess.Popen[bytes] | None = None
        self._deployment = ""
        self._count = 0

    def __enter__(self) -> Self:
        try:
            self._start()
            self._deploy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def submit(self) -> StockRun:
        """Create a flow run through the API, which costs the peer no import of Prefect here."""
        self._count += 1
        note = self._folder / f"note-{self._count}"
        submitted_at = time.time()
        answer = self._post(
            f"/deployments/{self._deployment}/create_flow_run",
            {"parameters": {"note": str(note)}, "state": {"type": "SCHEDULED"}},
        )
        return StockRun(answer["id"], submitted_at, note)

    def wait(self, run: StockRun) -> StockTimes:
        """Wait for the end of a run; raises `StackError` when it fails or takes too long."""
        # The server is asked only when an end is to be expected: to ask is work for the measured machine.
        self._await(run.note.exists, _RUN_SECONDS, "started no run")
        self._await(lambda: self._is_final(run), _RUN_SECONDS, "finished no run")
        ends = self._state_times(run)
        if "COMPLETED" not in ends:
            raise StackError(f"A run of the stock worker ended as {sorted(ends)}.{self._log_tail()}")
        times = (ends["PENDING"], float(run.note.read_text(encoding="utf-8")), ends["COMPLETED"])
        return StockTimes(*(at - run.submitted_at for at in times))

    def stop(self) -> None:
        """End the worker and everything that it started; idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
            self._signal(signal.SIGKILL)
            self._process.wait()
        processes.sweep(self._marks)
        self._client.close()

    def _start(self) -> None:
        self._folder.mkdir(parents=True)
        (self._folder / "noop.py").write_text(_FLOW, encoding="utf-8")
        python = [sys.executable, "-P", "-m", "prefect"]
        names = ["--pool", _POOL, "--type", "process", "--name", _WORKER, "--limit", str(self._slots)]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [*python, "worker", "start", *names],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=self._environment,
                start_new_session=True,
            )
        self._await(self._is_online, _ONLINE_SECONDS, "did not come online")

    def _deploy(self) -> None:
        flow = self._post("/flows/", {"name": "noop"})
        pull = {"prefect.deployments.steps.set_working_directory": {"directory": str(self._folder)}}
        deployment = self._post(
            "/deployments/",
            {
                "name": "noop",
                "flow_id": flow["id"],
                "work_pool_name": _POOL,
                "entrypoint": "noop.py:noop",
                "path": str(self._folder),
                "pull_steps": [pull],
            },
        )
        self._deployment = deployment["id"]

    def _is_online(self) -> bool:
        settings = Settings(prefect_api_url=self._api_url, work_pool=_POOL)
        return any(health.is_online(worker) for worker in health.prefect_workers(settings))

    def _is_final(self, run: StockRun) -> bool:
        state = self._client.get(f"/flow_runs/{run.id}").raise_for_status().json()["state"]
        return state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    def _state_times(self, run: StockRun) -> dict[str, float]:
        """State type -> when it was first reached."""
        answer = self._client.get("/flow_run_states/", params={"flow_run_id": run.id}).raise_for_status()
        times: dict[str, float] = {}
        for state in answer.json():
            at = datetime.fromisoformat(state["timestamp"]).timestamp()
            times[state["type"]] = min(at, times.get(state["type"], at))
        return times

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._client.post(path, json=body).raise_for_status().json())

    def _await(self, is_so: Callable[[], bool], seconds: float, failure: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while not is_so():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise StackError(f"The stock worker {failure} within {seconds:g} s.{self._log_tail()}")
            time.sleep(0.1)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _log_tail(self) -> str:
        return f" The end of its log:\n{processes.tail(self._log)}"

    @property
    def _log(self) -> Path:
        return self._folder / "worker.log"
