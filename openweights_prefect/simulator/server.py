"""The simulator as a child process, for tests and for trying things out."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import httpx

from openweights_prefect.errors import StackError
from openweights_prefect.simulator.config import MAIN_KEY


class SimulatorServer:
    """`with SimulatorServer() as runpod:` starts one; `runpod.rest` is the base URL for a client.

    A process and not a thread, since the containers die with the thread that started them. The same folder
    may be given again: the pods of the last time are still rented then.
    """

    api_key = MAIN_KEY

    def __init__(
        self,
        folder: Path | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        profile: str = "fast",
        port: int = 0,
        seed: int = 0,
    ) -> None:
        self._own_folder = tempfile.TemporaryDirectory(prefix="simulator-") if folder is None else None
        self.folder = Path(self._own_folder.name) if self._own_folder else Path(str(folder))
        self._config = dict(config or {})
        self._options = ["--profile", profile, "--port", str(port), "--seed", str(seed)]
        self._process: subprocess.Popen[str] | None = None
        self.base_url = ""
        self.rest = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._own_folder is not None:
            self._own_folder.cleanup()

    def start(self) -> None:
        """Start the process and wait until it listens; raises `StackError` with what it said otherwise."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.json"
        config.write_text(json.dumps(self._config), encoding="utf-8")
        command = [sys.executable, "-m", "openweights_prefect.simulator", *self._options]
        with (self.folder / "simulator.log").open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, "--state-dir", str(self.folder), "--config", str(config)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = (self.folder / "simulator.log").read_text(encoding="utf-8")
            raise StackError(f"The simulator did not start: {said[-2000:]}")
        address = json.loads(line)
        self.base_url, self.rest = address["base_url"], address["rest"]

    def stop(self) -> None:
        """SIGTERM, and wait until it and its pods are gone."""
        self._end(kill=False)

    def kill(self) -> None:
        """SIGKILL, as when the machine fails."""
        self._end(kill=True)

    @property
    def pid(self) -> int:
        """Process id of the simulator."""
        if self._process is None:
            raise StackError("The simulator is not started. Call `start()`.")
        return self._process.pid

    def control(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A call of `/_sim`; returns the decoded answer."""
        token = (self.folder / "control_token").read_text(encoding="utf-8")
        url, headers = f"{self.base_url}/_sim/{path}", {"X-Sim-Token": token}
        response = httpx.request(method, url, headers=headers, json=body, timeout=30, trust_env=False)
        response.raise_for_status()
        return response.json() if response.content else None

    def wait(self, condition: str, *, pod: str | None = None, timeout_seconds: float = 20) -> None:
        """Return when a condition of `conditions.py` is true, such as `pod.phase==UP`."""
        query = {"expr": condition, "timeout": str(timeout_seconds), **({"pod": pod} if pod else {})}
        self.control("GET", f"wait?{urlencode(query)}")

    def report(self) -> Any:
        """Pods alive, money spent, rules broken."""
        return self.control("GET", "report")

    def pod(self, pod_id: str) -> Any:
        """What the simulator knows of one pod, with its phase and process id; None when it is gone."""
        return next((pod for pod in self.control("GET", "state")["pods"] if pod["id"] == pod_id), None)

    def log(self, pod_id: str) -> str:
        """What the container has printed so far."""
        file = self.folder / "pods" / pod_id / "container.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        process.wait(timeout=60)
        if process.stdout is not None:
            process.stdout.close()
