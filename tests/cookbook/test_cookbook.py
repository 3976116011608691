"""Every program of the cookbook, run as a reader would: on a local stack, with a tiny model."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import openweights_prefect
from openweights_prefect import OpenWeights
from openweights_prefect.jobs.request import FINE_TUNING, WEIGHTED_SFT
from openweights_prefect.ledger import embedded
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.training import prepare
from openweights_prefect.settings import Settings
from openweights_prefect.stack.down import down
from openweights_prefect.stack.up import up

pytestmark = [pytest.mark.stack, pytest.mark.training]

COOKBOOK = Path(openweights_prefect.__file__).parent.parent / "cookbook" / "fine_tuning"
PROGRAMS = ("sft", "qlora_70b", "logprob_tracking", "weighted_sft", "sampling", "dpo", "orpo")
STEPS = 60


class Done(NamedTuple):
    """A program that ended well."""

    said: str
    jobs: list[Job]
    """In the order in which they were waited for."""

    def figures(self, name: str) -> tuple[float, float]:
        """The two figures of a line like `loss: 0.693 -> 0.001`."""
        match = re.search(rf"^{re.escape(name)}:.*?(-?\d+\.\d+) -> (-?\d+\.\d+)", self.said, re.MULTILINE)
        assert match is not None, self.said
        return float(match[1]), float(match[2])


class Reader(NamedTuple):
    """Somebody with a local stack and a folder to work in."""

    ow: OpenWeights
    folder: Path
    environment: dict[str, str]

    def runs(self, program: str, *arguments: str) -> Done:
        """Run a program; it must end well, and so must its jobs."""
        done = subprocess.run(
            [sys.executable, str(COOKBOOK / program), *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        ids = dict.fromkeys(re.findall(r"\b(?:ft|sft)job-[0-9a-f]{12}\b", done.stderr))
        jobs = [self.ow.jobs.retrieve(job_id) for job_id in ids]
        assert jobs
        assert [job.status for job in jobs] == ["completed"] * len(jobs)
        return Done(done.stdout, jobs)

    def output(self, path: str) -> Path:
        """A file that programs leave."""
        return self.folder / "cookbook-output" / path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    """One pod does everything, and stays warm."""
    python = os.environ.get("OW_JOB_PYTHON", "")
    if not python:
        pytest.skip("OW_JOB_PYTHON names no interpreter with torch and TRL")
    parent = Path(tempfile.mkdtemp(prefix="ow-cookbook-"))
    parent.chmod(0o755)  # PostgreSQL of root runs as another account
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
        "OMP_NUM_THREADS": "1",
        "OW_HOME": str(parent / "home"),
        "OW_PREFECT_PORT": str(free_port()),
        "OW_SIMULATOR_PORT": str(free_port()),
        "OW_MAX_WORKERS": "1",
    }
    (parent / "work").mkdir()
    try:
        up(environment=environment, job_python=python, progress=print)
        with OpenWeights(settings=Settings.load(environment)) as ow:
            yield Reader(ow, parent / "work", environment)
    finally:
        down(environment=environment, progress=print)
        embedded.remove(parent / "home" / "postgres")
        shutil.rmtree(parent)


def data(job: Job, **wanted: Any) -> list[dict[str, Any]]:
    """What those events of a job say that have these values."""
    return [event["data"] for event in job.events() if wanted.items() <= event["data"].items()]


def test_quickstart(reader: Reader) -> None:
    """The main road: a model, an adapter, the finished job once more, and a job type of one's own."""
    done = reader.runs("quickstart.py", "--tiny", "--epochs", "1")
    assert "The same job again: " in done.said
    assert "is completed, after" in done.said
    assert done.said.splitlines()[-1].endswith("5 + 9 = 14")
    assert (reader.folder / "quickstart-output" / "loss.png").is_file()


def test_sft(reader: Reader) -> None:
    """The data is shown first; every step and evaluation is told; the loss falls; the adapter is there."""
    done = reader.runs("sft.py", "--local")
    assert "24 rows" in done.said
    before, after = done.figures("Loss of the training file")
    assert after < before - 2
    [job] = done.jobs
    assert [each["total"] for each in data(job, tag="start")] == [STEPS]
    assert [each["step"] for each in data(job, tag="train")] == list(range(1, STEPS + 1))
    assert {0, STEPS} <= {each["step"] for each in data(job, tag="eval")}
    assert reader.output("sft/adapter/adapter_model.safetensors").is_file()


