"""`ow.weighted_sft`: train a model on conversations whose parts have weights."""

from __future__ import annotations

from typing import Any

from openweights_prefect.jobs.request import WEIGHTED_SFT
from openweights_prefect.resources.check_report import CheckReport
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.jobs import StoredJobs
from openweights_prefect.resources.training import check, create


class WeightedSft(StoredJobs):
    """Fine-tuning jobs whose loss weighs the blocks of the messages."""

    def create(self, *, check: bool = True, **parameters: Any) -> Job:
        """Submit a job: the fields of `WeightedSftParams`, and the options of every job.

        A message's `content` may be a list of blocks, each with `text` and perhaps a `weight` (1 without it,
        negative to make the text less likely) and a `tag`. Files, models, results and
        `check` are as with `ow.fine_tuning.create`.
        """
        return create(self._session, WEIGHTED_SFT, parameters, check=check)

    def check(self, **parameters: Any) -> CheckReport:
        """Look at the data with the model's tokenizer, and estimate memory and cost; submits nothing.

        Takes what `create` takes. `print` what it returns, or show it in a notebook; `ok`, `errors` and
        `warnings` are for programs. A bad parameter is raised, as by `create`.
        """
        return check(self._session, WEIGHTED_SFT, parameters)
