"""What an entrypoint inherits: the same base for each run, a temporary folder of its own, nothing of ours."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.pod import folder as folders
from openweights_prefect.pod.server import serve
from openweights_prefect.runtime import wire
from openweights_prefect.runtime.entrypoint import RunFolder, job_environment, run_entrypoint


class Runs:
    """Runs entrypoints one after another, as the flows of one pod do."""

    def __init__(self, root: Path, sockets: Path) -> None:
        self.root, self.sockets = root, sockets
        self.agent = sockets / "agent.sock"
        self.count = 0

    def run(self, command: str, **job: Any) -> RunFolder:
        self.count += 1
        folder = RunFolder(self.root / str(self.count))
        sockets = self.sockets / str(self.count)
        sockets.mkdir()
        row = {"id": "custom-1", "entrypoint": command, "params": {}, "mounts": {}, **job}
        folders.prepare(folder, row, job_socket=sockets / "job.sock", fetch=lambda *_: None)
        (sockets / "tmp").symlink_to(folder.temporary)

        os.environ[wire.SOCKET_VARIABLE] = str(self.agent)
        assert asyncio.run(run_entrypoint(folder, folder.job(), job_python="")) == 0
        return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    monkeypatch.setenv(wire.RUN_VARIABLE, "0190c0de-0000-7000-8000-000000000001")
    monkeypatch.setenv(wire.SOCKET_VARIABLE, "")  # set anew by each run, and restored
    sockets = Path(tempfile.mkdtemp(prefix="ow-test-"))
    runs = Runs(tmp_path, sockets)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)  # an entrypoint blocks its own loop
    thread.start()

    async def agree(**_: Any) -> dict[str, Any]:
        return {}

    serving = serve(runs.agent, {"started": agree, "exited": agree})
    server = asyncio.run_coroutine_threadsafe(serving, loop).result(10)
    yield runs
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
    shutil.rmtree(sockets)


DUMP = 'python3 -c \'import json, os; json.dump(dict(os.environ), open("env.json", "w"))\''


def environment(folder: RunFolder) -> dict[str, str]:
    document: dict[str, str] = json.loads((folder.work / "env.json").read_text())
    return document


def test_nothing_that_one_job_sets_reaches_the_next(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it names, nor what it exports."""
    leaky = f"export PATH=/nowhere:$PATH CUDA_VISIBLE_DEVICES=7 LEAK=1; {DUMP}"
    first = environment(runs.run(leaky, env={"HF_HOME": "/of/the/first", "MINE": "1"}))
    assert (first["MINE"], first["LEAK"], first["HF_HOME"]) == ("1", "1", "/of/the/first")
    second = environment(runs.run(DUMP))
    assert not {"MINE", "LEAK", "CUDA_VISIBLE_DEVICES", "HF_HOME"} & second.keys()
    assert "/nowhere" not in second["PATH"]


def test_temporary_files_go_with_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in the run's folder, under a path that is short enough for sockets."""
    folder = runs.run(f"echo hello > $TMPDIR/left; {DUMP}")
    assert (folder.temporary / "left").read_text() == "hello\n"
    seen = environment(folder)["TMPDIR"]
    assert len(seen) < 60
    assert Path(seen).resolve() == folder.temporary.resolve()
    folders.remove(folder)
    assert not (folder.temporary).exists()


def test_the_pods_own_variables_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names or opens something of ours, and the pod's key at RunPod."""
    for name in ("PREFECT_API_KEY", "OW_DATABASE_URL", "RUNPOD_API_KEY", "SUPABASE_ANON_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv(wire.RUN_VARIABLE, "run")
    job = {"id": "custom-1", "job_socket": str(tmp_path / "job.sock")}
    made = job_environment(RunFolder(tmp_path), job, job_python="", secrets={})
    assert "secret" not in made.values()
