"""RunPod's own Python package works against the simulator, with nothing but its address and key set."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import filelock
import pytest

from openweights_prefect.simulator.server import SimulatorServer

VERSION = "1.12.0"
_INSTALL_SECONDS = 400

_CALLS = """
import runpod, sys
from runpod.error import AuthenticationError, QueryError

def raises(kind, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except kind as exc:
        return str(exc)
    raise SystemExit(f"{call.__name__} did not raise {kind.__name__}")

runpod.api_key = sys.argv[1]
assert any(gpu["id"] == "NVIDIA A40" for gpu in runpod.get_gpus())
gpu = runpod.get_gpu("NVIDIA A40")
assert (gpu["securePrice"], gpu["maxGpuCount"]) == (0.49, 10)
assert gpu["lowestPrice"]["uninterruptablePrice"] == 0.49
raises(ValueError, runpod.get_gpu, "NVIDIA NOT A GPU")
raises(ValueError, runpod.create_pod, "a", "sim/sleep", "NVIDIA NOT A GPU")
pod = runpod.create_pod(
    "a", "sim/sleep", "NVIDIA A40", cloud_type="SECURE", env={"A": "1"}, ports="22/tcp,8000/http",
    container_disk_in_gb=5,
)
assert pod["env"] == ["A=1"] and "-6441" in pod["machine"]["podHostId"]
assert [p["name"] for p in runpod.get_pods() if p["id"] == pod["id"]] == ["a"]
seen = runpod.get_pod(pod["id"])
assert (seen["desiredStatus"], seen["uptimeSeconds"], seen["gpuCount"]) == ("RUNNING", 0, 1)
assert runpod.get_pod("nobody") is None
assert runpod.stop_pod(pod["id"])["desiredStatus"] == "EXITED"
assert runpod.resume_pod(pod["id"], 1)["desiredStatus"] == "RUNNING"
runpod.terminate_pod(pod["id"])
assert "pod not found to terminate" in raises(QueryError, runpod.terminate_pod, "nobody")
missing = raises(QueryError, runpod.create_pod, "b", "sim/sleep", "NVIDIA A40", gpu_count=11)
assert "no longer any instances" in missing
other = runpod.create_pod("c", "sim/sleep", "NVIDIA A40")
assert other["id"]
runpod.api_key = "rpa_pod_" + other["id"]
assert "Unauthorized" in raises(QueryError, runpod.terminate_pod, sys.argv[2])
runpod.terminate_pod(other["id"])
runpod.api_key = "wrong"
raises(AuthenticationError, runpod.get_pods)
print("all calls work")
"""


@pytest.fixture(scope="module")
def runpod() -> Iterator[SimulatorServer]:
    with SimulatorServer(config={"rate_limits": {}}, profile="instant") as server:
        yield server


def test_the_package_works_against_the_simulator(runpod: SimulatorServer, tmp_path: Path) -> None:
    """Its ten calls, their errors, and that a pod's key ends that pod only."""
    foreign = next(pod["id"] for pod in runpod.control("GET", "state")["pods"])
    script = tmp_path / "calls.py"
    script.write_text(_CALLS, encoding="utf-8")
    environment = {"RUNPOD_API_BASE_URL": runpod.base_url, "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [str(_interpreter()), str(script), runpod.api_key, foreign]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert "all calls work" in done.stdout, done.stdout + done.stderr


def _interpreter() -> Path:
    with contextlib.suppress(PackageNotFoundError):
        version("runpod")
        return Path(sys.executable)
    found = _install()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@functools.cache
def _install() -> Path | str:
    """An interpreter with the package, or why there is none; apart, because it brings a lot along."""
    folder = Path(tempfile.gettempdir()) / "owsim-runpod-venv"
    python, ready = folder / "bin" / "python", folder / f"runpod-{VERSION}"
    with filelock.FileLock(f"{folder}.lock", timeout=_INSTALL_SECONDS + 60):
        if folder.exists() and folder.stat().st_uid != os.geteuid():
            return f"{folder} is not ours, so what is in it is not run"
        if ready.exists():
            return python
        pip = [str(python), "-m", "pip", "install", "--quiet", "--retries=0", f"runpod=={VERSION}"]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
            subprocess.run(pip, check=True, timeout=_INSTALL_SECONDS, capture_output=True)
        except (OSError, subprocess.SubprocessError) as exc:
            return f"runpod {VERSION} cannot be installed: {exc}"
        ready.touch()
    return python
