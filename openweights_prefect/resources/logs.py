"""The log of runs, as whole lines."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from openweights_prefect.errors import NotFoundError
from openweights_prefect.resources.patience import Pace, live_pause, patient
from openweights_prefect.resources.session import MAX_ROWS, Session
from openweights_prefect.types.job import FINAL_STATUSES
from openweights_prefect.types.run import RunColumns

_PIECES = 100


class LogReader:
    """Reads the log of one run from where it stopped the last time."""

    def __init__(self, session: Session, run_id: str) -> None:
        self._session = session
        self._run_id = run_id
        self._offset = 0
        self._unfinished = ""

    def new_lines(self) -> Iterator[str]:
        """The lines that are complete by now, without their line ends."""
        while True:
            pieces = self._session.ledger.call(
                "read_log", for_run=self._run_id, after_offset=self._offset, max_rows=_PIECES
            )
            for piece in pieces:
                self._offset = piece["end_offset"]
                yield from self._split(piece["content"])
            if len(pieces) < _PIECES:
                return

    def rest(self, run: RunColumns) -> Iterator[str]:
        """All that is left of a run that has ended; from its log file where the ledger no longer has it."""
        yield from self.new_lines()
        if run.log_file is not None and (self._offset < run.log_bytes or self._offset == 0):
            yield from self._from_file(run.log_file)
        if self._unfinished:
            yield self._unfinished
            self._unfinished = ""

    def _from_file(self, file_id: str) -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="openweights-log-") as folder:
            copy = Path(folder) / "log"
            self._session.store.fetch(file_id, self._session.organization_id, copy)
            with copy.open("rb") as stream:
                stream.seek(self._offset)
                for line in stream:
                    yield from self._split(line.decode(errors="replace"))
                self._offset = stream.tell()

    def _split(self, text: str) -> Iterator[str]:
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            yield line.removesuffix("\r")


def run_lines(session: Session, run_id: str, *, follow: bool = False) -> Iterator[str]:
    """The lines of one run; with `follow`, also those that are still to come."""
    pace = Pace(None, rhythm=live_pause)
    if follow:
        session = patient(session, pace)
    reader = LogReader(session, run_id)
    while True:
        run = read_run(session, run_id)
        if not follow or is_over(run):
            yield from reader.rest(run)
            return
        for line in reader.new_lines():
            pace.news()
            yield line
        pace.pause()


def job_lines(session: Session, job_id: str, *, follow: bool = False) -> Iterator[str]:
    """The lines of the newest run; with `follow`, also those to come and of newer runs, to the end."""
    pace = Pace(None)
    looking = patient(session, pace) if follow else session
    done: int | None = None
    while True:
        # Looked at first: what is final logs nothing more.
        rows = looking.ledger.call("get_job", job_id=job_id)
        if not rows:
            raise NotFoundError(f"No job {job_id!r} in this organization.")
        final = rows[0]["status"] in FINAL_STATUSES
        runs = job_runs(looking, job_id)
        if done is None:
            done = max(0, len(runs) - 1)
        for run in runs[done:]:
            yield from run_lines(session, run.id, follow=follow and not final)
            done += 1
        if final or not follow:
            return
        pace.pause()


def last_lines(session: Session, job_id: str, count: int) -> list[str]:
    """The end of the newest run's log."""
    return list(deque(job_lines(session, job_id), maxlen=count))


def job_runs(session: Session, job_id: str) -> list[RunColumns]:
    """The runs of a job, newest last."""
    rows = session.ledger.call("list_runs", for_job=job_id, max_rows=MAX_ROWS)
    return [RunColumns.from_row(row) for row in rows]


def read_run(session: Session, run_id: str) -> RunColumns:
    """One run; raises `NotFoundError`."""
    rows = session.ledger.call("get_run", run_id=run_id)
    if not rows:
        raise NotFoundError(
            f"No run {run_id!r} in this organization; `ow.runs.list()` shows those that exist."
        )
    return RunColumns.from_row(rows[0])


def is_over(run: RunColumns) -> bool:
    """Say whether the run has ended, in whatever way."""
    return run.status not in ("pending", "in_progress")
