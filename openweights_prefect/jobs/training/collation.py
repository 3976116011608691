"""Rows for the trainers, their batches, and the check that a batch trains what the rows say."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openweights_prefect.jobs.training.examples import Example
from openweights_prefect.jobs.training.preferences import Pair

IGNORED = -100


def labelled(rows: Sequence[Example]) -> datasets.Dataset:
    """Rows for SFT: a label is the token itself where it is trained on."""
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": row.input_ids,
                "labels": [
                    token if weight else IGNORED
                    for token, weight in zip(row.input_ids, row.weights, strict=True)
                ],
            }
            for row in rows
        ]
    )


def weighted(rows: Sequence[Example]) -> datasets.Dataset:
    """Rows for weighted SFT."""
    return datasets.Dataset.from_list([{"input_ids": row.input_ids, "weights": row.weights} for row in rows])


def paired(rows: Sequence[Pair]) -> datasets.Dataset:
    """Rows for the preference losses."""
    return datasets.Dataset.from_list([row._asdict() for row in rows])


class WeightedCollator:
    """Pads weighted rows on the right; the mask says where a row ends, whatever token pads it."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        weights = [torch.tensor(row["weights"], dtype=torch.float32) for row in rows]
        masks = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "weights": pad_sequence(weights, batch_first=True),
        }


class _Row(NamedTuple):
    """A row as a trainer sees it, without padding; `trained` is the sum of its absolute weights."""

    input_ids: tuple[int, ...]
    trained: float


class MaskCheck:
    """Compares a batch with the rows that it was made of, by their tokens."""

    def __init__(self, rows: Sequence[Example | Pair]) -> None:
        self._rows = rows

    def __call__(self, batch: Mapping[str, Tensor]) -> None:
        """Raise `RuntimeError` unless each row of the batch trains just what it should."""
        seen = list(_seen(batch))
        lengths = {len(row.input_ids) for row in seen}
        wanted: dict[tuple[int, ...], set[float]] = defaultdict(set)
        for given in self._rows:
            for row in _given(given, lengths):
                wanted[row.input_ids].add(row.trained)
        for row in seen:
            if row.input_ids not in wanted:
                raise RuntimeError(
                    f"The first batch has a row of {len(row.input_ids)} tokens that is not in the data."
                )
            if not any(math.isclose(row.trained, each, rel_tol=1e-4) for each in wanted[row.input_ids]):
                raise RuntimeError(
                    f"A row of the first batch has {row.trained:g} trained tokens (or weight) where the data "
                    f"have {max(wanted[row.input_ids]):g}: what is trained would not be what was asked for."
                )


def trained_amount(batch: Mapping[str, Tensor]) -> Tensor:
    """What a batch counts in an average: its pairs, its trained tokens or its absolute weight."""
    if "weights" in batch:
        return batch["weights"][:, 1:].abs().sum()
    if "labels" in batch:
        return (batch["labels"][:, 1:] != IGNORED).sum()
    rows = batch["chosen_input_ids"] if "chosen_input_ids" in batch else batch["input_ids"]
    pairs = len(rows) if "chosen_input_ids" in batch else len(rows) // 2
    return torch.tensor(pairs, device=rows.device)


def _given(row: Example | Pair, lengths: set[int]) -> Iterator[_Row]:
    if isinstance(row, Example):
        if len(row.input_ids) in lengths:
            yield _Row(tuple(row.input_ids), sum(map(abs, row.weights[1:])))
        return
    for answer in (row.chosen_ids, row.rejected_ids):
        if len(row.prompt_ids) + len(answer) in lengths:
            yield _Row((*row.prompt_ids, *answer), len(answer))


def _seen(batch: Mapping[str, Tensor]) -> Iterator[_Row]:
    if "chosen_input_ids" in batch:
        for side in ("chosen", "rejected"):
            trained = (batch[f"{side}_labels"] != IGNORED).float()
            yield from _unpadded(batch[f"{side}_input_ids"], trained, batch[f"{side}_attention_mask"])
    elif "completion_mask" in batch:
        yield from _unpadded(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])
    else:
        trained = batch["weights"].abs() if "weights" in batch else (batch["labels"] != IGNORED).float()
        if "attention_mask" in batch:
            trained = trained.clone()
            trained[:, 0] = 0
            yield from _unpadded(batch["input_ids"], trained, batch["attention_mask"])
        else:  # Packed: a document begins where the positions do.
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
                ids = tuple(batch["input_ids"][0, start:end].tolist())
                yield _Row(ids, float(trained[0, start + 1 : end].sum()))


def _unpadded(ids: Tensor, trained: Tensor, mask: Tensor) -> Iterator[_Row]:
    for row, amounts, kept in zip(ids, trained, mask.bool(), strict=True):
        yield _Row(tuple(row[kept].tolist()), float(amounts[kept].sum()))
