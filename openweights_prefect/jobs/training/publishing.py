"""What is done with a trained model: saved, kept by the job, and pushed to Hugging Face."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights_prefect.jobs.training import hub
from openweights_prefect.jobs.training.model_card import Kind, losses, model_card
from openweights_prefect.jobs.training.results import (
    ADAPTER,
    KEPT,
    MERGED,
    MODEL,
    keep_result,
    restore_result,
    save_merged,
    save_result,
)
from openweights_prefect.runtime.inside import CurrentRun, RunFiles

if TYPE_CHECKING:
    from openweights_prefect.jobs.training.params import TrainingParams

_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "bitsandbytes")
_CARD = "README.md"


class Publisher:
    """The result of one job."""

    def __init__(self, params: TrainingParams, run: CurrentRun, uploads: Path) -> None:
        self._params, self._run, self._uploads = params, run, uploads
        self._kind: Kind = "adapter" if params.is_peft else "model"

    @property
    def result(self) -> Path:
        """Where the result is, once there is one."""
        return self._uploads / (ADAPTER if self._params.is_peft else MODEL)

    def is_kept(self, earlier: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an earlier run of the job was lost after training and before it had pushed its result."""
        return bool(self._params.push) and any(data.get("tag") == KEPT for data in earlier)

    def restore(self, earlier: Sequence[Mapping[str, Any]]) -> None:
        """Bring back the result that such a run kept."""
        restore_result([{"data": data} for data in earlier], RunFiles(), self._uploads)

    def save(self, model: Any, tokenizer: Any, *, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the result with its model card; when it will be pushed, the job keeps it from now on."""
        folder = save_result(model, tokenizer, self._params, self._uploads)
        card = self._card(self._kind, history)
        (folder / _CARD).write_text(card, encoding="utf-8")
        print(f"saved {folder.relative_to(self._uploads.parent)}", flush=True)
        if self._params.push:
            keep_result(self._run, folder)

    def check(self) -> None:
        """Raise now, and not after hours of training, what would keep the result from being pushed."""
        if self._params.push:
            hub.check(self._params, token=os.environ.get("HF_TOKEN"))

    def push(self, model: Any, tokenizer: Any, *, history: Sequence[Mapping[str, Any]]) -> None:
        """Push the result, merged if that was asked for; uses up `model`.

        `history` is what the trainer, or the events of the run that trained, say of the losses.
        """
        token = os.environ.get("HF_TOKEN")
        if self._params.is_peft and self._params.merge_before_push:
            card = self._card("merged", history)
            with tempfile.TemporaryDirectory(prefix="merged-", dir=self._uploads.parent) as folder:
                merged = save_merged(model, tokenizer, Path(folder, "push", MERGED))
                address = hub.push(merged, self._params, token=token, card=card)
        else:
            card = self._card(self._kind, history)
            address = hub.push(self.result, self._params, token=token, card=card)
        print(f"pushed {address}", flush=True)
        self._run.log({"tag": "push", "url": address, "repository": self._params.finetuned_model_id})

    def _card(self, kind: Kind, history: Sequence[Mapping[str, Any]]) -> str:
        return model_card(
            vars(self._params),
            job_id=self._run.job_id,
            kind=kind,
            losses=losses(history),
            versions=_versions(),
        )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
