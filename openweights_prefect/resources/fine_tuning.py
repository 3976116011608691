"""`ow.fine_tuning`: train a model on conversations or preferences."""

from __future__ import annotations

from typing import Any

from openweights_prefect.jobs.request import FINE_TUNING
from openweights_prefect.resources.check_report import CheckReport
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.jobs import StoredJobs
from openweights_prefect.resources.training import check, create


class FineTuning(StoredJobs):
    """Fine-tuning jobs."""

    def create(self, *, check: bool = True, **parameters: Any) -> Job:
        """Submit a fine-tuning job: the fields of `FineTuningParams`, and the options of every job.

        Data files are file ids or local files. `model` is a Hugging Face id, a local folder, or the id of a
        finished job, whose adapter is trained further. What is local is uploaded if it is not stored yet.
        GPU memory is estimated unless `requires_vram_gb` or `allowed_hardware` is given. Submitting the same
        job again gives the job that exists.

        The result is kept with the job, for `job.download` and as the `model` of further jobs. It is pushed
        to Hugging Face only with `finetuned_model_id`, `hf_org` or `push=True`, and with the organization's
        secret `HF_TOKEN`.

        A job that is new is checked first, as `check` does it: what would make the training meaningless is
        raised before anything is bought. Where that is not possible here within seconds, the job is
        submitted all the same; `check=False` leaves it out.
        """
        return create(self._session, FINE_TUNING, parameters, check=check)

    def check(self, **parameters: Any) -> CheckReport:
        """Look at the data with the model's tokenizer, and estimate memory and cost; submits nothing.

        Takes what `create` takes. `print` what it returns, or show it in a notebook; `ok`, `errors` and
        `warnings` are for programs. A bad parameter is raised, as by `create`.
        """
        return check(self._session, FINE_TUNING, parameters)
