"""Samples answers of the model while it trains."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from openweights_prefect.errors import InvalidFileError
from openweights_prefect.jobs.training.conversations import ChatTemplate, parse_messages, read_lines
from openweights_prefect.jobs.training.logprobs import evaluating, precision
from openweights_prefect.jobs.training.reporting import Every, Telemetry, file_stem, is_due
from openweights_prefect.jobs.training.scored_rows import data_path, to_json

if TYPE_CHECKING:
    from openweights_prefect.jobs.fine_tuning.params import FineTuningParams
    from openweights_prefect.jobs.weighted_sft.params import WeightedSftParams

_MARK = "\U000f0001"


class Prompt(NamedTuple):
    """A row as it was uploaded, and the tokens that its answer continues."""

    row: dict[str, Any]
    input_ids: list[int]


def sampling_callbacks(
    params: FineTuningParams | WeightedSftParams,
    files: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    telemetry: Telemetry,
) -> list[SamplingCallback]:
    """One callback for each of `sampling_callbacks`."""
    callbacks = []
    for values in params.sampling_callbacks or []:
        # `params.json` holds plain dicts where the parameters hold models.
        wish: dict[str, Any] = dict(values)
        callbacks.append(
            SamplingCallback(
                telemetry,
                load_prompts(wish["dataset"], files, tokenizer),
                tokenizer,
                dataset=wish["dataset"],
                every=wish["eval_steps"],
                batch_size=wish["batch_size"],
                tag=wish["tag"],
                temperature=wish["temperature"],
                max_tokens=wish["max_tokens"],
                seed=params.seed,
            )
        )
    return callbacks


def load_prompts(file_id: str, files: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Read a dataset of prompts; the last message of each is answered, or continued if the assistant's."""
    path = data_path(file_id, files)
    template = ChatTemplate(tokenizer)
    prompts = []
    for place, row in read_lines(path):
        try:
            messages = parse_messages(row.get("messages"))
            template.refuse_special(messages)
            text = _prompt_text(
                template, [message.role for message in messages], [message.content for message in messages]
            )
        except ValueError as exc:
            raise InvalidFileError(f"{place} cannot be answered: {exc}.") from exc
        prompts.append(Prompt(row, list(tokenizer(text, add_special_tokens=False)["input_ids"])))
    if not prompts:
        raise InvalidFileError(f"The data file {path.name!r} is empty. Upload at least one conversation.")
    return prompts


