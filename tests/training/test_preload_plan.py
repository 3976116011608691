"""What a pod imports ahead, less beside a GPU than without one; and that it never forks with CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openweights_prefect.jobs import preloading

SCRIPT = """
import sys, torch
torch.cuda.is_available = lambda: True
from openweights_prefect.jobs import preloading
preloading.preload()
names = ("torch", "unsloth", "transformers", "trl", "peft", "huggingface_hub")
print([name for name in names if name in sys.modules])
"""


def test_nothing_comes_before_unsloth(tmp_path: Path) -> None:
    """Where it will be used, only torch and what it does not patch is imported."""
    (tmp_path / "unsloth.py").write_text("raise SystemExit('this would start CUDA')")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "['torch']\n", done.stderr


def test_a_process_that_used_the_gpu_does_not_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says before the fork, and after it."""
    assert preloading.why_not_fork() is None
    for name in ("is_initialized", "_is_in_bad_fork"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, name, lambda: True)
            assert preloading.why_not_fork() == "a library has used the GPU"


def test_a_device_that_another_library_opened_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not know of it."""
    device = tmp_path / "nvidia-uvm"
    device.touch()
    monkeypatch.setattr(preloading, "_CUDA_DEVICE", os.path.realpath(device))
    assert preloading.why_not_fork() is None
    with device.open("rb"):
        assert preloading.why_not_fork() == "a library has used the GPU"
