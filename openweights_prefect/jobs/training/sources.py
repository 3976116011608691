"""Where the model of a job and its tokenizer are; needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from openweights_prefect.errors import InvalidParameterError

if TYPE_CHECKING:
    from openweights_prefect.jobs.training.params import ModelParams

BASE_FOLDER = Path("base")
"""Where the base model of an adapter lies in the job folder, if that is files, too."""


class CannotLoad(InvalidParameterError):
    """A model or its tokenizer is not there, cannot be reached, or is damaged."""


class Source(NamedTuple):
    """Where a model is: a folder or a name on Hugging Face, and a folder of that repository."""

    name: str
    subfolder: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """What `from_pretrained` is given beside the name; the code of a repository is never run."""
        options: dict[str, Any] = {"trust_remote_code": False}
        return {**options, "subfolder": self.subfolder} if self.subfolder else options


def find(params: ModelParams) -> tuple[Source, Source | None]:
    """Where the model is and, when it is an adapter, where its base is."""
    source = Source(params.model)
    if not Path(params.model).is_dir() and params.model.count("/") == 2:
        source = Source(*params.model.rsplit("/", 1))
    try:
        config = find_adapter_config_file(source.name, subfolder=source.subfolder)
    except OSError as exc:
        raise cannot_load(params.model, exc) from exc
    if config is None:
        return source, None
    base = str(json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"])
    if BASE_FOLDER.is_dir():
        base = str(BASE_FOLDER)
    elif base == params.model or (base.startswith((".", "/")) and not Path(base).is_dir()):
        raise InvalidParameterError(
            f"The model {params.model!r} is an adapter of {base!r}, which is not here. Train on the merged "
            "model, or give that base model."
        )
    return source, Source(base)


def load_tokenizer(params: ModelParams, source: Source, base: Source | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the chat template that was asked for and some token to pad with."""
    place = source
    # Adapters made elsewhere often come without one.
    if base is not None and not Path(source.name, source.subfolder, "tokenizer_config.json").is_file():
        place = base
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.name, **place.options)
    except (OSError, ValueError) as exc:
        raise cannot_load(params.model, exc) from exc
    if not tokenizer.is_fast:
        raise InvalidParameterError(
            f"The model {params.model!r} has no fast tokenizer, which training needs."
        )
    if params.chat_template != "default":
        tokenizer.chat_template = params.chat_template
    if tokenizer.pad_token is None:
        # Padding is masked by length, so any token will do.
        some = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = some
    return tokenizer


def cannot_load(model: str, exc: Exception) -> CannotLoad:
    """The error for a model that cannot be loaded, in a line."""
    reason = next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
    return CannotLoad(f"The model {model!r} cannot be loaded: {reason}")
