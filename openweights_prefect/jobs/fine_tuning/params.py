"""The parameters of a fine-tuning job: names, defaults, ranges, and the memory that they need."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

UNKNOWN_SIZE_VRAM_GB = 24

_FILE_ID = re.compile(r"(?P<purpose>[\w-]+):file-[0-9a-f]{12}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+(/checkpoint-\d+)?)?")
_JOB_ID = re.compile(r"[a-z]+-[0-9a-f]{12}(-[\w-]+)?")
# "8B", "0.5b", "270M", "8x7B"; not the "2.5" of a version, the "A3B" of active experts or the "4b" of "4bit".
_SIZE = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})x)?(\d{1,4}(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)

JsonObject = dict[str, Any]
Name = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class SamplingCallback(BaseModel):
    """Sample answers to a dataset while training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Name = Field(description="File id of the prompts.")
    eval_steps: Annotated[int, Field(ge=1)] | Literal["log"] = Field(
        10, description="Sample every this many steps."
    )
    batch_size: int = Field(8, ge=1, le=4096, description="Prompts answered at once.")
    tag: Name = Field("samples", description="Tag of the events.")
    temperature: float = Field(0, ge=0, le=10, description="Sampling temperature; 0 is greedy.")
    max_tokens: int = Field(600, ge=1, le=1_000_000, description="Longest answer in tokens.")


def _in_order(schema: JsonObject) -> None:
    """Number the fields: Prefect's form shows them by `position`, for its database forgets their order."""
    for position, field in enumerate(schema["properties"].values()):
        field["position"] = position