def test_dpo_goes_on_with_the_adapter_of_sft(reader: Reader) -> None:
    """The first job is run once, whoever asks; at first nothing is preferred, at last what was chosen."""
    done = reader.runs("dpo.py", "--local")
    first, second = done.jobs
    assert len(first.runs) == 1
    assert second.params["mounted_files"].keys() >= {"model/adapter_config.json", "base/config.json"}
    assert done.figures("loss")[0] == pytest.approx(0.693, abs=0.001)
    assert done.figures("rewards/margins")[1] > 1
    assert reader.output("dpo/adapter/adapter_config.json").is_file()


def test_orpo(reader: Reader) -> None:
    """Both parts of the loss get better."""
    done = reader.runs("orpo.py", "--local")
    for name, sign in {"loss": -1, "nll_loss": -1, "log_odds_ratio": 1}.items():
        before, after = done.figures(name)
        assert sign * (after - before) > 0, done.said


def test_weighted_sft(reader: Reader) -> None:
    """What has a negative weight becomes less likely, what stands before it more."""
    done = reader.runs("weighted_sft.py", "--local")
    before, after = done.figures("answer")
    assert after > before + 10
    before, after = done.figures("hedge")
    assert after < before - 10
    [job] = done.jobs
    [last] = data(job, type="logprobs_blockwise", step=STEPS)
    assert {each["tag"] for each in data(job, type="logprob_block", step=STEPS)} == {"answer", "hedge"}
    assert last["tag"] == "training"


def test_logprob_tracking(reader: Reader) -> None:
    """The habit is learned, the facts far less; each measurement has a file; the plot is drawn."""
    done = reader.runs("logprob_tracking.py", "--local")
    gains = {}
    for name in ("fact", "habit"):
        before, after = done.figures(name)
        gains[name] = (after - before) / -before
    assert gains["habit"] > gains["fact"] + 0.2
    [job] = done.jobs
    steps = [0, *range(1, 10), *range(10, STEPS + 1, 10)]
    assert [each["step"] for each in data(job, type="logprobs", tag="plain")] == steps
    assert all(event["file"] for event in job.events() if event["data"].get("tag") in ("plain", "tagged"))
    assert reader.output("logprob_tracking.png").read_bytes().startswith(b"\x89PNG")


def test_sampling(reader: Reader) -> None:
    """The answer to a question changes while the model trains."""
    done = reader.runs("sampling.py", "--local")
    answers = re.findall(r"^  step +(\d+): (.*)$", done.said, re.MULTILINE)
    assert [int(step) for step, _ in answers] == list(range(0, STEPS + 1, 10))
    assert answers[0][1] != answers[-1][1]
    [job] = done.jobs
    files = [event["file"] for event in job.events() if event["data"].get("type") == "samples"]
    assert [len(reader.ow.files.content(file or "").splitlines()) for file in files] == [4] * 7


def test_qlora(reader: Reader) -> None:
    """Here without the quantization, which needs a GPU; the rest is as there."""
    done = reader.runs("qlora_70b.py", "--local")
    [job] = done.jobs
    assert job.params["validated_params"]["load_in_4bit"] is False
    assert job.params["validated_params"]["save_minutes"] == 20
    assert "GPU memory: none" in done.said
    assert reader.output("qlora_70b/adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_gpu_would_be_given_is_valid(
    reader: Reader, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, data files and hardware are accepted; nothing is submitted."""
    monkeypatch.syspath_prepend(str(COOKBOOK))
    for module in ("program", *PROGRAMS):
        monkeypatch.delitem(sys.modules, module, raising=False)
    program = importlib.import_module(name)
    further = {"model": "Qwen/Qwen3-4B-Instruct-2507"} if name == "dpo" else {}
    kind = WEIGHTED_SFT if name == "weighted_sft" else FINE_TUNING
    request = prepare(reader.ow._session, kind, program.parameters(local=False, **further)).request
    row = request.row(organization_id=reader.ow._session.settings.organization_id, default_image="image")
    assert row["requires_vram_gb"] <= (80 if name == "qlora_70b" else 24)
    assert row["model"] == request.params["model"]
