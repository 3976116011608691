"""Looks at the data and the needs of a training before anything is bought."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from openweights_prefect.errors import InvalidFileError, InvalidParameterError, InvalidRequestError
from openweights_prefect.files.validation import validate_jsonl
from openweights_prefect.jobs.memory import MemoryEstimate, Workload, estimate
from openweights_prefect.jobs.model_shape import Shape, shape_from_config
from openweights_prefect.jobs.request import JobRequest
from openweights_prefect.provisioning.hardware import parse_hardware
from openweights_prefect.resources.check_report import CheckReport, DataReport, Segment
from openweights_prefect.resources.preflight import DATA_FILES, Limits, NotPossible, ask
from openweights_prefect.resources.session import Session
from openweights_prefect.resources.submission import LocalFile
from openweights_prefect.resources.training_cost import guess_cost, total_steps
from openweights_prefect.types.hardware import Needs

_KNOWN_ERRORS: dict[str, type[InvalidRequestError]] = {"InvalidFileError": InvalidFileError}
_CARD_KEEPS_GB = 1
_FEW_TRAINED = 0.02


def check_training(
    session: Session,
    request: JobRequest,
    local_files: Mapping[str, LocalFile],
    *,
    shape: Shape | None,
    limits: Limits,
) -> CheckReport:
    """Check a training; nothing is stored, and nothing but small files downloaded.

    `shape` is that of the model as far as it is known without looking further.
    """
    errors: list[InvalidRequestError] = []
    answer: dict[str, Any] = {"files": {}, "errors": [], "overlap": 0, "model": {}}
    why = None
    try:
        for target, file in local_files.items():
            if limits.asked_for and target in DATA_FILES.values():
                validate_jsonl(file.path, file.purpose)
        answer = ask(session, request, local_files, limits)
    except InvalidRequestError as exc:
        errors.append(exc)
    except NotPossible as exc:
        why = str(exc)
    for each in answer["errors"]:
        errors.append(_KNOWN_ERRORS.get(each["kind"], InvalidParameterError)(each["message"]))
    config = answer["model"].get("config")
    if config:
        known = shape.counted if shape and shape.source == "config" else answer["model"]["parameters"]
        shape = shape_from_config(config, parameters=known) or shape
    return _report(request, answer, errors, shape=shape, not_checked=why)


# What is found, judged ----------------------------------------------------------------------------


def _report(
    request: JobRequest,
    answer: Mapping[str, Any],
    errors: list[InvalidRequestError],
    *,
    shape: Shape | None,
    not_checked: str | None,
) -> CheckReport:
    params, data = request.params, {name: _data(found) for name, found in answer["files"].items()}
    training = data.get("training_file")
    memory = estimate(shape, Workload.of(_Attributes(params), kind=request.type))
    steps = total_steps(params, training.rows) if training else None
    cost = None
    if training:
        needs = _needs(request, memory)
        cost = guess_cost(shape, params, needs, rows=training.rows, tokens=training.tokens)
    return CheckReport(
        job_type=request.type,
        errors=tuple(errors),
        warnings=(
            *(f"{name}: {note}" for name, found in data.items() for note in _doubts(found)),
            *_doubts_about_steps(params, steps, answer["overlap"]),
            *_doubts_about_length(data, shape),
            *_doubts_about_memory(request, memory),
        ),
        not_checked=not_checked,
        training=training,
        test=data.get("test_file"),
        steps=steps,
        memory=memory,
        cost=cost,
    )


def _data(found: Mapping[str, Any]) -> DataReport:
    examples = tuple(tuple(Segment(*segment) for segment in row) for row in found["examples"])
    return DataReport(**{**found, "notes": tuple(found["notes"]), "examples": examples})


def _doubts(data: DataReport) -> Iterator[str]:
    yield from data.notes
    if data.copies:
        yield f"{data.copies} of {data.rows} rows are copies of others"
    if data.tokens and data.trained_share < _FEW_TRAINED:
        yield f"only {data.trained_share:.2%} of the tokens are trained on"


def _doubts_about_steps(params: Mapping[str, Any], steps: int | None, overlap: int) -> Iterator[str]:
    warmup = params["warmup_steps"]
    if steps is not None and warmup >= steps:
        yield f"warmup_steps={warmup}, but there are {steps} steps: the full learning_rate is never reached"
    if overlap:
        yield f"{overlap} rows are in both training_file and test_file, so eval_loss looks too good"


def _doubts_about_length(data: Mapping[str, DataReport], shape: Shape | None) -> Iterator[str]:
    longest = max((found.lengths["max"] for found in data.values()), default=0)
    if shape and shape.longest and longest > shape.longest:
        yield (
            f"the longest row has {longest} tokens, and the model was made for {shape.longest}; lower "
            "max_seq_length"
        )


def _doubts_about_memory(request: JobRequest, memory: MemoryEstimate) -> Iterator[str]:
    needed, options = memory.requires_vram_gb, request.options
    if memory.source != "unknown" and options.allowed_hardware is not None:
        for text in options.allowed_hardware:
            card = parse_hardware(text)
            if card.gpu_memory_gb - _CARD_KEEPS_GB < needed:
                yield f"{text!r} has {card.gpu_memory_gb} GB a card, and about {needed} GB are needed"
    elif memory.source != "unknown" and (options.requires_vram_gb or needed) < needed:
        yield f"requires_vram_gb={options.requires_vram_gb}, and about {needed} GB are needed"


def _needs(request: JobRequest, memory: MemoryEstimate) -> Needs:
    options = request.options
    allowed, asked = options.allowed_hardware, options.requires_vram_gb
    return Needs(
        requires_vram_gb=memory.requires_vram_gb if asked is None else asked,
        allowed_hardware=None if allowed is None else tuple(allowed),
        max_price_per_hour=options.max_price_per_hour,
        cloud=options.cloud,
    )


class _Attributes:
    """Validated parameters by attribute, also those within them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        try:
            value = self._values[name]
        except KeyError:
            raise AttributeError(name) from None
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [_Attributes(each) for each in value]
        return value