class FineTuningParams(BaseModel):
    """Parameters of `ow.fine_tuning.create`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=_in_order)

    model: Name = Field(
        description="Hugging Face id (`org/name`, `org/name/checkpoint-10`), job id or local folder."
    )
    training_file: str = Field(description="File id of the conversations to train on.")
    test_file: str | None = Field(None, description="File id of conversations to evaluate on.")
    chat_template: str = Field(
        "default", min_length=1, description="Jinja chat template; `default` is the model's own."
    )
    finetuned_model_id: str | None = Field(
        None, description="Hugging Face id to push to; none keeps the result here."
    )
    push: bool | None = Field(
        None, description="Push to Hugging Face; by default when `finetuned_model_id` is given."
    )
    model_naming_extra_parameters: dict[str, str] | None = Field(
        None, description="Further values for the placeholders of `finetuned_model_id`."
    )
    job_id_suffix: str | None = Field(
        None, pattern=r"^[\w-]{1,64}$", description="Readable end of the job id."
    )
    max_seq_length: int = Field(
        2048, ge=8, le=1_048_576, description="Longer conversations are cut to so many tokens."
    )
    load_in_4bit: bool = Field(False, description="Train on a base model quantized to 4 bits.")
    loss: Literal["sft", "dpo", "orpo"] = Field(description="Training method.")
    is_peft: bool = Field(True, description="Train a LoRA adapter; false trains all weights.")
    target_modules: list[Name] | None = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Layers that get a LoRA adapter; none leaves the choice to PEFT.",
    )
    lora_bias: Literal["all", "none"] = Field("none", description="Which biases are trained.")
    r: int = Field(16, ge=1, le=1024, description="LoRA rank.")
    lora_alpha: int = Field(16, ge=1, le=8192, description="LoRA scaling.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout.")
    use_rslora: bool = Field(True, description="Scale by the square root of the rank (rank-stabilized LoRA).")
    merge_before_push: bool = Field(True, description="Push the merged model instead of the adapter.")
    push_to_private: bool = Field(True, description="Push to a private repository.")
    epochs: int = Field(1, ge=1, le=10_000, description="Passes over the training file.")
    max_steps: int | None = Field(
        None, ge=1, le=100_000_000, description="Stop after so many steps, whatever `epochs` is."
    )
    per_device_train_batch_size: int = Field(2, ge=1, le=4096, description="Conversations per forward pass.")
    gradient_accumulation_steps: int = Field(8, ge=1, le=65_536, description="Forward passes per step.")
    warmup_steps: int = Field(5, ge=0, le=10_000_000, description="Steps until the full learning rate.")
    learning_rate: float | str = Field(
        1e-4, description="Number such as 1e-4, or a negative exponent: -4 is 1e-4."
    )
    logging_steps: int = Field(1, ge=1, le=1_000_000, description="Log the loss every so many steps.")
    optim: Literal["adamw_8bit", "adamw", "adamw_torch", "adam", "sgd"] = Field(
        "adamw_8bit", description="Optimizer; `adamw_8bit` becomes `adamw_torch` where there is no GPU."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="Weight decay.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = Field("linear", description="Course of the learning rate.")
    seed: int = Field(3407, ge=0, lt=2**32, description="Random seed.")
    beta: float = Field(0.1, gt=0, le=100, description="Strength of the preference losses.")
    save_steps: int = Field(5000, ge=1, le=100_000_000, description="Store a checkpoint every so many steps.")
    output_dir: str = Field("./tmp", description="Folder for checkpoints, inside the job folder.")
    train_on_responses_only: bool = Field(True, description="Take the loss on the assistant's messages only.")
    packing: bool = Field(
        True, description="Train on several conversations per row, where the GPU supports it."
    )
    logp_callback_datasets: dict[str, str] = Field(
        {}, description="Name -> file id, to track log-probabilities of."
    )
    eval_every_n_steps: int = Field(
        5000, ge=1, le=100_000_000, description="Run the callbacks every so many steps."
    )
    sampling_callbacks: list[SamplingCallback] | None = Field(
        None, description="Sample answers while training."
    )
    eval_batch_size: int = Field(
        8, ge=1, le=4096, description="Conversations per forward pass of an evaluation."
    )
    test_file_eval_steps: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Evaluate every so many steps, or after this share of all steps."
    )
    test_file_eval_strategy: Literal["no", "epoch", "steps"] | None = Field(
        "epoch", description="When to evaluate."
    )
    meta: JsonObject | None = Field(None, description="Anything you want to find again on the job.")

    @model_validator(mode="before")
    @classmethod
    def _known_names_only(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if name not in cls.model_fields:
                    near = difflib.get_close_matches(str(name), cls.model_fields, n=1)
                    hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
                    raise ValueError(f"Unknown parameter {name!r}. {hint}")
        return values

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

    @field_validator("training_file", "test_file")
    @classmethod
    def _conversations(cls, value: str | None) -> str | None:
        if value is None:
            return value
        match = _FILE_ID.fullmatch(value)
        if match is None:
            raise ValueError(
                f"{value!r} is not a file id. Upload the file with `ow.files.upload` and pass its 'id'."
            )
        if match["purpose"] != "conversations":
            raise ValueError(
                f"{value!r} has the wrong purpose for sft. Upload it with purpose='conversations'."
            )
        return value

    @field_validator("loss")
    @classmethod
    def _loss_is_available(cls, value: str) -> str:
        if value != "sft":
            raise ValueError(f"loss={value!r} is not available yet. Use 'sft'.")
        return value

    @field_validator("logp_callback_datasets", "sampling_callbacks")
    @classmethod
    def _no_callbacks(cls, value: Any) -> Any:
        if value:
            raise ValueError(
                "Callbacks are not available yet. Leave them out; a `test_file` gives the loss on it."
            )
        return value

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

    @field_validator("finetuned_model_id")
    @classmethod
    def _hub_repository(cls, value: str | None) -> str | None:
        if value is None:
            return value
        organization, slash, name = value.partition("/")
        if not slash or not organization or not name or "/" in name:
            raise ValueError(f"{value!r} is not a Hugging Face id. Write it as 'user/model'.")
        if organization in ("datasets", "models", "unsloth", "None"):
            raise ValueError(f"{organization!r} is not an organization that you can push to. Use your own.")
        return value

    @model_validator(mode="after")
    def _keeps_the_result_here(self) -> FineTuningParams:
        if self.push or (self.push is None and self.finetuned_model_id is not None):
            raise ValueError(
                "Pushing to Hugging Face is not available yet. Leave out `finetuned_model_id` or pass "
                "push=False: the result is kept with the job and `job.download()` fetches it."
            )
        return self


def requires_vram_gb(params: FineTuningParams) -> int:
    """GPU memory for these parameters, estimated from the size in the model's name; 24 when it names none."""
    size = _billions(params.model)
    if size is None:
        return UNKNOWN_SIZE_VRAM_GB
    quantized = params.load_in_4bit or "4bit" in params.model.lower()
    weights = size * (0.7 if quantized else 2.0)
    # Per parameter: gradient, two moments and master weight in full training, next to nothing with LoRA.
    trained = size * (0.1 if params.is_peft else 14.0)
    tokens = params.per_device_train_batch_size * params.max_seq_length
    activations = 0.25 * tokens / 1000 * math.sqrt(size)
    return max(6, math.ceil(1.2 * weights + trained + activations + 3))


def _billions(model: str) -> float | None:
    """Billions of parameters by the name of a model: the largest size in it, experts counted in full."""
    path = PurePosixPath(model)
    name = path.parent.name if path.name.startswith("checkpoint-") else path.name
    if _JOB_ID.fullmatch(name):
        return None
    sizes = [
        float(size) * int(experts or 1) * (1 if unit in "bB" else 0.001)
        for experts, size, unit in _SIZE.findall(name)
    ]
    return max(sizes, default=None)
