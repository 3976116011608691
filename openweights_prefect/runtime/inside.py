"""`OpenWeights` inside a job: speaks to the pod's agent, needs no token, no network and no library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from openweights_prefect.runtime import spool, wire
from openweights_prefect.types.canonical import decode_event


class OpenWeights:
    """The client of a running job: `run`, `files` and `events`, within the rights of that job."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.run = CurrentRun()
        self.files = RunFiles()
        self.events = RunEvents(self.run.job_id)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"`ow.{name}` is not available inside a job; `ow.run`, `ow.files` and `ow.events` are."
        )

    def __enter__(self) -> OpenWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.flush()


class CurrentRun:
    """The run that this process belongs to."""

    def __init__(self) -> None:
        self.id = os.environ[wire.RUN_VARIABLE]
        self.job_id = os.environ[wire.JOB_VARIABLE]
        self._spool = os.environ[wire.SPOOL_VARIABLE]

    def log(
        self,
        data: Mapping[str, Any],
        file: BinaryIO | str | os.PathLike[str] | None = None,
        *,
        purpose: str = "event",
    ) -> None:
        """Log one event and return at once; with `file`, upload that first and tie it to the event.

        The event's `file` is then the id of that file, which begins with `purpose`.
        """
        if file is None:
            spool.append(self._spool, data)
            return
        file_id = str(_upload(file, purpose=purpose, name=None)["id"])
        spool.append(self._spool, {"file": file_id, **data}, file=file_id)

    def upload(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Upload a file of the run now; logs `{path, file}` and returns the file id."""
        target = name or Path(path).name
        file_id = str(_upload(path, purpose="result", name=target)["id"])
        self.list_file(target, file_id)
        return file_id

    def list_file(self, name: str, file_id: str) -> None:
        """Log `{path, file}` for a file that is stored already, such as one of several that go together."""
        spool.append(self._spool, {"path": name, "file": file_id}, file=file_id)

    def flush(self) -> None:
        """Return when everything that was logged is stored in the ledger."""
        spool.settle()
        wire.request("flush")


class RunFiles:
    """Files, through the agent."""

    def upload(
        self, path: str | os.PathLike[str], purpose: str = "result", *, name: str | None = None
    ) -> dict[str, Any]:
        """Upload a file; answers as outside a job."""
        return _upload(path, purpose=purpose, name=name)

    def create(self, file: BinaryIO, purpose: str = "result") -> dict[str, Any]:
        """Upload an open binary file."""
        return _upload(file, purpose=purpose, name=None)

    def content(self, file_id: str) -> bytes:
        """The bytes of a file that the job may read."""
        return Path(wire.request("fetch", id=file_id)["path"]).read_bytes()

    def download(self, file_id: str, target: str | os.PathLike[str]) -> Path:
        """Write a file that the job may read to `target`, whatever its size, and return that path.

        The agent has compared the content with the file's id.
        """
        fetched, path = Path(wire.request("fetch", id=file_id)["path"]), Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(fetched, path)
        return path

    def get_by_id(self, file_id: str) -> dict[str, Any]:
        """What the ledger knows of a file that the job may read."""
        return dict(wire.request("get_file", id=file_id)["file"])


class RunEvents:
    """The events of this job, through the agent."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id

    def list(self, job_id: str | None = None, run_id: str | None = None) -> list[dict[str, Any]]:
        """All events of this job, oldest first; of other jobs a job may read nothing."""
        if job_id not in (None, self._job_id):
            raise wire.AgentError(f"A job may only read its own events: {job_id!r} is not {self._job_id!r}.")
        wire.request("flush")
        events = wire.request("events", run_id=run_id)["events"]
        return [{**event, "data": decode_event(event["data"])} for event in events]


def _upload(source: BinaryIO | str | os.PathLike[str], *, purpose: str, name: str | None) -> dict[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).absolute()
        return dict(wire.request("upload", path=str(path), purpose=purpose, name=name or path.name)["file"])
    # An open file may have no name on disk: its bytes go through a file beside the spool.
    copy = Path(os.environ[wire.SPOOL_VARIABLE]).parent / f"upload-{os.getpid()}-{id(source)}"
    try:
        with copy.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
        shown = name or Path(str(getattr(source, "name", "file"))).name
        return dict(wire.request("upload", path=str(copy), purpose=purpose, name=shown)["file"])
    finally:
        copy.unlink(missing_ok=True)
