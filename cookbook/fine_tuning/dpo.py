"""Preferences with DPO, on top of supervised fine-tuning: answers without the preamble.

The first job is that of `sft.py`; if you ran it, it is not run again. The second one goes on with its
adapter: `model` is the id of the first job, whose model is the reference that DPO stays near. On a GPU:
minutes on one card of 24 GB. With `--local`: a tiny random model on this machine.
"""

from __future__ import annotations

from typing import Any

import sft
from program import DATA, OUTPUT, QWEN_4B, TINY, run

from openweights_prefect import OpenWeights


def parameters(local: bool, model: str) -> dict[str, Any]:
    """What is preferred, how strongly, and how fast it is learned: slower than in supervised training."""
    return {
        "loss": "dpo",
        "beta": 0.1,
        "training_file": DATA / "preferences.jsonl",
        **(TINY if local else QWEN_4B),
        "learning_rate": 1e-3 if local else 5e-6,
        "model": model,
    }


def main(local: bool) -> None:
    """Two jobs in a row."""
    ow = OpenWeights()
    first = ow.fine_tuning.create(**sft.parameters(local))
    first.wait()
    job = ow.fine_tuning.create(**parameters(local, first.id))
    job.wait()

    events = [event["data"] for event in job.events()]
    steps = [data for data in events if data.get("tag") == "train"]
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        print(f"{name}: {steps[0][name]:.3f} -> {steps[-1][name]:.3f}")
    job.download(OUTPUT / "dpo")
    print(f"Adapter: {OUTPUT / 'dpo' / 'adapter'}")


if __name__ == "__main__":
    run(main, __doc__)
