"""Samples answers while a model trains, and prints how one of them changes.

The prompts are questions that are not in the training file; they are answered before the first step, every
so many steps, and after the last one. On a GPU: minutes on one card of 24 GB. With `--local`: a tiny random
model on this machine, which goes from noise to babble in the keeper's words.
"""

from __future__ import annotations

import json
from typing import Any

from program import DATA, QWEN_4B, TINY, one_line, run

from openweights_prefect import OpenWeights


def parameters(local: bool) -> dict[str, Any]:
    """What is trained, and what is asked meanwhile; temperature 0 always takes the likeliest token."""
    callback = {
        "dataset": DATA / "questions.jsonl",
        "eval_steps": 10,
        "tag": "keeper",
        "temperature": 0,
        "max_tokens": 24,
    }
    return {
        "loss": "sft",
        "training_file": DATA / "conversations.jsonl",
        "sampling_callbacks": [callback],
        **(TINY if local else QWEN_4B),
    }


def main(local: bool) -> None:
    """Train, then read the file of each sampling."""
    ow = OpenWeights()
    job = ow.fine_tuning.create(**parameters(local))
    job.wait()

    for event in job.events():
        if event["data"].get("type") != "samples" or event["file"] is None:
            continue
        lines = ow.files.content(event["file"]).decode().splitlines()
        samples = [json.loads(line) for line in lines]
        if event["data"]["step"] == 0:
            print(samples[0]["messages"][-1]["content"])
        print(f"  step {event['data']['step']:2}: {one_line(samples[0]['completion'])}")


if __name__ == "__main__":
    run(main, __doc__)
