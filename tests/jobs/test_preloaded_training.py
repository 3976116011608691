"""Jobs of ours that are forked on a warm pod: no imports, and the same results."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_fine_tuning_train as training
from test_fine_tuning_train import FILE, SMALL, Lab, chats, events

from openweights_prefect.jobs.request import FINE_TUNING, LOGPROB
from openweights_prefect.runtime import forking

pytestmark = pytest.mark.training

lab = training.lab
TOKEN = "sesame"


@dataclass
class Pod:
    """A preloaded process of the job interpreter."""

    lab: Lab
    process: subprocess.Popen[bytes]
    base: dict[str, str]
    parents: list[int] = field(default_factory=list)

    def environment(self, work: Path) -> dict[str, str]:
        return {
            **self.base,
            "N_GPUS": "0",
            "OPENWEIGHTS_RUN_ID": "0190c0de-0000-7000-8000-000000000001",
            "OPENWEIGHTS_JOB_ID": "job",
            "OW_EVENT_SPOOL": str(work / "events.jsonl"),
            "OW_AGENT_SOCKET": str(self.lab.agent.server_address),
        }

    def run(self, command: str, work: Path) -> int:
        """Have a job forked, and wait for its end."""
        forked = forking.fork(command, folder=work, environment=self.environment(work))
        assert forked is not None
        self.parents.append(psutil.Process(forked.pid).ppid())
        return asyncio.run(forked.wait())


@pytest.fixture(scope="module")
def pod(lab: Lab) -> Iterator[Pod]:
    library = lab.folder / "lib"
    library.mkdir(exist_ok=True)
    if not (library / "openweights_prefect").exists():
        (library / "openweights_prefect").symlink_to(Path(training.openweights_prefect.__file__).parent)
    path = lab.folder / "preloaded.sock"
    base = {
        "PATH": f"{Path(lab.python).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(lab.folder),
        "PYTHONPATH": str(library),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [lab.python, "-m", "openweights_prefect.runtime.preloaded", str(path)]
    process = subprocess.Popen(
        [*command, hashlib.sha256(TOKEN.encode()).hexdigest(), "openweights_prefect.jobs.preloading"],
        env={**base, "OPENWEIGHTS_RUN_ID": forking.UNMARKED},
        cwd=lab.folder,
        stdin=subprocess.DEVNULL,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(forking.SOCKET_VARIABLE, str(path))
            patch.setenv(forking.TOKEN_VARIABLE, TOKEN)
            deadline = time.monotonic() + 240
            while not path.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield Pod(lab, process, base)
    finally:
        process.kill()
        process.wait()


def test_trainings_are_forked_and_train_the_same(pod: Pod) -> None:
    """Two of them, one after another, in forks of the process that has imported torch; one afresh."""
    lab = pod.lab
    works = [lab.job(name, chats(16), epochs=2, **SMALL) for name in ("forked-1", "forked-2", "afresh")]
    assert [pod.run(FINE_TUNING.entrypoint, work) for work in works[:2]] == [0, 0]
    assert pod.parents[-2:] == [pod.process.pid] * 2
    done = lab.train(works[2], N_GPUS="0")
    assert done.returncode == 0, done.stderr
    losses = [[(event["step"], event["loss"]) for event in events(work, "train")] for work in works]
    assert losses[0] == losses[1] == losses[2]
    weights = [(work / "uploads/adapter/adapter_model.safetensors").read_bytes() for work in works]
    assert weights[0] == weights[1] == weights[2]


def test_an_error_is_one_line(pod: Pod, capfd: pytest.CaptureFixture[str]) -> None:
    """As in a fresh process."""
    work = pod.lab.job("empty", [], **SMALL)
    assert pod.run(FINE_TUNING.entrypoint, work) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_measurement_is_forked(pod: Pod) -> None:
    """By the same process, after trainings."""
    work = pod.lab.job("measured", chats(4))
    params: dict[str, Any] = json.loads((work / "params.json").read_text())
    (work / "params.json").write_text(json.dumps({**params, "dataset": FILE, "batch_size": 2}))
    assert pod.run(LOGPROB.entrypoint, work) == 0
    assert pod.parents[-1] == pod.process.pid
    assert len((work / "uploads/logprobs.jsonl").read_text().splitlines()) == 4
    shutil.rmtree(work)
