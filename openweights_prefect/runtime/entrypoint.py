"""Runs a job's entrypoint as a child process of its flow."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openweights_prefect.runtime import child, forking, wire

FOLDER_VARIABLE = "OW_RUN_FOLDER"

# What a job inherits of the pod's environment: nothing that names or opens anything of ours.
_INHERITED = (
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "OW_CHECKPOINT_GRACE_SECONDS",
)
_INHERITED_PREFIXES = ("CUDA", "NVIDIA_", "NCCL_", "HF_", "TORCH_", "RUNPOD_")
_SECRET = ("RUNPOD_API_KEY", "HF_TOKEN")  # a job has the secrets that it names, and no other


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives on its pod.

    `job.json`, `log` and `events.jsonl` are beside `work/`, the entrypoint's own folder.
    """

    path: Path

    @classmethod
    def current(cls) -> RunFolder:
        """The folder of the run that this process executes."""
        return cls(Path(os.environ[FOLDER_VARIABLE]))

    @property
    def work(self) -> Path:
        """The entrypoint's current folder: mounts, `params.json`, `uploads/`."""
        return self.path / "work"

    @property
    def log(self) -> Path:
        """Everything that the run printed."""
        return self.path / "log"

    @property
    def spool(self) -> Path:
        """The event spool."""
        return self.path / "events.jsonl"

    @property
    def temporary(self) -> Path:
        """Where temporary files of the entrypoint are, so that they go with the run."""
        return self.path / "tmp"

    @property
    def library(self) -> Path:
        """A folder with nothing but our package, for PYTHONPATH."""
        return self.path / "lib"

    def job(self) -> dict[str, Any]:
        """The job's row, as the agent got it from the ledger."""
        return dict(json.loads((self.path / "job.json").read_text(encoding="utf-8")))


def base_environment(job_python: str) -> dict[str, str]:
    """What is the same for every job of a pod: what a GPU needs, and nothing secret."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in _INHERITED or (name.startswith(_INHERITED_PREFIXES) and name not in _SECRET)
    }
    path = os.environ.get("PATH", os.defpath)
    return {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(job_python).parent}{os.pathsep}{path}" if job_python else path,
    }


def job_environment(
    folder: RunFolder, job: Mapping[str, Any], *, job_python: str, secrets: Mapping[str, str]
) -> dict[str, str]:
    """The environment of an entrypoint: the pod's, what the job named, and the way to its agent."""
    base = base_environment(job_python)
    return {
        **base,
        **{str(name): str(value) for name, value in (job.get("env") or {}).items()},
        **secrets,
        "PATH": base["PATH"],
        "PYTHONPATH": str(folder.library),
        # By way of the sockets' folder: a path in there is short enough for the sockets of the job's own.
        "TMPDIR": str(Path(str(job["job_socket"])).with_name("tmp")),
        "N_GPUS": os.environ.get("N_GPUS", "0"),
        wire.RUN_VARIABLE: os.environ[wire.RUN_VARIABLE],
        wire.JOB_VARIABLE: str(job["id"]),
        wire.SOCKET_VARIABLE: str(job["job_socket"]),
        wire.SPOOL_VARIABLE: str(folder.spool),
    }


async def run_entrypoint(folder: RunFolder, job: Mapping[str, Any], *, job_python: str) -> int:
    """Run the job's command to its end and return its exit code, negative for a signal.

    Output goes where this process's own goes: straight into the run's log file. The job's secrets come from
    the agent at the last moment, and are in the environment of the command alone.
    """
    secrets = wire.request("secrets")["values"] if job.get("secrets") else {}
    environment = job_environment(folder, job, job_python=job_python, secrets=secrets)
    process = await _start(str(job["entrypoint"]), folder.work, environment)
    wire.request("started", pid=process.pid)
    try:
        code = await process.wait()
        await asyncio.to_thread(wire.request, "exited")  # the agent ends what the entrypoint left running
        return code
    finally:
        _kill_group(process.pid)


async def _start(
    command: str, folder: Path, environment: Mapping[str, str]
) -> asyncio.subprocess.Process | forking.Forked:
    """As the leader of a session of its own; a program of ours without its imports, where that can be."""
    # It blocks for milliseconds, and nothing else happens here: a cancel shall not come between.
    if forked := forking.fork(command, folder=folder, environment=environment):
        return forked
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        child.__file__,
        "bash",
        "-c",
        command,
        cwd=folder,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def describe_exit(code: int) -> str:
    """One sentence for a non-zero exit code."""
    if code >= 0 and code < 128:
        return f"The entrypoint exited with code {code}; its last lines are in the log."
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown signal"
    hint = " Most often the machine ran out of memory." if number == signal.SIGKILL else ""
    return f"The entrypoint was killed by signal {number} ({name}).{hint}"
