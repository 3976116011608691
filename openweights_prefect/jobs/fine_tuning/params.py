"""The parameters of a fine-tuning job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from openweights_prefect.jobs.training.params import SamplingCallback, TrainingParams, also


class FineTuningParams(TrainingParams):
    """Parameters of `ow.fine_tuning.create`."""

    loss: Literal["sft", "dpo", "orpo"] = Field(description="Training method.")
    model_naming_extra_parameters: dict[str, str] | None = Field(
        None, description="Further values for the placeholders of `finetuned_model_id`."
    )
    beta: float = Field(0.1, gt=0, le=100, description="Strength of the preference losses.")
    packing: bool = Field(
        True, description="Train on several conversations per row, where the GPU supports it."
    )
    test_file_eval_steps: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        validation_alias=also("test_file_eval_steps", "eval_steps"),
        description="Evaluate every so many steps, or after this share of all steps.",
    )
    test_file_eval_strategy: Literal["no", "epoch", "steps"] | None = Field(
        "epoch",
        validation_alias=also("test_file_eval_strategy", "eval_strategy"),
        description="When to evaluate.",
    )
    sampling_callbacks: list[SamplingCallback] | None = Field(
        None, max_length=100, description="Sample answers while training."
    )

    def evaluates(self) -> bool:
        """Whether there will be an `eval_loss`."""
        return self.test_file is not None and self.test_file_eval_strategy not in (None, "no")

    def _placeholders(self, model: str) -> dict[str, str]:
        return super()._placeholders(model) | (self.model_naming_extra_parameters or {})
