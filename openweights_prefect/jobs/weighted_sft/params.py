"""The parameters of a weighted fine-tuning job."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from openweights_prefect.jobs.naming import RepositoryName
from openweights_prefect.jobs.training.params import SamplingCallback, Steps, TrainingParams

_LOGARITHMIC = "`log` is at steps 1, 2, ... 9, 10, 20, ... 100, 200."


class WeightedSamplingCallback(SamplingCallback):
    """Sample answers to a dataset while training, less and less often."""

    eval_steps: Steps | Literal["log"] = Field(
        "log", description=f"Sample every this many steps; {_LOGARITHMIC}"
    )


class WeightedSftParams(TrainingParams):
    """Parameters of `ow.weighted_sft.create`."""

    loss: Literal["sft"] = Field("sft", description="Training method.")
    optim: Literal["adamw_8bit", "adamw", "adamw_torch", "adam", "sgd"] = Field(
        "adamw_torch", description="Optimizer; `adamw_8bit` becomes `adamw_torch` where there is no GPU."
    )
    eval_every_n_steps: Steps | Literal["log"] = Field(
        "log", description=f"Evaluate, and run the callbacks, every so many steps; {_LOGARITHMIC}"
    )
    sampling_callbacks: list[WeightedSamplingCallback] | None = Field(
        None, max_length=100, description="Sample answers while training."
    )
    ft_id_suffix: str | None = Field(
        None, pattern=r"^[\w.-]{1,64}$", description="End of the Hugging Face id, after a hyphen."
    )

    def repository(self, model: str) -> RepositoryName | None:
        """The name to push to, `ft_id_suffix` included."""
        name = super().repository(model)
        if name is None or self.ft_id_suffix is None:
            return name
        return replace(name, template=f"{name.template}-{self.ft_id_suffix}")
