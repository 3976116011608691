"""The parameters of a job that measures log-probabilities."""

from __future__ import annotations

from pydantic import Field, field_validator

from openweights_prefect.jobs.training.params import ModelParams, also, checked_file


class LogprobParams(ModelParams):
    """Parameters of `ow.logprob.create`."""

    dataset: str = Field(description="File id of the conversations.")
    batch_size: int = Field(8, ge=1, le=4096, description="Conversations per forward pass.")
    max_seq_length: int | None = Field(
        None,
        ge=8,
        le=1_048_576,
        validation_alias=also("max_seq_length", "max_length"),
        description="Longer conversations are cut to so many tokens; by default none is cut.",
    )

    @field_validator("dataset")
    @classmethod
    def _conversations(cls, value: str) -> str:
        return checked_file(value, "conversations", "log-probabilities")
