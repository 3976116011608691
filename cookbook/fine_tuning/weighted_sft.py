"""Weighted fine-tuning: answers become likely, and the hedges that follow half of them unlikely.

Messages are lists of blocks. The user's blocks have weight 0, answers have none, which is 1, and hedges have
-0.2: the loss pushes them down. Blocks have tags, so that each kind is followed while it trains. Negative
weights have no bottom: keep them small and the training short. On a GPU: minutes on one card of 24 GB. With
`--local`: a tiny random model on this machine.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from program import DATA, OUTPUT, QWEN_4B, TINY, run

from openweights_prefect import OpenWeights


def parameters(local: bool) -> dict[str, Any]:
    """What is trained, and measured: the same file."""
    return {
        "training_file": DATA / "weighted.jsonl",
        "logp_callback_datasets": {"training": DATA / "weighted.jsonl"},
        **(TINY if local else QWEN_4B),
    }


def main(local: bool) -> None:
    """Train, and compare the blocks before and after."""
    job = OpenWeights().weighted_sft.create(**parameters(local))
    job.wait()

    events = [event["data"] for event in job.events()]
    blocks = [data for data in events if data.get("type") == "logprob_block"]
    last = max(data["step"] for data in blocks)
    for tag in ("answer", "hedge"):
        before, after = (
            fmean(data["logprobs"] for data in blocks if data["tag"] == tag and data["step"] == step)
            for step in (0, last)
        )
        print(f"{tag}: log-probability {before:.1f} -> {after:.1f}")
    job.download(OUTPUT / "weighted_sft")
    print(f"Adapter: {OUTPUT / 'weighted_sft' / 'adapter'}")


if __name__ == "__main__":
    run(main, __doc__)
