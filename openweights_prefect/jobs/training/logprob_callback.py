"""Follows the log-probabilities of datasets while training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from openweights_prefect.jobs.training.logprobs import precision, score
from openweights_prefect.jobs.training.reporting import Every, Telemetry, file_stem, is_due, shown
from openweights_prefect.jobs.training.scored_rows import (
    Nll,
    Records,
    ScoredRows,
    data_path,
    load_scored_rows,
    tagged_blocks,
    to_json,
)

if TYPE_CHECKING:
    from openweights_prefect.jobs.training.params import TrainingParams


def logprob_callbacks(
    params: TrainingParams,
    files: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    telemetry: Telemetry,
) -> list[LogprobCallback]:
    """One callback for each of `logp_callback_datasets`, in the order of their names."""
    callbacks = []
    for name, file_id in sorted(params.logp_callback_datasets.items()):
        rows = load_scored_rows(
            data_path(file_id, files),
            tokenizer,
            flat="responses" if params.train_on_responses_only else "all",
            max_length=params.max_seq_length,
        )
        for note in rows.notes:
            telemetry.say(f"note: dataset {name!r}: {note}")
        callbacks.append(
            LogprobCallback(
                telemetry,
                name,
                rows,
                tokenizer,
                every=params.eval_every_n_steps,
                batch_size=params.eval_batch_size,
            )
        )
    return callbacks


# mypy sees no transformers in the control environment.
class LogprobCallback(TrainerCallback):  # type: ignore[misc]
    """Measures one dataset before the first step, every so many steps and after the last one.

    Training goes on as if it had not been there. What fails is told in an event, not raised.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        name: str,
        rows: ScoredRows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every: Every,
        batch_size: int,
    ) -> None:
        self._telemetry = telemetry
        self._name = name
        self._rows = rows
        self._records = Records(tokenizer)
        self._every = every
        self._batch_size = batch_size

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Measure the untrained model, or what a lost pod did not get to tell about its last checkpoint."""
        self._measure_if_due(args, state, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Measure the model after the steps that are due."""
        self._measure_if_due(args, state, model)

    def _measure_if_due(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        step = state.global_step
        kind = "logprobs_blockwise" if self._rows.in_blocks else "logprobs"
        event = {"type": kind, "tag": self._name, "step": step}
        if not state.is_world_process_zero or not is_due(step, self._every, last=state.max_steps):
            return
        if self._telemetry.is_told(event):
            return
        try:
            with precision(args):
                values = dict(score(model, self._rows.tokens, batch_size=self._batch_size))
            self._tell(event, [values[index] for index in range(len(values))])
        except Exception as exc:  # Training is worth more than what is measured beside it.
            self._telemetry.failed("logprobs", self._name, step, exc)

    def _tell(self, event: dict[str, Any], logprobs: list[list[float]]) -> None:
        nll = Nll()
        for scored, values in zip(self._rows.rows, logprobs, strict=True):
            nll.add(scored.example, values)
        in_blocks, step = self._rows.in_blocks, event["step"]
        write = self._records.with_blocks if in_blocks else self._records.with_tokens
        records = (write(row, values) for row, values in zip(self._rows.rows, logprobs, strict=True))
        blocks: list[dict[str, Any]] = []
        self._telemetry.log_file(
            # The name is the user's choice: it must not hide what the event needs.
            {self._name: nll.mean, "nll": nll.mean, "tokens": nll.tokens, **event},
            _as_list(self._collecting(blocks, step, records) if in_blocks else records),
            name=f"{file_stem(self._name)}-{step}.json",
            purpose="logp_blockwise" if in_blocks else "logp",
            before=blocks,
        )
        self._telemetry.say(
            f"step {step} log-probabilities of {self._name!r}: nll {shown(nll.mean)} over {nll.tokens} tokens"
        )

    def _collecting(
        self, blocks: list[dict[str, Any]], step: int, records: Iterable[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        about = {"step": step, "source": self._name, "type": "logprob_block"}
        for record in records:
            blocks += [{**block, **about} for block in tagged_blocks(record)]
            yield record


def _as_list(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The text of a JSON list, one element a line."""
    separator = "[\n"
    for record in records:
        yield separator + to_json(record)
        separator = ",\n"
    yield "\n]\n"
