"""What the programs of this folder share: `--local`, the tiny model that it takes, the job environment."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openweights_prefect.errors import ConfigurationError, OpenWeightsError
from openweights_prefect.settings import Settings

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
OUTPUT = Path("cookbook-output")
TINY_MODEL = "./tiny-model"

QWEN_4B: dict[str, Any] = {
    "model": "Qwen/Qwen3-4B-Instruct-2507",
    "epochs": 5,
    "r": 16,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_seq_length": 512,
}
"""Parameters for a model that one card of 24 GB trains in minutes."""
TINY: dict[str, Any] = {
    **QWEN_4B,
    "model": TINY_MODEL,
    "epochs": 20,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 8,
}
"""The same for a random model of two layers, which learns in seconds to babble like the data."""


def run(main: Callable[[bool], None], doc: str | None) -> None:
    """Run the `main` of a program with what its command line says about `--local`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", action="store_true", help="on this machine, with a tiny random model")
    local: bool = parser.parse_args().local
    OUTPUT.mkdir(exist_ok=True)
    try:
        if local:
            in_job_environment("models.py", "tiny", TINY_MODEL)
        main(local)
    except OpenWeightsError as exc:
        raise SystemExit(f"error: {exc}") from None


def in_job_environment(script: str, *arguments: str, text: str | None = None) -> str:
    """Run a script of this folder with the interpreter that has torch, and return what it printed."""
    python = Settings.load().job_python
    if not python:
        raise ConfigurationError(
            "OW_JOB_PYTHON is not set: no job environment is known. Run `make quickstart`."
        )
    command = [python, str(HERE / script), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OpenWeightsError(f"{script!r} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def one_line(text: str) -> str:
    """The start of an answer, on one line."""
    return " ".join(text.split())[:160]
