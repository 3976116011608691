"""`ow.jobs`: the jobs of the organization."""

from __future__ import annotations

from typing import Any

from openweights_prefect.resources.job import Job, cancel_job, read_job, restart_job
from openweights_prefect.resources.session import MAX_ROWS, Session, check_choice, check_limit
from openweights_prefect.types.canonical import canonical_json
from openweights_prefect.types.job import JOB_STATUSES, JobColumns


class StoredJobs:
    """Look up jobs of any type, cancel and restart them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, **params: Any) -> list[Job]:
        """All jobs with these parameter values at any depth, newest first; a dict matches a larger one."""
        canonical_json(params, name="find")
        jobs: list[Job] = []
        while True:
            after = jobs[-1].id if jobs else None
            rows = self._session.ledger.call("find_jobs", wanted=params, max_rows=MAX_ROWS, after_id=after)
            jobs += [Job(self._session, JobColumns.from_row(row)) for row in rows]
            if len(rows) < MAX_ROWS:
                return jobs

    def list(
        self, limit: int = 10, status: str | None = None, type: str | None = None, after: str | None = None
    ) -> list[Job]:
        """The newest jobs first; `after` goes on behind that job id."""
        rows = self._session.ledger.call(
            "list_jobs",
            with_status=check_choice("status", status, JOB_STATUSES),
            with_type=type,
            max_rows=check_limit(limit),
            after_id=after,
        )
        return [Job(self._session, JobColumns.from_row(row)) for row in rows]

    def retrieve(self, job_id: str) -> Job:
        """One job; raises `NotFoundError`."""
        return Job(self._session, read_job(self._session, job_id))

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; raises `ConflictError` when it has finished."""
        return Job(self._session, cancel_job(self._session, job_id))

    def restart(self, job_id: str) -> Job:
        """Run a failed or canceled job again; raises `ConflictError` in other states."""
        return Job(self._session, restart_job(self._session, job_id))
