"""Measures log-probabilities: `python -m openweights_prefect.jobs.logprob.measure` in a job folder.

Reads `params.json` (the validated `LogprobParams`, plus `files`: file id -> path in the folder) and leaves
`uploads/logprobs.jsonl`, one line for each row of the dataset and in its order. Only the packages of the job
environment are needed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from peft import PeftModel

from openweights_prefect.errors import InvalidParameterError, OpenWeightsError
from openweights_prefect.jobs.training.job import quiet, read_params
from openweights_prefect.jobs.training.loading import Loaded, compute_dtype, load_base
from openweights_prefect.jobs.training.logprobs import score
from openweights_prefect.jobs.training.reporting import Telemetry, shown
from openweights_prefect.jobs.training.scored_rows import (
    Nll,
    Records,
    ScoredRow,
    data_path,
    load_scored_rows,
    to_json,
)
from openweights_prefect.jobs.training.sources import find, load_tokenizer
from openweights_prefect.runtime.inside import CurrentRun

if TYPE_CHECKING:
    from openweights_prefect.jobs.logprob.params import LogprobParams

_PROGRESS_SECONDS = 3.0


def main() -> int:
    """Measure in the current folder; 1 and a last line with `error:` when the user can mend it."""
    quiet()
    try:
        measure(Path.cwd())
    except OpenWeightsError as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 1
    return 0


def measure(folder: Path) -> None:
    """Score every row of the dataset; each line of the result is the row, its tokens and its blocks' sums."""
    validated, files = read_params(folder / "params.json")
    params = cast("LogprobParams", validated)  # They are read alike for all kinds of jobs.
    run = CurrentRun()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_for_measuring(params, device)
    rows = load_scored_rows(
        data_path(params.dataset, files), tokenizer, flat="responses", max_length=params.max_seq_length
    )
    for note in rows.notes:
        print(f"note: {note}", flush=True)
    print(f"scoring {len(rows.rows)} rows on {device}", flush=True)

    records, nll = Records(tokenizer), Nll()
    progress = _Progress(Telemetry(run), len(rows.rows))
    unfinished = folder / "logprobs.unfinished.jsonl"
    places: dict[int, int] = {}
    try:
        with unfinished.open("wb") as stream:
            for index, values in score(model, rows.tokens, batch_size=params.batch_size):
                scored = rows.rows[index]
                nll.add(scored.example, values)
                places[index] = stream.tell()
                stream.write(_line(records, scored, values, in_blocks=rows.in_blocks))
                progress.show(len(places), nll)
    except torch.OutOfMemoryError as exc:
        raise InvalidParameterError(
            "The GPU has too little memory even for one row at a time. Give max_seq_length to cut long rows, "
            "or ask for more with requires_vram_gb."
        ) from exc
    result = folder / "uploads" / "logprobs.jsonl"
    result.parent.mkdir(exist_ok=True)
    with unfinished.open("rb") as source, result.open("wb") as target:
        _copy_in_order(source, target, places)
    unfinished.unlink()
    figures = {"nll": nll.mean, "tokens": nll.tokens, "rows": len(rows.rows), "truncated": rows.truncated}
    run.log({"type": "logprobs", **figures, "progress": 1.0}, file=result, purpose="result")
    print(f"nll {shown(nll.mean)} over {nll.tokens} tokens of {len(rows.rows)} rows", flush=True)


def load_for_measuring(params: LogprobParams, device: str) -> Loaded:
    """Load a model as it is, or an adapter on its base."""
    source, base = find(params)
    tokenizer = load_tokenizer(params, source, base)
    model = load_base(params, base or source, dtype=compute_dtype(params, device), device=device)
    if base is not None:
        model = PeftModel.from_pretrained(model, source.name, subfolder=source.subfolder or None)
    return Loaded(model.eval(), tokenizer)


class _Progress:
    """Tells every few seconds how far it is."""

    def __init__(self, telemetry: Telemetry, total: int) -> None:
        self._telemetry = telemetry
        self._total = total
        self._due = time.monotonic() + _PROGRESS_SECONDS

    def show(self, done: int, nll: Nll) -> None:
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _PROGRESS_SECONDS
        share = round(done / self._total, 4)
        self._telemetry.log({"tag": "progress", "rows": done, "total": self._total, "progress": share})
        self._telemetry.say(f"scored {done}/{self._total} rows, nll {shown(nll.mean)}")


def _line(records: Records, scored: ScoredRow, values: Sequence[float], *, in_blocks: bool) -> bytes:
    record: dict[str, Any] = records.with_tokens(scored, values)
    if in_blocks:
        record |= records.with_blocks(scored, values)
    return (to_json(record) + "\n").encode()


def _copy_in_order(source: BinaryIO, target: BinaryIO, places: dict[int, int]) -> None:
    """The rows were scored by length; whoever reads them knows them by their number."""
    for index in sorted(places):
        source.seek(places[index])
        target.write(source.readline())


if __name__ == "__main__":
    raise SystemExit(main())
