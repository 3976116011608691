"""Which cards a pod takes work with: their number, memory and errors, and whether they compute."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.pod import gpu_check
from openweights_prefect.pod.gpu_check import (
    Card,
    GpuListFailed,
    GpuNeeds,
    check_gpus,
    names_gpu_error,
    parse_cards,
    why_unusable,
)

A100 = Card(0, "NVIDIA A100-SXM4-80GB", 81920, 4)
TWO = GpuNeeds(2, 80)


class Tools:
    """A folder on the path with an `nvidia-smi` and a job interpreter that say what the test wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = str(self.write("job-python", 'echo \'{"torch": true, "cards": 2, "wrong": []}\''))

    def cards(self, *rows: str, ecc: str = "0", code: int = 0) -> None:
        listed = "\\n".join(rows)
        counts = "\\n".join(f"{number}, {ecc}" for number, _ in enumerate(rows))
        body = f'case "$1" in *ecc*) printf "{counts}\\n";; *) printf "{listed}\\n";; esac; exit {code}'
        self.write("nvidia-smi", body)

    def write(self, name: str, body: str) -> Path:
        program = self.folder / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        return program

    def check(self, needs: GpuNeeds = TWO, mode: str = "full") -> str | None:
        return asyncio.run(check_gpus(needs, mode=mode, job_python=self.python))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return Tools(tmp_path)


ROWS = ("0, NVIDIA A100-SXM4-80GB, 81920, 4", "1, NVIDIA A100-SXM4-80GB, 81920, 4")


def test_what_the_worker_says_is_read() -> None:
    """What it does not say is not checked; what is no number names the variable."""
    assert GpuNeeds.of({"OW_GPU_COUNT": "2", "OW_GPU_MEMORY_GB": "80"}) == TWO
    assert GpuNeeds.of({}) == GpuNeeds(None, None)
    with pytest.raises(ConfigurationError, match="OW_GPU_COUNT='two'"):
        GpuNeeds.of({"OW_GPU_COUNT": "two"})


def test_the_drivers_answers_are_read() -> None:
    """A card that counts no memory errors has none."""
    listed = "0, NVIDIA A40, 46068, 1\n1, NVIDIA GeForce RTX 4090, 24564, 12\n"
    cards = parse_cards(listed, "0, 3\n1, [N/A]\n")
    assert cards == [Card(0, "NVIDIA A40", 46068, 1, 3), Card(1, "NVIDIA GeForce RTX 4090", 24564, 12, 0)]
    with pytest.raises(GpuListFailed, match="Unable to determine"):
        parse_cards("Unable to determine the device handle for GPU0")


@pytest.mark.parametrize(
    ("cards", "why"),
    [
        ([A100, A100], None),
        ([A100], "1 GPUs instead of 2"),
        ([A100, A100, A100], "3 GPUs instead of 2"),
        ([A100, A100._replace(memory_mb=40960)], "40960 MB"),
        ([A100, A100._replace(ecc_errors=2)], "2 uncorrected memory errors"),
        ([A100._replace(memory_mb=76000), A100], None),
    ],
)
def test_they_must_be_what_was_paid_for(cards: list[Card], why: str | None) -> None:
    found = why_unusable(cards, TWO)
    assert found is None if why is None else why in (found or "")


def test_every_type_of_the_market_has_enough_memory() -> None:
    """What the driver shows of a card of so many GB by name, with ECC on where it can be."""
    shown = {24: 23028, 48: 46068, 80: 81559, 94: 95830, 141: 143771, 180: 183359, 16: 15360, 32: 32607}
    for memory_gb, memory_mb in shown.items():
        assert why_unusable([A100._replace(memory_mb=memory_mb)], GpuNeeds(1, memory_gb)) is None


def test_good_cards_pass(tools: Tools) -> None:
    tools.cards(*ROWS)
    assert tools.check() is None


def test_cards_that_are_missing(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than bought, none, or no driver at all."""
    tools.cards(ROWS[0])
    assert tools.check() == "1 GPUs instead of 2"
    tools.cards("No devices were found", code=6)
    assert "No devices were found" in (tools.check() or "")
    (tools.folder / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tools.folder))
    assert "`nvidia-smi` is missing" in (tools.check() or "")
    assert tools.check(GpuNeeds(None, None)) is None


def test_memory_errors(tools: Tools) -> None:
    tools.cards(*ROWS, ecc="7")
    assert "7 uncorrected memory errors" in (tools.check() or "")


def test_a_pod_without_cards_needs_no_check(tools: Tools) -> None:
    """Nor does one that was told not to look."""
    tools.cards("broken", code=1)
    assert tools.check(GpuNeeds(0, None)) is None
    assert tools.check(mode="off") is None


def test_a_driver_that_hangs(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check ends in time; the machine is unusable."""
    monkeypatch.setattr(gpu_check, "_LIST_SECONDS", 0.3)
    tools.write("nvidia-smi", "exec sleep 60")
    assert tools.check() == "`nvidia-smi` did not end within 0.3 s."


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ('{"torch": true, "cards": 2, "wrong": []}', None),
        ('{"torch": true, "cards": 0, "wrong": []}', "PyTorch sees 0 of 2 GPUs"),
        ('{"torch": true, "cards": 2, "wrong": [[1, "CUDA error: bad"]]}', "GPU 1: CUDA error: bad"),
        ('{"torch": false}', None),
        ("no json", "computing on the GPUs failed"),
    ],
)
def test_the_cards_must_compute(tools: Tools, answer: str, why: str | None) -> None:
    """In the job environment; one without PyTorch says nothing about them. The inventory does not compute."""
    tools.cards(*ROWS)
    tools.write("job-python", f"echo 'a warning'; echo '{answer}'")
    found = tools.check()
    assert found is None if why is None else why in (found or "")
    assert tools.check(mode="inventory") is None


def test_a_job_interpreter_that_crashes(tools: Tools) -> None:
    tools.cards(*ROWS)
    tools.write("job-python", "echo 'Illegal instruction' >&2; exit 132")
    assert "exited with code 132: Illegal instruction" in (tools.check() or "")


def test_the_program_that_computes_runs_anywhere(tools: Tools) -> None:
    """An interpreter without PyTorch is an answer, not an error."""
    tools.cards(*ROWS)
    tools.python = sys.executable
    assert tools.check() is None


def test_errors_of_a_card_in_a_log(tmp_path: Path) -> None:
    """They make the card suspect; running out of memory does not."""
    log = tmp_path / "log"
    assert not names_gpu_error(log)
    log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB")
    assert not names_gpu_error(log)
    log.write_text("x" * 200_000 + "\nRuntimeError: CUDA error: an illegal memory access was encountered\n")
    assert names_gpu_error(log)
