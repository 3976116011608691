"""One thread and no network; runs in the job environment, without the suite's other fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model and its tokenizer."""
    from tests.training.tiny import make_folder  # Importing torch takes seconds.

    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def workdir(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job folder with the tiny model under `model`, and this process in it."""
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "uploads").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path