# mypy sees no transformers in the control environment.
class SamplingCallback(TrainerCallback):  # type: ignore[misc]
    """Answers prompts before the first step, every so many steps and after the last one.

    Training goes on as if it had not been there: modes, random numbers and the key-value cache are as before.
    What fails is told in an event, not raised.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        *,
        dataset: str,
        every: Every,
        batch_size: int,
        tag: str,
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> None:
        self._telemetry = telemetry
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._every = every
        self._batch_size = batch_size
        self._tag = tag
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._seed = seed

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Sample the untrained model, or what a lost pod did not get to tell about its last checkpoint."""
        self._sample_if_due(args, state, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Sample the model after the steps that are due."""
        self._sample_if_due(args, state, model)

    def _sample_if_due(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        step = state.global_step
        about = {"dataset": self._dataset, "temperature": self._temperature}
        event = {"type": "samples", "tag": self._tag, "step": step, **about}
        if not state.is_world_process_zero or not is_due(step, self._every, last=state.max_steps):
            return
        if self._telemetry.is_told(event):
            return
        try:
            with precision(args):
                completions = sample(
                    model,
                    self._tokenizer,
                    [prompt.input_ids for prompt in self._prompts],
                    batch_size=self._batch_size,
                    temperature=self._temperature,
                    max_tokens=self._max_tokens,
                    seed=self._seed + step,
                )
            rows = zip(self._prompts, completions, strict=True)
            self._telemetry.log_file(
                event,
                (to_json({**prompt.row, "completion": completion}) + "\n" for prompt, completion in rows),
                name=f"{file_stem(self._tag)}-{step}.jsonl",
                purpose="samples",
            )
            self._telemetry.say(
                f"step {step} {self._tag!r}: {len(completions)} samples, the first: {_short(completions[0])}"
            )
        except Exception as exc:  # Training is worth more than what is sampled beside it.
            self._telemetry.failed("samples", self._tag, step, exc)


def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> list[str]:
    """Complete each prompt, greedily at temperature 0; everything about the model is as before afterwards."""
    config = _generation(model, tokenizer, temperature=temperature, max_tokens=max_tokens)
    completions = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with generating(model, seed=seed):
        while batches:
            batch = batches.pop(0)
            try:
                answers = _answers(model, [prompts[index] for index in batch], config)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                half = len(batch) // 2
                batches[:0] = [batch[:half], batch[half:]]
                torch.cuda.empty_cache()
                continue
            for index, answer in zip(batch, answers, strict=True):
                completions[index] = str(tokenizer.decode(answer, skip_special_tokens=True))
    return completions


@contextlib.contextmanager
def generating(model: Any, *, seed: int) -> Iterator[None]:
    """Make a model that trains ready to generate; afterwards it, and all random numbers, are as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    checkpointing = [
        (module, module.gradient_checkpointing)
        for module in model.modules()
        if "gradient_checkpointing" in vars(module)  # not what a wrapper passes on from inside
    ]
    configs = {id(config): config for config in _configs(model)}.values()
    caches = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    with torch.random.fork_rng(devices=list(devices)), evaluating(model), torch.no_grad():
        torch.manual_seed(seed)
        for module, _ in checkpointing:
            module.gradient_checkpointing = False
        for config, _ in caches:
            config.use_cache = True
        try:
            with _unsloth_inference(model):
                yield
        finally:
            for module, before in checkpointing:
                module.gradient_checkpointing = before
            for config, before in caches:
                config.use_cache = before


@contextlib.contextmanager
def _unsloth_inference(model: Any) -> Iterator[None]:
    """Unsloth's models generate in a mode of their own, which changes more than PyTorch's."""
    if not hasattr(model, "for_inference"):
        yield
        return
    model.for_inference()
    try:
        yield
    finally:
        model.for_training()


def _configs(model: Any) -> Iterator[Any]:
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, dict):
            yield config


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _answers(model: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    ids, mask = _padded(prompts, config.pad_token_id, next(model.parameters()).device)
    generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    rows: list[list[int]] = generated[:, ids.shape[1] :].tolist()
    return [_until_stop(row, config.eos_token_id) for row in rows]


def _until_stop(row: list[int], stops: Sequence[int]) -> list[int]:
    """What comes before the first token that ends an answer: the rest is padding."""
    return row[: next((place for place, token_id in enumerate(row) if token_id in stops), len(row))]


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids padded on the left, so that all answers begin at one place, and the mask by length."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _generation(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, temperature: float, max_tokens: int
) -> GenerationConfig:
    """Nothing is left to the model's own `generation_config` but further tokens that end an answer."""
    stops = set(_listed(_base(model).generation_config.eos_token_id))
    stops |= set(_listed(tokenizer.eos_token_id)) | set(_listed(end_of_turn(tokenizer)))
    choice: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if temperature > 0:
        choice = {"do_sample": True, "num_beams": 1, "temperature": float(temperature)}
        choice |= {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_tokens,
        repetition_penalty=1.0,
        eos_token_id=sorted(stops),
        pad_token_id=pad if pad is not None else min(stops, default=0),
        use_cache=True,
        **choice,
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an answer; it need not be the tokenizer's EOS."""
    template = ChatTemplate(tokenizer)
    try:
        rendered = template.render(["user", "assistant"], ["Hello", f"Hello{_MARK}"])
    except ValueError:
        return None
    ids = tokenizer(rendered.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    return next((token_id for token_id in ids if token_id in template.special_ids), None)


def _prompt_text(template: ChatTemplate, roles: list[str], contents: list[str]) -> str:
    if roles[-1] != "assistant":
        return template.render(roles, contents, generation_prompt=True)
    if not roles[:-1]:
        raise ValueError("its only message is the assistant's; there is nothing to answer")
    return template.render(roles[:-1], contents[:-1], generation_prompt=True) + contents[-1]


def _listed(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 80 else text[:77] + "...", ensure_ascii=False)
