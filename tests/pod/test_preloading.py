"""The preloaded process of a pod: there for jobs of ours when it is ready, and in nobody's way."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import openweights_prefect
from openweights_prefect.jobs import preloading as plan
from openweights_prefect.jobs.request import JOB_TYPES
from openweights_prefect.pod import preloading
from openweights_prefect.runtime import forking

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere jobs are never forked")

HOST = Path(__file__).with_name("preloading_host.py")
PLAN = """
import openweights_prefect
openweights_prefect.__path__.append(%r)
ENVIRONMENT, LATE, MODULES = {}, (), ("openweights_prefect.pretend",)
def preload():
    import openweights_prefect.pretended_library
def why_not_fork():
    return None
"""
PROGRAM = """
import json, os
from openweights_prefect import pretended_library
with open("seen.json", "w") as file:
    seen = {"pid": os.getpid(), "imported_in": pretended_library.PID, "mine": os.environ.get("MINE")}
    json.dump({**seen, "told": [name for name in os.environ if "PRELOADED" in name]}, file)
raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a host with a preloaded process and five runs saw."""
    root = tmp_path_factory.mktemp("pod")
    package = root / "package"
    package.mkdir()
    for entry in Path(openweights_prefect.__file__).parent.iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "pretended_library.py").write_text("import os\nPID = os.getpid()\n")
    (package / "pretend.py").write_text(PROGRAM)
    (root / "plan.py").write_text(PLAN % str(package))
    sockets = Path(tempfile.mkdtemp(prefix="ow-test-"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        done = subprocess.run(
            [sys.executable, str(HOST), str(root), str(sockets)],
            env={**os.environ, "PATH": path, "SOME_SECRET": "sesame"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        shutil.rmtree(sockets)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def test_the_first_run_is_an_ordinary_process(seen: dict[str, Any]) -> None:
    """Nothing is preloaded by then, and nobody waits for it."""
    assert seen["cold"]["imported_in"] == seen["cold"]["pid"]
    assert seen["before"] == {}


def test_a_later_run_is_forked(seen: dict[str, Any]) -> None:
    """The agent hears of its process, and gets its exit code, as of any other."""
    assert seen["warm"]["imported_in"] == seen["preloaded"] != seen["warm"]["pid"]
    assert {seen[name]["code"] for name in ("cold", "warm", "own", "died", "again")} == {3}
    assert seen["warm"]["pid"] in seen["started"]
    assert len(seen["started"]) == 5


def test_a_run_with_variables_of_its_own_is_not(seen: dict[str, Any]) -> None:
    """A library may have read them when it was imported."""
    assert seen["own"]["imported_in"] == seen["own"]["pid"]
    assert seen["own"]["mine"] == "1"


def test_cleaning_up_after_a_run_spares_it(seen: dict[str, Any]) -> None:
    """It belongs to no run."""
    assert seen["still"]


def test_one_that_died_is_done_without_and_started_again(seen: dict[str, Any]) -> None:
    """By the next run of ours that ends."""
    assert seen["died"]["imported_in"] == seen["died"]["pid"]
    assert seen["again"]["imported_in"] == seen["then"] != seen["preloaded"]


def test_it_ends_with_the_pod(seen: dict[str, Any]) -> None:
    """And its socket is gone."""
    assert seen["left"] == []
    assert not seen["sockets"]


def test_jobs_are_not_told_of_it(seen: dict[str, Any]) -> None:
    """They have no business with it."""
    assert {tuple(seen[name]["told"]) for name in ("cold", "warm", "own")} == {()}


def test_a_machine_without_memory_is_spared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that has less of it would end sooner than one that waits for its imports."""
    monkeypatch.setattr(preloading, "_LEAST_MEMORY_LEFT", 1 << 60)
    assert asyncio.run(_starts(tmp_path, wanted=1)) == 0


def test_one_that_grew_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that does not come to be, for instance in an image without torch, only a few times."""
    monkeypatch.setattr(preloading, "_MOST_MEMORY", 0)
    assert asyncio.run(_starts(tmp_path, wanted=8)) == 3


async def _starts(folder: Path, *, wanted: int) -> int:
    """How often the preloaded process is started when it is wanted so often, one time after another."""
    pids = set()
    (folder / "plan.py").write_text("import time; time.sleep(600)")
    async with preloading.Preloading(folder, job_python="", plan="plan") as one, asyncio.timeout(60):
        for _ in range(wanted):
            before = one._process
            one.want()
            while one._running is not None and one._process is before:
                await asyncio.sleep(0.01)
            if one._process is not None:
                pids.add(one._process.pid)
    return len(pids)


@pytest.mark.parametrize("kind", JOB_TYPES.values(), ids=JOB_TYPES)
def test_every_job_type_of_ours_can_be_forked(kind: Any) -> None:
    """Its entrypoint is a program of the plan."""
    assert any(kind.entrypoint.startswith(f"python -m {module}") for module in plan.MODULES)
    assert forking._OURS.fullmatch(kind.entrypoint)
