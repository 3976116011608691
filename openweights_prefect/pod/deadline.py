"""When this pod ends at the latest: an absolute time, so that no restart of the container moves it."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from openweights_prefect.errors import ConfigurationError

VARIABLE = "OW_DEADLINE_AT"
_WORTH_WRITING_SECONDS = 1.0


class Deadline:
    """The pod's deadline: what it was created with, until the ledger's newer word is written down.

    The file is what the agent last heard. When the agent is dead, that holds; when the disk is wiped, the
    environment's does, which may be earlier, never later than what was paid for.
    """

    def __init__(self, file: Path, at_creation: float) -> None:
        self._file = file
        self._at_creation = at_creation

    @classmethod
    def of_pod(cls, folder: Path, environment: Mapping[str, str]) -> Deadline:
        """The deadline of the pod in this folder; raises `ConfigurationError` for one that is no time."""
        text = environment.get(VARIABLE)
        try:
            return cls(folder / "deadline", float(text) if text else math.inf)
        except ValueError as exc:
            raise ConfigurationError(
                f"{VARIABLE}={text!r} is no time in seconds since 1970; the worker sets it."
            ) from exc

    def seconds_left(self) -> float:
        """Until the newest deadline that is known here; negative when it has passed."""
        return self._newest() - time.time()

    def heard(self, seconds_left: float) -> None:
        """Write down what the ledger says; whoever reads meanwhile sees the old or the new one, whole."""
        at = time.time() + seconds_left
        if abs(at - self._newest()) < _WORTH_WRITING_SECONDS:
            return
        unfinished = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        unfinished.write_text(repr(at), encoding="utf-8")
        unfinished.replace(self._file)

    def _newest(self) -> float:
        with contextlib.suppress(OSError, ValueError):
            at = float(self._file.read_text(encoding="utf-8"))
            if math.isfinite(at):
                return at
        return self._at_creation
