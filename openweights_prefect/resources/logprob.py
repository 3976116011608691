"""`ow.logprob`: measure how likely a model finds conversations."""

from __future__ import annotations

from typing import Any

from openweights_prefect.jobs.request import LOGPROB
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.jobs import StoredJobs
from openweights_prefect.resources.training import create


class Logprob(StoredJobs):
    """Jobs that measure log-probabilities."""

    def create(self, **parameters: Any) -> Job:
        """Submit a job: the fields of `LogprobParams`, and the options of every job.

        It leaves a file with the log-probability of each token, and of each tagged block. `model` and
        `dataset` are as with `ow.fine_tuning.create`.
        """
        return create(self._session, LOGPROB, parameters)
