"""Has a job environment on this machine read the data of a training, as the job would."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openweights_prefect
from openweights_prefect.errors import InvalidParameterError, NotFoundError
from openweights_prefect.files.store import CorruptFileError
from openweights_prefect.jobs.models import is_mounted
from openweights_prefect.jobs.request import JobRequest
from openweights_prefect.resources.session import Session
from openweights_prefect.resources.submission import LocalFile

DATA_FILES = {"training_file": "data/training_file.jsonl", "test_file": "data/test_file.jsonl"}
_READ = ("model", "chat_template", "loss", "max_seq_length", "train_on_responses_only")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from openweights_prefect.jobs.training.preflight import main; main()"
)
_MOST_REMEMBERED = 64
_UNREACHABLE_SECONDS = 600.0
"""For so long a model that could not be reached is not asked for again."""

_answers: dict[str, dict[str, Any]] = {}
_unreachable: dict[tuple[str, str], tuple[float, str]] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """How much trouble is taken."""

    tokenizer_seconds: float
    """Until the tokenizer is loaded."""
    seconds: float
    file_bytes: int | None
    """Larger files are not downloaded for it."""
    asked_for: bool
    """Then local files are validated, too, and a model is tried again that could not be reached before."""


ON_REQUEST = Limits(tokenizer_seconds=30, seconds=1800, file_bytes=None, asked_for=True)
ON_CREATE = Limits(tokenizer_seconds=5, seconds=30, file_bytes=100_000_000, asked_for=False)


class NotPossible(Exception):
    """Why it cannot be looked at, and what would help."""


def ask(
    session: Session, request: JobRequest, local_files: Mapping[str, LocalFile], limits: Limits
) -> dict[str, Any]:
    """Have the job environment read the files as the job would; the same question is asked once."""
    python = _interpreter(session)
    wanted = {target: file for target, file in request.mounts.items() if _is_read(target)}
    question: dict[str, Any] = {
        "kind": request.type,
        "params": {name: request.params[name] for name in _READ},
        "files": {name: target for name, target in DATA_FILES.items() if target in wanted},
    }
    key = json.dumps([python, question, wanted], sort_keys=True)
    place = (python, str(request.params["model"]))
    if known := _remembered(key, place, limits):
        return known
    with tempfile.TemporaryDirectory(prefix="openweights-check-") as folder:
        _lay_out(session, wanted, local_files, Path(folder), limits)
        answer = _run(python, {**question, "patience": limits.tokenizer_seconds}, Path(folder), limits)
    if "unreachable" in answer:
        if not is_mounted(request.mounts):
            with _lock:
                _unreachable[place] = time.monotonic(), str(answer["unreachable"])
        raise NotPossible(str(answer["unreachable"]))
    with _lock:
        if len(_answers) >= _MOST_REMEMBERED:
            _answers.clear()
        _answers[key] = answer
    return answer


def _remembered(key: str, place: tuple[str, str], limits: Limits) -> dict[str, Any] | None:
    """The answer to the same question; raises `NotPossible` while the model is known to be out of reach."""
    with _lock:
        if key in _answers:
            return _answers[key]
        since, why = _unreachable.get(place, (-math.inf, ""))
        if not limits.asked_for and time.monotonic() - since < _UNREACHABLE_SECONDS:
            raise NotPossible(why)
    return None


def _interpreter(session: Session) -> str:
    if session.settings.job_python:
        return session.settings.job_python
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("jinja2"):
        return sys.executable
    raise NotPossible(
        "there is no tokenizer library here. Install it with `pip install 'openweights-prefect[check]'`, or "
        "set OW_JOB_PYTHON to the interpreter of a job environment"
    )


def _is_read(target: str) -> bool:
    """Whether a mount matters: of the model everything but the weights."""
    if target.startswith(("model/", "base/")):
        return Path(target).suffix not in _WEIGHTS
    return target in DATA_FILES.values()


def _lay_out(
    session: Session,
    wanted: Mapping[str, str],
    local_files: Mapping[str, LocalFile],
    folder: Path,
    limits: Limits,
) -> None:
    """Make a job folder without the weights."""
    (folder / "lib").mkdir()
    package = Path(openweights_prefect.__file__).resolve().parent
    (folder / "lib" / package.name).symlink_to(package)
    stored = {target: file for target, file in wanted.items() if target not in local_files}
    if stored:
        _refuse_large(session, set(stored.values()), limits)
    for target, file_id in wanted.items():
        place = folder / "job" / target
        place.parent.mkdir(parents=True, exist_ok=True)
        if target in stored:
            _fetch(session, file_id, place)
        else:
            place.symlink_to(local_files[target].path.expanduser().resolve())


def _fetch(session: Session, file_id: str, place: Path) -> None:
    try:
        session.store.fetch(file_id, session.organization_id, place)
    except (NotFoundError, CorruptFileError) as exc:
        raise NotPossible(str(exc)) from exc


def _refuse_large(session: Session, file_ids: set[str], limits: Limits) -> None:
    rows = session.ledger.call("get_files", ids=sorted(file_ids))
    if missing := file_ids - {row["id"] for row in rows}:
        named = ", ".join(map(repr, sorted(missing)))
        raise InvalidParameterError(
            f"No such file in this organization: {named}. Upload it with `ow.files.upload` and pass its 'id'."
        )
    largest = max(row["bytes"] for row in rows)
    if limits.file_bytes is not None and largest > limits.file_bytes:
        raise NotPossible(
            f"a file of {largest / 1e6:.0f} MB would be downloaded for it. Ask for it with `.check(...)`"
        )


def _run(python: str, question: Mapping[str, Any], folder: Path, limits: Limits) -> dict[str, Any]:
    command = [python, "-P", "-c", _START, str(folder / "lib")]
    try:
        done = subprocess.run(
            command,
            cwd=folder / "job",
            input=json.dumps(question),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotPossible(
            f"it took longer than {limits.seconds:g} s. Ask for it with `.check(...)`"
        ) from None
    except OSError as exc:
        raise NotPossible(f"{python!r} cannot be run ({exc}). Mend OW_JOB_PYTHON") from exc
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise NotPossible(f"{python!r} could not do it: {lines[-1]}") from None
    return answer
