"""Preferences with ORPO: what takes two jobs with DPO, in one and without a reference model.

The loss is that of supervised fine-tuning on the chosen answers, plus `beta` times how much less likely than
these the rejected ones are; so the learning rate is that of supervised training. On a GPU: minutes on one
card of 24 GB. With `--local`: a tiny random model on this machine.
"""

from __future__ import annotations

from typing import Any

from program import DATA, OUTPUT, QWEN_4B, TINY, run

from openweights_prefect import OpenWeights


def parameters(local: bool) -> dict[str, Any]:
    """What is trained, and how."""
    return {
        "loss": "orpo",
        "beta": 0.1,
        "training_file": DATA / "preferences.jsonl",
        **(TINY if local else QWEN_4B),
    }


def main(local: bool) -> None:
    """Train, and look at both parts of the loss."""
    job = OpenWeights().fine_tuning.create(**parameters(local))
    job.wait()

    events = [event["data"] for event in job.events()]
    steps = [data for data in events if data.get("tag") == "train"]
    for name in ("loss", "nll_loss", "log_odds_ratio"):
        print(f"{name}: {steps[0][name]:.3f} -> {steps[-1][name]:.3f}")
    job.download(OUTPUT / "orpo")
    print(f"Adapter: {OUTPUT / 'orpo' / 'adapter'}")


if __name__ == "__main__":
    run(main, __doc__)
