"""What the parameters of the jobs on language models share: names, defaults and ranges."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from openweights_prefect.jobs.naming import DEFAULT_TEMPLATE, RepositoryName
from openweights_prefect.jobs.options import field_names

_FILE_ID = re.compile(r"(?P<purpose>[\w-]+):file-[0-9a-f]{12}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+(/checkpoint-\d+)?)?")
_JOB_ID = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{12}(-[\w.-]+)?")
_STAND_IN = f"job-{'0' * 12}"

JsonObject = dict[str, Any]
Name = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Steps = Annotated[int, Field(ge=1, le=100_000_000)]


def also(name: str, *others: str) -> AliasChoices:
    """A field that TRL or PEFT calls something else is given by either name, and stored under ours."""
    return AliasChoices(name, *others)


def _in_order(schema: JsonObject) -> None:
    """Number the fields: Prefect's form shows them by `position`, for its database forgets their order."""
    for position, field in enumerate(schema["properties"].values()):
        field["position"] = position


class Strict(BaseModel):
    """Parameters whose names are checked, with the nearest known one in the error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=_in_order)

    @model_validator(mode="before")
    @classmethod
    def _known_names_only(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = field_names(cls)
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
                raise ValueError(f"Unknown parameter {name!r}. {hint}")
        for field in cls.model_fields.values():
            aliases = field.validation_alias
            names = aliases.choices if isinstance(aliases, AliasChoices) else []
            if len(twice := [name for name in names if name in values]) > 1:
                raise ValueError(f"{' and '.join(map(repr, twice))} are one parameter; give one of them.")
        return values


class SamplingCallback(Strict):
    """Sample answers to a dataset while training."""

    dataset: Name = Field(description="File id of the prompts.")
    eval_steps: Steps | Literal["log"] = Field(
        10, description="Sample every this many steps; `log` is at steps 1, 2, ... 9, 10, 20, ... 100, 200."
    )
    batch_size: int = Field(8, ge=1, le=4096, description="Prompts answered at once.")
    tag: Name = Field("samples", description="Tag of the events.")
    temperature: float = Field(0, ge=0, le=10, description="Sampling temperature; 0 is greedy.")
    max_tokens: int = Field(600, ge=1, le=1_000_000, description="Longest answer in tokens.")

    @field_validator("dataset")
    @classmethod
    def _conversations(cls, value: str) -> str:
        return checked_file(value, "conversations", "sampling")


class ModelParams(Strict):
    """A model, and how it is loaded."""

    model: Name = Field(
        description="Hugging Face id (`org/name`, `org/name/checkpoint-10`), job id or local folder."
    )
    chat_template: str = Field(
        "default", min_length=1, description="Jinja chat template; `default` is the model's own."
    )
    load_in_4bit: bool = Field(False, description="Load the base model quantized to 4 bits; needs a GPU.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format; `auto` is bfloat16 where the GPU has it, float32 on a CPU."
    )

    @field_validator("model")
    @classmethod
    def _model_is_named(cls, value: str) -> str:
        is_path = value.startswith(("./", "/", "~/"))
        if (not is_path and not _HUB_ID.fullmatch(value)) or ".." in PurePosixPath(value).parts:
            raise ValueError(
                f"{value!r} is not a model. Give a Hugging Face id ('org/name', 'org/name/checkpoint-10'), "
                "a job id, or a local folder that starts with './' or '/'."
            )
        return value


class TrainingParams(ModelParams):
    """Parameters that `ow.fine_tuning.create` and `ow.weighted_sft.create` share."""

    loss: str = Field(description="Training method.")
    training_file: str = Field(description="File id of the conversations, or preferences, to train on.")
    test_file: str | None = Field(None, description="File id of further ones, to evaluate on.")
    finetuned_model_id: Name | None = Field(
        None,
        description=(
            "Hugging Face id to push to, in which `{job_id}`, `{model_name}`, `{org_id}` (`hf_org`) and the "
            "names of parameters in braces are filled in; none keeps the result here."
        ),
    )
    hf_org: str | None = Field(
        None,
        pattern=r"^\w[\w.-]{0,95}$",
        description="User or organization of Hugging Face to push to, unless `finetuned_model_id` names one.",
    )
    push: bool | None = Field(
        None,
        description="Push to Hugging Face; by default when `finetuned_model_id` or `hf_org` is given.",
    )
    merge_before_push: bool = Field(True, description="Push the merged model instead of the adapter.")
    push_to_private: bool = Field(True, description="Push to a private repository.")
    job_id_suffix: str | None = Field(
        None, pattern=r"^[\w-]{1,64}$", description="Readable end of the job id."
    )
    max_seq_length: int = Field(
        2048,
        ge=8,
        le=1_048_576,
        validation_alias=also("max_seq_length", "max_length"),
        description="Longer conversations are cut to so many tokens.",
    )
    is_peft: bool = Field(
        True,
        validation_alias=also("is_peft", "use_peft"),
        description="Train a LoRA adapter; false trains all weights.",
    )
    target_modules: list[Name] | None = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        validation_alias=also("target_modules", "lora_target_modules"),
        description="Layers that get a LoRA adapter; none leaves the choice to PEFT.",
    )
    lora_bias: Literal["all", "none"] = Field("none", description="Which biases are trained.")
    r: int = Field(16, ge=1, le=1024, validation_alias=also("r", "lora_r"), description="LoRA rank.")
    lora_alpha: int = Field(16, ge=1, le=8192, description="LoRA scaling.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout.")
    use_rslora: bool = Field(True, description="Scale by the square root of the rank (rank-stabilized LoRA).")
    epochs: int = Field(
        1,
        ge=1,
        le=10_000,
        validation_alias=also("epochs", "num_train_epochs"),
        description="Passes over the training file.",
    )
    max_steps: Steps | None = Field(None, description="Stop after so many steps, whatever `epochs` is.")
    per_device_train_batch_size: int = Field(2, ge=1, le=4096, description="Conversations per forward pass.")
    gradient_accumulation_steps: int = Field(8, ge=1, le=65_536, description="Forward passes per step.")
    warmup_steps: int = Field(5, ge=0, le=10_000_000, description="Steps until the full learning rate.")
    learning_rate: float | str = Field(
        1e-4, description="Number such as 1e-4, or a negative exponent: -4 is 1e-4."
    )
    optim: Literal["adamw_8bit", "adamw", "adamw_torch", "adam", "sgd"] = Field(
        "adamw_8bit", description="Optimizer; `adamw_8bit` becomes `adamw_torch` where there is no GPU."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="Weight decay.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = Field("linear", description="Course of the learning rate.")
    seed: int = Field(3407, ge=0, lt=2**32, description="Random seed.")
    deterministic: bool = Field(
        False,
        validation_alias=also("deterministic", "full_determinism"),
        description="Use only deterministic algorithms, which are slower.",
    )
    train_on_responses_only: bool = Field(
        True,
        validation_alias=also("train_on_responses_only", "assistant_only_loss"),
        description="Take the loss on the assistant's messages only.",
    )
    logging_steps: int = Field(1, ge=1, le=1_000_000, description="Log the loss every so many steps.")
    eval_batch_size: int = Field(
        8,
        ge=1,
        le=4096,
        validation_alias=also("eval_batch_size", "per_device_eval_batch_size"),
        description="Conversations per forward pass of an evaluation.",
    )
    eval_every_n_steps: Steps | Literal["log"] = Field(
        5000, description="Run the callbacks every so many steps; `log` is at 1, 2, ... 9, 10, 20, ... 100."
    )
    logp_callback_datasets: dict[Name, str] = Field(
        {}, max_length=100, description="Name -> file id, to track log-probabilities of."
    )
    save_steps: Steps = Field(5000, description="Store a checkpoint every so many steps.")
    save_minutes: float | None = Field(
        None, gt=0, le=10_080, description="Store a checkpoint at least every so many minutes, too."
    )
    save_total_limit: int = Field(2, ge=1, le=100, description="Checkpoints that are kept: the newest.")
    keep_best: bool = Field(False, description="Keep the checkpoint with the lowest `eval_loss`, too.")
    resume: bool = Field(True, description="Go on from the newest checkpoint when a pod was lost.")
    output_dir: str = Field("./tmp", description="Folder for checkpoints, inside the job folder.")
    wandb_project: Name | None = Field(
        None, description="Project of Weights & Biases, used when `WANDB_API_KEY` is among the `secrets`."
    )
    meta: JsonObject | None = Field(None, description="Anything you want to find again on the job.")

    @model_validator(mode="before")
    @classmethod
    def _decide_about_pushing(cls, values: Any) -> Any:
        """Write the default out, so that both spellings are one job; what is stored decides the same."""
        if not isinstance(values, dict):
            return values
        template, push = values.get("finetuned_model_id"), values.get("push")
        if push is None:
            push = template is not None or values.get("hf_org") is not None
        if push is True and template is None:
            template = DEFAULT_TEMPLATE
        return {**values, "finetuned_model_id": template, "push": push}

    @field_validator("training_file", "test_file")
    @classmethod
    def _purpose_of_the_loss(cls, value: str | None, info: ValidationInfo) -> str | None:
        loss = info.data.get("loss")
        return value if value is None or loss is None else checked_file(value, purpose_of(loss), loss)

    @field_validator("logp_callback_datasets")
    @classmethod
    def _conversations(cls, value: dict[str, str]) -> dict[str, str]:
        return {
            name: checked_file(file, "conversations", "log-probabilities") for name, file in value.items()
        }

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _parse_learning_rate(cls, value: Any) -> float:
        mend = "Give a number in (0, 1] such as 1e-4, or a negative exponent such as -4 (which is 1e-4)."
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{value!r} is not a number. {mend}") from None
        if -12 <= number <= -1:
            number = 10.0**number
        if not 0 < number <= 1:
            raise ValueError(f"{value!r} is not a learning rate. {mend}")
        return number

    @field_validator("output_dir")
    @classmethod
    def _inside_the_job_folder(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or path.parts[:1] in [(), ("uploads",)]:
            raise ValueError(
                f"{value!r} is not a folder inside the job folder. Give a relative path such as './tmp'."
            )
        return value

    @model_validator(mode="after")
    def _possible_together(self) -> TrainingParams:
        quantized = "load_in_4bit=True" if self.load_in_4bit else f"model={self.model!r}"
        if not self.is_peft and (self.load_in_4bit or "4bit" in self.model.lower()):
            raise ValueError(
                f"is_peft=False trains all weights, which {quantized} has quantized. Change one."
            )
        if self.keep_best and not self.evaluates():
            raise ValueError("keep_best=True needs evaluations: give a `test_file` and let it be evaluated.")
        if name := self.repository(self.model):
            name.of(_STAND_IN if self.job_id_suffix is None else f"{_STAND_IN}-{self.job_id_suffix}")
        return self

    def evaluates(self) -> bool:
        """Whether there will be an `eval_loss`."""
        return self.test_file is not None

    def repository(self, model: str) -> RepositoryName | None:
        """The name to push to, for a model as the user wrote it; None when none is wanted."""
        if self.finetuned_model_id is None:
            return None
        return RepositoryName(self.finetuned_model_id, self._placeholders(model))

    def _placeholders(self, model: str) -> dict[str, str]:
        parameters = {
            name: str(value)
            for name, value in self.model_dump().items()
            if isinstance(value, str | int | float)
        }
        organization = {} if self.hf_org is None else {"org_id": self.hf_org}
        return {**parameters, **organization, "model_name": PurePosixPath(model).name}


def purpose_of(loss: str) -> str:
    """The purpose of the files that a loss is taken on."""
    return "preference" if loss in ("dpo", "orpo") else "conversations"


def checked_file(value: str, purpose: str, use: str) -> str:
    """Return a file id if it has this purpose."""
    match = _FILE_ID.fullmatch(value)
    if match is None:
        raise ValueError(
            f"{value!r} is not a file id. Upload the file with `ow.files.upload` and pass its 'id'."
        )
    if match["purpose"] != purpose:
        raise ValueError(f"{value!r} has the wrong purpose for {use}. Upload it with purpose={purpose!r}.")
    return value


def is_file_id(value: str) -> bool:
    """Whether a parameter names a file that is stored, not one of a machine."""
    return _FILE_ID.fullmatch(value) is not None


def is_job_id(model: str) -> bool:
    """Whether a model is named by the job that made it."""
    return _JOB_ID.fullmatch(model) is not None
