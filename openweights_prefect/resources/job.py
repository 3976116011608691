"""A job, and what can be done with it."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from openweights_prefect.errors import (
    BudgetExceeded,
    ConflictError,
    JobFailed,
    LedgerUnavailable,
    NotFoundError,
    WaitTimeout,
)
from openweights_prefect.resources.costs import job_cost
from openweights_prefect.resources.download import download_run
from openweights_prefect.resources.events import Event, latest_values, read_events, run_scope
from openweights_prefect.resources.explanation import explain_job
from openweights_prefect.resources.files import PathLike
from openweights_prefect.resources.logs import job_lines, job_runs, last_lines
from openweights_prefect.resources.patience import Pace, patient, sleep_until_end
from openweights_prefect.resources.runs import Run, column
from openweights_prefect.resources.session import MAX_ROWS, Session
from openweights_prefect.types.explanation import Explanation
from openweights_prefect.types.job import FINAL_STATUSES, JobColumns
from openweights_prefect.types.run import RunColumns

PROGRESS_FIELDS = ("progress", "step", "total", "total_steps", "loss")
"""What a job logs for its progress bar: a share from 0 to 1, or steps; and the loss."""

_LOG_LINES = 20
_CLOUD_API = "https://api.prefect.cloud/api/accounts/"


class Job(JobColumns):
    """A job of the ledger: its columns as attributes or `job["status"]`, as they were when last read."""

    _session: Session

    def __init__(self, session: Session, columns: JobColumns) -> None:
        # Columns are read-only for everybody else.
        vars(self).update(vars(columns), _session=session)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in ("worker_id", "cost", "url") else column(self, JobColumns, name)

    def __repr__(self) -> str:
        return f"Job(id={self.id!r}, type={self.type!r}, status={self.status!r})"

    @property
    def runs(self) -> list[Run]:
        """Its attempts, newest last, read now."""
        return [Run(self._session, columns) for columns in job_runs(self._session, self.id)]

    @property
    def worker_id(self) -> str | None:
        """The pod of the newest run, read now."""
        run = _newest_run(self._session, self.id)
        return run.worker_id if run else None

    @property
    def url(self) -> str | None:
        """The newest run in the Prefect UI, read now; None before there is one."""
        run = _newest_run(self._session, self.id)
        interface = _prefect_interface(self._session.settings.prefect_api_url)
        return f"{interface}/runs/flow-run/{run.id}" if run and interface else None

    @property
    def cost(self) -> float | None:
        """What it has cost in USD until now, its share of its pods' other time included; None before that.

        Read now, like `explain`.
        """
        return job_cost(self._session.ledger, self.id).total_usd or None

    def explain(self) -> Explanation:
        """Why it waits, on what it could run, when it starts and what it costs; `print` shows it."""
        return explain_job(self._session.ledger, self.id)

    def refresh(self) -> Job:
        """Read the columns again, into this object."""
        return self._update(read_job(self._session, self.id))

    def cancel(self) -> Job:
        """Ask it to stop; a waiting job is canceled at once. Raises `ConflictError` when it has finished."""
        return self._update(cancel_job(self._session, self.id))

    def restart(self) -> Job:
        """Run a failed or canceled job again; raises `ConflictError` in other states."""
        return self._update(restart_job(self._session, self.id))

    def events(self) -> list[Event]:
        """All events of all its runs, in order."""
        return list(read_events(self._session, {"for_job": self.id}))

    def logs(self, follow: bool = False) -> Iterator[str]:
        """The lines of its newest run; with `follow`, until the job is final, newer runs included."""
        return job_lines(self._session, self.id, follow=follow)

    def wait(self, timeout: float | None = None, progress: bool = True) -> Job:
        """Block until the job is completed; Ctrl-C stops the waiting, not the job.

        A ledger that does not answer is borne until `timeout` (seconds), without one for five minutes.

        Raises:
            JobFailed: It failed or was canceled; the message has the error and the last log lines.
            WaitTimeout: The time ran out, perhaps in an outage of the ledger; the job goes on.
            LedgerUnavailable: There is no timeout, and the ledger did not answer for five minutes.
        """
        from openweights_prefect.resources.progress import show_progress  # Rich is slow to import.

        pace = Pace(timeout, sleep=sleep_until_end(self._session.ledger, self.id))
        session = patient(self._session, pace)
        activity = _Activity()
        with show_progress(self.id, enabled=progress) as display:
            try:
                while True:
                    self._update(read_job(session, self.id))
                    if display:
                        activity = _activity(session, self, activity)
                        display.update(self, activity.pod, activity.latest)
                    if self.status in FINAL_STATUSES:
                        break
                    if not pace.pause():
                        raise WaitTimeout(
                            f"Job {self.id!r} is {self.status} after {timeout:g} s"
                            f"{_reason(self)}; it goes on. Call `wait` again, or `job.cancel()`."
                        )
            except LedgerUnavailable as exc:
                if timeout is None:
                    raise
                raise WaitTimeout(f"Job {self.id!r} was {self.status} when last seen. {exc}") from exc
            except KeyboardInterrupt as exc:
                text = f"Stopped waiting; job {self.id} goes on. `job.cancel()` stops it."
                exc.add_note(text)
                if display:
                    display.say(text)
                raise
        return _completed(self._session, self)

    def __await__(self) -> Generator[Any, None, Job]:
        """`await job`: as `wait`, without blocking the event loop."""
        return self._wait_async().__await__()

    async def _wait_async(self) -> Job:
        pace = Pace(None)
        session = patient(self._session, pace)
        while True:
            # One short call a thread: a canceled task leaves nothing behind that polls on.
            self._update(await asyncio.to_thread(read_job, session, self.id))
            if self.status in FINAL_STATUSES:
                return await asyncio.to_thread(_completed, self._session, self)
            await asyncio.sleep(pace.next_pause() or 0)

    def download(self, target_dir: PathLike, only_last_run: bool = True) -> list[Path]:
        """Write the files and log of the last run into a folder, or of each run into `<folder>/<run id>`.

        Returns the paths. Contents are checked against their ids; nothing is written outside of the folder.
        """
        folder = Path(target_dir).expanduser()
        runs = job_runs(self._session, self.id)
        if only_last_run:
            return [path for run in runs[-1:] for path in download_run(self._session, run, folder)]
        return [path for run in runs for path in download_run(self._session, run, folder / run.id)]

    def _update(self, columns: JobColumns) -> Job:
        vars(self).update(vars(columns))
        return self


def read_job(session: Session, job_id: str) -> JobColumns:
    """One job; raises `NotFoundError`."""
    rows = session.ledger.call("get_job", job_id=job_id)
    if not rows:
        raise _no_job(job_id)
    return JobColumns.from_row(rows[0])


def cancel_job(session: Session, job_id: str) -> JobColumns:
    """Ask a job to stop; raises `ConflictError` when it has finished."""
    [answer] = session.ledger.call("cancel_job", job_id=job_id)
    return _changed(answer, job_id, "canceled", "only a pending or running job can be.")


def restart_job(session: Session, job_id: str) -> JobColumns:
    """Put a failed or canceled job back to pending.

    Raises `ConflictError` in other states, and when files of the job were deleted.
    """
    [answer] = session.ledger.call("restart_job", job_id=job_id)
    if answer["outcome"] == "missing_files":
        raise ConflictError(
            f"Job {job_id!r} cannot be restarted: its files {', '.join(answer['missing'])} were deleted. "
            "Submit it again; local files are uploaded then."
        )
    if answer["outcome"] == "limit":
        raise spent(job_id)
    return _changed(answer, job_id, "restarted", "only a failed or canceled job can be.")


def spent(job_id: str) -> BudgetExceeded:
    """The error for a job that a token cannot pay for."""
    return BudgetExceeded(
        f"Job {job_id!r} was not started: the token has used up its spending limit. An admin raises it with "
        "`ow token limit` or `ow.tokens.set_limit`."
    )


def _changed(answer: Mapping[str, Any], job_id: str, change: str, condition: str) -> JobColumns:
    if answer["outcome"] == "not_found":
        raise _no_job(job_id)
    columns = JobColumns.from_row(answer["job"])
    if answer["outcome"] == "refused":
        raise ConflictError(f"Job {job_id!r} is {columns.status} and cannot be {change}; {condition}")
    return columns


def _no_job(job_id: str) -> NotFoundError:
    return NotFoundError(f"No job {job_id!r} in this organization; `ow.jobs.list()` shows those that exist.")


def _completed(session: Session, job: Job) -> Job:
    if job.status == "completed":
        return job
    lines = last_lines(session, job.id, _LOG_LINES)
    log = (
        "\n".join(["The end of its log:", *(f"  {line}" for line in lines)])
        if lines
        else "It logged nothing."
    )
    reason = f": {job.error}" if job.error else ""
    raise JobFailed(f"Job {job.id!r} {'was ' if job.status == 'canceled' else ''}{job.status}{reason}\n{log}")


class _Activity(NamedTuple):
    """What the running attempt does."""

    worker_id: str | None = None
    pod: str | None = None
    """Its pod with the hardware."""
    latest: Mapping[str, Any] = {}
    """What it last said of its progress."""


def _activity(session: Session, job: JobColumns, before: _Activity) -> _Activity:
    run = _newest_run(session, job.id) if job.status != "pending" else None
    if run is None:
        return _Activity()
    latest = latest_values(session, run_scope(run.id), PROGRESS_FIELDS)
    pod = before.pod if run.worker_id == before.worker_id else _pod(session, run.worker_id)
    return _Activity(run.worker_id, pod, latest)


def _pod(session: Session, worker_id: str | None) -> str | None:
    rows = session.ledger.call("list_workers", max_rows=MAX_ROWS)
    return next((f"{worker_id} ({row['hardware']})" for row in rows if row["id"] == worker_id), worker_id)


def _newest_run(session: Session, job_id: str) -> RunColumns | None:
    rows = session.ledger.call("list_runs", for_job=job_id, max_rows=1)
    return RunColumns.from_row(rows[0]) if rows else None


def _reason(job: JobColumns) -> str:
    return f" ({job.pending_reason})" if job.status == "pending" and job.pending_reason else ""


def _prefect_interface(api_url: str) -> str:
    """Address of the pages that belong to an API: a server's own, or those of Prefect Cloud."""
    if api_url.startswith(_CLOUD_API):
        path = api_url.removeprefix(_CLOUD_API).strip("/").replace("/workspaces/", "/workspace/")
        return f"https://app.prefect.cloud/account/{path}"
    return api_url.rstrip("/").removesuffix("/api")
