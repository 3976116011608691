"""`ow.runs`: attempts to execute jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openweights_prefect.resources.download import download_run
from openweights_prefect.resources.events import Event, read_events, run_scope
from openweights_prefect.resources.files import PathLike
from openweights_prefect.resources.logs import read_run, run_lines
from openweights_prefect.resources.session import Session, check_choice, check_limit
from openweights_prefect.types.run import RUN_STATUSES, RunColumns


class Run(RunColumns):
    """One attempt to execute a job, on one pod; as it was when it was read."""

    _session: Session

    def __init__(self, session: Session, columns: RunColumns) -> None:
        # Columns are read-only for everybody else.
        vars(self).update(vars(columns), _session=session)

    def __getitem__(self, name: str) -> Any:
        return column(self, RunColumns, name)

    def __repr__(self) -> str:
        return f"Run(id={self.id!r}, job_id={self.job_id!r}, attempt={self.attempt}, status={self.status!r})"

    @property
    def events(self) -> list[Event]:
        """All events of the run, read now."""
        return list(read_events(self._session, run_scope(self.id)))

    def refresh(self) -> Run:
        """Read the columns again, into this object."""
        vars(self).update(vars(read_run(self._session, self.id)))
        return self

    def logs(self, follow: bool = False) -> Iterator[str]:
        """The lines of its log; with `follow`, until the run has ended."""
        return run_lines(self._session, self.id, follow=follow)

    def download(self, target_dir: PathLike) -> list[Path]:
        """Write its files and its log (`<run id>.log`) into a folder; returns their paths."""
        return download_run(self._session, self.refresh(), Path(target_dir).expanduser())


class Runs:
    """The runs of the organization."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def retrieve(self, run_id: str) -> Run:
        """One run; raises `NotFoundError`."""
        return Run(self._session, read_run(self._session, run_scope(run_id)["for_run"]))

    def list(
        self,
        job_id: str | None = None,
        worker_id: str | None = None,
        status: str | None = None,
        limit: int = 100,
    ) -> list[Run]:
        """The newest `limit` runs, newest last."""
        rows = self._session.ledger.call(
            "list_runs",
            for_job=job_id,
            for_worker=worker_id,
            with_status=check_choice("status", status, RUN_STATUSES),
            max_rows=check_limit(limit),
        )
        return [Run(self._session, RunColumns.from_row(row)) for row in rows]


def column(row: object, columns: type, name: str) -> Any:
    """`row[name]`, for scripts that treat rows as dicts."""
    if name not in columns.__dataclass_fields__:  # type: ignore[attr-defined]  # every caller passes a dataclass
        raise KeyError(name)
    return getattr(row, name)
