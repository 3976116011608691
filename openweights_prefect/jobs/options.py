"""Keyword arguments of `create`: the job type's own parameters, and the options that all job types share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.secrets import OWN_VARIABLES, SECRET_NAME, looks_secret
from openweights_prefect.provisioning.hardware import parse_hardware

_UNSHOWN = ("env",)
"""Options whose value may be a secret by mistake: an error does not repeat it."""

_CLOUDS = ("SECURE", "COMMUNITY")
_ELSEWHERE = {
    "hf_token": "store it with `ow env set HF_TOKEN`; a job that pushes finds it, any other with "
    "secrets=['HF_TOKEN'].",
    "report_to": "pass secrets=['WANDB_API_KEY'] to report to Weights & Biases.",
}
"""What is known under another form than a parameter."""

Params = TypeVar("Params", bound=BaseModel)


class Options(BaseModel):
    """How a job is run, not what it computes: only the image and the suffix are part of its id."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    allowed_hardware: list[str] | None = Field(
        None, min_length=1, description='Such as `["1x H200", "2x A100"]`, in order of preference.'
    )
    requires_vram_gb: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description="GPU memory; estimated without it, or with `guess`; ignored beside allowed_hardware.",
    )
    docker_image: Annotated[str, StringConstraints(pattern=r"^[\w][\w./:@-]*$", max_length=300)] | None = (
        Field(None, description="Image to run in, instead of the job type's own.")
    )
    job_id_suffix: str | None = Field(None, description="Readable end of the job id; makes it another job.")
    priority: int = Field(0, ge=-1000, le=1000, description="Higher starts earlier.")
    max_price_per_hour: float | None = Field(None, gt=0, le=10_000, description="USD per hour and pod.")
    cloud: str | None = Field(
        None, description="`secure` (data centers) or `community` (machines of others); either by default."
    )
    min_cuda: Annotated[str, StringConstraints(pattern=r"^\d{1,3}\.\d{1,3}$")] | None = Field(
        None, description='Lowest CUDA version of the machine\'s driver, such as `"12.8"`.'
    )
    min_vcpu: int | None = Field(None, ge=1, le=1024, description="Virtual CPUs of the whole pod.")
    min_ram_gb: int | None = Field(
        None, ge=1, le=16_384, description="RAM of the whole pod, not of its GPUs."
    )
    timeout: int | None = Field(None, ge=1, le=30 * 86400, description="Seconds that one attempt may take.")
    retries: int = Field(0, ge=0, le=100, description="Further attempts after failures of the job's own.")
    env: dict[str, str] = Field({}, description="Environment variables, stored in plain text: no secrets.")
    secrets: list[str] | None = Field(
        None,
        max_length=100,
        description="Names of the organization's secrets that the job finds in its environment.",
    )

    @field_validator("requires_vram_gb", mode="before")
    @classmethod
    def _estimated(cls, value: Any) -> Any:
        return None if value == "guess" else value

    @field_validator("allowed_hardware")
    @classmethod
    def _known_hardware(cls, value: list[str] | None) -> list[str] | None:
        return None if value is None else list(dict.fromkeys(str(parse_hardware(text)) for text in value))

    @field_validator("cloud")
    @classmethod
    def _known_cloud(cls, value: str | None) -> str | None:
        if value is not None and value.upper() not in _CLOUDS:
            raise ValueError("is no cloud; write 'secure' or 'community', or leave it out for either")
        return None if value is None else value.upper()

    @field_validator("env")
    @classmethod
    def _legal_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\0" in text:
                raise ValueError(f"{name!r} cannot be an environment variable; use letters, digits and `_`")
            if OWN_VARIABLES.fullmatch(name):
                raise ValueError(f"{name!r} is set by the pod; choose another name")
            if looks_secret(name, text):
                raise ValueError(
                    f"{name!r} looks like a secret, and `env` is stored in plain text; "
                    f"store it: `ow env set {name}`, then pass secrets=[{name!r}]"
                )
        return value

    @field_validator("secrets")
    @classmethod
    def _legal_secrets(cls, value: list[str] | None) -> list[str] | None:
        for name in value or []:
            if not SECRET_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r:.50} cannot be the name of a secret; give the names that `ow env show` lists"
                )
            if OWN_VARIABLES.fullmatch(name):
                raise ValueError(f"{name!r} is set by the pod; store the secret under another name")
        return None if value is None else list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _one_value_a_variable(self) -> Options:
        if both := sorted({*self.env}.intersection(self.secrets or [])):
            raise ValueError(f"{', '.join(both)}: both in `env` and in `secrets`; take it out of one")
        return self


def with_secret(options: Options, name: str) -> Options:
    """The options of a job that cannot do without this secret."""
    named = options.secrets or []
    return options if name in named else options.model_copy(update={"secrets": [*named, name]})


class Arguments(NamedTuple):
    """The arguments of one `create`: options, and parameters that the job type still has to validate."""

    options: Options
    params: dict[str, Any]


def split(arguments: Mapping[str, Any], model: type[BaseModel], *, job_type: str) -> Arguments:
    """Take the options out of the arguments; a name that is also a field of `model` is given to both.

    Raises `InvalidParameterError` for names that are neither, with the closest known ones.
    """
    fields = field_names(model)
    _refuse_unknown(arguments, model, fields, job_type)
    options = {name: value for name, value in arguments.items() if name in Options.model_fields}
    params = {name: value for name, value in arguments.items() if name not in options or name in fields}
    return Arguments(validated(Options, options, job_type=job_type), params)


def validated(model: type[Params], values: Mapping[str, Any], *, job_type: str) -> Params:
    """Validate, with one `InvalidParameterError` that has a line for each bad value."""
    try:
        return model(**values)
    except ValidationError as exc:
        lines = [
            _line(error["loc"], error["msg"], error.get("input")) for error in exc.errors(include_url=False)
        ]
    raise InvalidParameterError("\n".join([f"Bad parameters for {job_type!r}:", *lines]))


def field_names(model: type[BaseModel]) -> set[str]:
    """The names under which the fields of a model can be given, aliases among them."""
    names = set(model.model_fields)
    for field in model.model_fields.values():
        aliases = field.validation_alias
        choices = aliases.choices if isinstance(aliases, AliasChoices) else [aliases]
        names |= {alias for alias in (*choices, field.alias) if isinstance(alias, str)}
    return names


def _line(location: Iterable[int | str], message: str, value: object) -> str:
    path = ".".join(map(str, location))
    message = message.removeprefix("Value error, ")
    if not path:
        return f"  {message}"
    if message == "Field required":
        return f"  {path}: is required"
    if path.split(".")[0] in _UNSHOWN:
        return f"  {path}: {message}"
    return f"  {path}={value!r:.100}: {message}"


def _refuse_unknown(
    arguments: Iterable[str], model: type[BaseModel], fields: set[str], job_type: str
) -> None:
    # A model that says what to do with further names means it; pydantic's silent default would hide a typo.
    if model.model_config.get("extra") in ("allow", "ignore"):
        return
    known = fields | set(Options.model_fields)
    lines = []
    for name in sorted(set(arguments) - known):
        near = difflib.get_close_matches(name, known, n=1)
        mend = f"did you mean {near[0]!r}?" if near else "remove it."
        lines.append(f"  {name!r} is unknown; {_ELSEWHERE.get(name, mend)}")
    if lines:
        raise InvalidParameterError("\n".join([f"Bad parameters for {job_type!r}:", *lines]))
