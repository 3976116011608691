"""What a training will read: counts, lengths and the first rows of its data files, as plain values."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import huggingface_hub
from transformers import PreTrainedTokenizerBase

from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.jobs.training.examples import Example, Examples, load_examples
from openweights_prefect.jobs.training.preferences import Pair, Pairs, load_pairs
from openweights_prefect.jobs.training.sources import CannotLoad, Source, find, load_tokenizer

if TYPE_CHECKING:
    from openweights_prefect.jobs.fine_tuning.params import FineTuningParams

FILES = ("training_file", "test_file")

_WEIGHTED = "weighted_sft"
_SHOWN_ROWS = 3
_SHOWN_TOKENS = 300
"""At either end of a row."""
_PATIENCE_SECONDS = 3.0


def inspect(question: Mapping[str, Any], *, on_tokenizer: Callable[[], None]) -> dict[str, Any]:
    """Read every data file of a training; calls `on_tokenizer` when the slow part of the way is gone.

    The answer has `files`, `errors` with the class of each, `overlap` and the `model`'s configuration; or
    only `unreachable`, which says why there is no tokenizer.
    """
    params = cast("FineTuningParams", SimpleNamespace(**question["params"]))
    answer: dict[str, Any] = {"files": {}, "errors": [], "overlap": 0, "model": {}}
    try:
        source, base = find(params)
        tokenizer = load_tokenizer(params, source, base)
        model = _Model(base or source)
    except CannotLoad as exc:
        return {"unreachable": str(exc)}
    except InvalidParameterError as exc:
        answer["errors"].append(_error("model", exc))
        return answer
    finally:
        on_tokenizer()
    rows: dict[str, set[int]] = {}
    for name in FILES:
        path = question["files"].get(name)
        if path is None:
            continue
        try:
            data = read_rows(Path(path), params, tokenizer, kind=question["kind"])
        except (InvalidFileError, InvalidParameterError) as exc:
            answer["errors"].append(_error(name, exc))
            continue
        rows[name] = set(map(_digest, data.rows))
        answer["files"][name] = describe(data, tokenizer) | {"copies": len(data.rows) - len(rows[name])}
    if len(rows) == len(FILES):
        answer["overlap"] = len(set.intersection(*rows.values()))
    answer["model"] = model.wait()
    return answer


def read_rows(
    path: Path, params: FineTuningParams, tokenizer: PreTrainedTokenizerBase, *, kind: str
) -> Examples | Pairs:
    """Read a data file for the loss of the job."""
    if params.loss in ("dpo", "orpo"):
        return load_pairs(path, tokenizer, max_length=params.max_seq_length)
    mode = "responses" if params.train_on_responses_only else "all"
    return load_examples(
        path,
        tokenizer,
        max_length=params.max_seq_length,
        mode="weighted" if kind == _WEIGHTED else cast("Any", mode),
        responses_only=params.train_on_responses_only,
    )


def describe(data: Examples | Pairs, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Counts, lengths and the first rows."""
    if isinstance(data, Pairs):
        pairs = data.rows
        lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
        trained = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
        tokens = trained + 2 * sum(len(p.prompt_ids) for p in pairs)
        ends = None
    else:
        lengths = [len(row.input_ids) for row in data.rows]
        trained, tokens, ends = data.trained_tokens, sum(lengths), data.eos_trained
    return {
        "total": data.total,
        "rows": len(data.rows),
        "truncated": data.truncated,
        "dropped": data.dropped,
        "tokens": tokens,
        "trained_tokens": trained,
        "eos_trained": ends,
        "lengths": _quantiles(lengths),
        "notes": data.notes,
        "examples": [_segments(row, tokenizer) for row in data.rows[:_SHOWN_ROWS]],
    }


class _Model:
    """The configuration of a model, and how many parameters its files hold, which is asked for meanwhile."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._found: dict[str, Any] = {"config": _config(source), "parameters": None}
        self._thread = threading.Thread(target=self._count, daemon=True)
        if not Path(source.name).is_dir():
            self._thread.start()

    def wait(self) -> dict[str, Any]:
        """What is known by now, or soon."""
        if self._thread.ident is not None:
            self._thread.join(_PATIENCE_SECONDS)
        return dict(self._found)

    def _count(self) -> None:
        try:
            metadata = huggingface_hub.get_safetensors_metadata(self._source.name, timeout=_PATIENCE_SECONDS)
            counts = metadata.parameter_count
        except Exception:  # Whatever it is, the configuration will do.
            return
        if counts and counts.keys() <= {"F64", "F32", "F16", "BF16"}:
            self._found["parameters"] = sum(counts.values())


def _config(source: Source) -> dict[str, Any] | None:
    try:
        path = Path(source.name, source.subfolder, "config.json")
        if not Path(source.name).is_dir():
            folder = source.subfolder or None
            path = Path(huggingface_hub.hf_hub_download(source.name, "config.json", subfolder=folder))
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _error(parameter: str, exc: Exception) -> dict[str, str]:
    return {"parameter": parameter, "kind": type(exc).__name__, "message": str(exc)}


def _digest(row: Example | Pair) -> int:
    if isinstance(row, Example):
        return hash((tuple(row.input_ids), tuple(row.weights)))
    return hash(tuple(tuple(ids) for ids in row))


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {"p50": 0, "p95": 0, "max": 0}
    ordered, last = sorted(lengths), len(lengths) - 1
    return {"p50": ordered[last // 2], "p95": ordered[last * 95 // 100], "max": ordered[last]}


def _segments(row: Example | Pair, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, float]]:
    """The text of a row with the weight of each part of it; of a pair, the rejected answer has -1."""
    if isinstance(row, Example):
        # Nothing predicts the first token.
        pairs = list(zip(row.input_ids, [0.0, *row.weights[1:]], strict=True))
        return list(_grouped(pairs, tokenizer))
    parts = ((row.prompt_ids, 0.0), (row.chosen_ids, 1.0), (row.rejected_ids, -1.0))
    return [
        segment
        for ids, weight in parts
        for segment in _grouped([(token, weight) for token in ids], tokenizer)
    ]


def _grouped(
    tokens: list[tuple[int, float]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, float]]:
    """Neighbours of the same weight as text; the middle of a long row is left out."""
    left_out = len(tokens) - 2 * _SHOWN_TOKENS
    if left_out > 0:
        yield from _grouped(tokens[:_SHOWN_TOKENS], tokenizer)
        yield f" [{left_out} tokens] ", 0.0
        tokens = tokens[-_SHOWN_TOKENS:]
    for weight, group in itertools.groupby(tokens, key=lambda token: token[1]):
        yield tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False), weight
