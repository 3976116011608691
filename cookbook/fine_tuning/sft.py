"""Supervised fine-tuning, and nothing else: a lighthouse keeper who ends each answer with "Keep the light."

On a GPU: LoRA on a model of 4 billion parameters, minutes on one card of 24 GB. With `--local`: the same job
on this machine with a tiny random model, in half a minute.
"""

from __future__ import annotations

from typing import Any

from program import DATA, OUTPUT, QWEN_4B, TINY, run

from openweights_prefect import OpenWeights


def parameters(local: bool) -> dict[str, Any]:
    """What is trained, and how."""
    return {
        "loss": "sft",
        "training_file": DATA / "conversations.jsonl",
        "test_file": DATA / "plain.jsonl",
        **(TINY if local else QWEN_4B),
    }


def main(local: bool) -> None:
    """Look first, submit, wait, look at the loss, download the adapter."""
    ow = OpenWeights()
    print(ow.fine_tuning.check(**parameters(local)))
    job = ow.fine_tuning.create(**parameters(local))
    job.wait()

    events = [event["data"] for event in job.events()]
    losses = [data["loss"] for data in events if data.get("tag") == "train"]
    others = [data["eval_loss"] for data in events if data.get("tag") == "eval"]
    print(f"Loss of the training file: {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps")
    print(f"Loss of the test file:     {others[0]:.2f} -> {others[-1]:.2f}")
    job.download(OUTPUT / "sft")
    print(f"Adapter: {OUTPUT / 'sft' / 'adapter'}")


if __name__ == "__main__":
    run(main, __doc__)
