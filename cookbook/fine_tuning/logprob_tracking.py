"""Follows log-probabilities while a model trains: what it learns, and what it learns along with it.

The model learns short answers that end with "Keep the light.". Two datasets are measured as it does: `plain`,
questions of another kind without that habit, and `tagged`, new answers in two blocks each, the fact and the
habit. The habit should become likely, the facts hardly. On a GPU: minutes on one card of 24 GB. With
`--local`: a tiny random model on this machine.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from program import DATA, OUTPUT, QWEN_4B, TINY, run

from openweights_prefect import OpenWeights

Curve = list[tuple[int, float]]


def parameters(local: bool) -> dict[str, Any]:
    """What is trained, and what is measured at the steps 1, 2, ... 9, 10, 20, ..."""
    return {
        "loss": "sft",
        "training_file": DATA / "conversations.jsonl",
        "logp_callback_datasets": {"plain": DATA / "plain.jsonl", "tagged": DATA / "tagged.jsonl"},
        "eval_every_n_steps": "log",
        **(TINY if local else QWEN_4B),
    }


def main(local: bool) -> None:
    """Train, then draw both kinds of events."""
    job = OpenWeights().fine_tuning.create(**parameters(local))
    job.wait()
    events = [event["data"] for event in job.events()]

    datasets: dict[str, Curve] = defaultdict(list)
    blocks: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for data in events:
        if data.get("type") in ("logprobs", "logprobs_blockwise"):
            datasets[data["tag"]].append((data["step"], data["nll"]))
        elif data.get("type") == "logprob_block":
            blocks[data["tag"]][data["step"]].append(data["logprobs"])
    tags = {
        tag: [(step, fmean(values)) for step, values in sorted(steps.items())]
        for tag, steps in blocks.items()
    }
    for name, curve in datasets.items():
        print(f"{name}: {curve[0][1]:.2f} -> {curve[-1][1]:.2f} nats per token")
    for name, curve in tags.items():
        print(f"{name}: log-probability of a block {curve[0][1]:.1f} -> {curve[-1][1]:.1f}")
    print(f"Plot: {plot(datasets, tags, OUTPUT / 'logprob_tracking.png')}")


def plot(datasets: dict[str, Curve], tags: dict[str, Curve], path: Path) -> Path:
    """Datasets on the left, tagged blocks on the right."""
    import matplotlib as mpl  # Slow to import, and needed only at the end.

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(ncols=2, figsize=(10, 4))
    titles = ("negative log-likelihood per token", "log-probability of a block")
    for axes, curves, title in zip(panels, (datasets, tags), titles, strict=True):
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


if __name__ == "__main__":
    run(main, __doc__)
