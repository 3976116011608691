"""Fine-tunes a chat model to talk like a pirate, on this machine: run `ow up` first.

`--tiny` takes a random model made on the spot: seconds instead of minutes, but it learns only to babble.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path

import pirate
from program import HERE, in_job_environment, one_line
from pydantic import BaseModel

from openweights_prefect import Jobs, OpenWeights, register
from openweights_prefect.errors import OpenWeightsError

PROMPTS = ["What is the capital of Portugal?", "How do I make tea?", "Why do people sleep?"]


class AdditionParams(BaseModel):
    """The two numbers."""

    a: int
    b: int


@register("addition")
class Addition(Jobs):
    """A job type of one's own: files to mount, parameters, and the command to run."""

    mount = {str(HERE / "addition.py"): "addition.py"}  # noqa: RUF012 (read, never changed)
    params = AdditionParams
    requires_vram_gb = 0

    def get_entrypoint(self, validated_params: AdditionParams) -> str:
        """The command that runs in the job's folder."""
        return shlex.join(["python", "addition.py", str(validated_params.a), str(validated_params.b)])


def main() -> None:
    """Train, look at the result, and see that no work is done twice."""
    parser = argparse.ArgumentParser(description="Fine-tune a chat model on this machine.")
    parser.add_argument("--tiny", action="store_true", help="use a tiny random model instead of SmolLM2-135M")
    parser.add_argument("--epochs", type=int, help="passes over the conversations (1, or 6 with --tiny)")
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart-output"), help="folder for the results"
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    model = "./tiny-model" if arguments.tiny else "./smollm2"
    print(f"Making the model folder {model} ...")
    in_job_environment("models.py", "tiny" if arguments.tiny else "smollm2", model)
    conversations = output / "conversations.jsonl"
    print(f"Writing {pirate.write(conversations)} conversations to {conversations}")

    ow = OpenWeights()
    training_file = ow.files.upload(conversations, purpose="conversations")["id"]
    params = {
        "model": model,
        "training_file": training_file,
        "loss": "sft",
        "epochs": arguments.epochs or (6 if arguments.tiny else 1),
        "r": 8,
        "learning_rate": 5e-3 if arguments.tiny else 1e-3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 2,
    }
    job = ow.fine_tuning.create(**params)
    print(f"Job {job.id} is {job.status}: {job.url or 'waiting for a pod'}")
    job.wait()

    events = [event["data"] for event in ow.events.list(job_id=job.id)]
    losses = [(data["step"], data["loss"]) for data in events if data.get("tag") == "train"]
    print("Loss: " + " -> ".join(f"{loss:.2f}" for _, loss in losses[:: max(1, len(losses) // 6)]))
    print(f"Curve: {plot(losses, output / 'loss.png')}")

    job.download(output)
    adapter = next(output.rglob("adapter_config.json")).parent
    print(f"Adapter: {adapter}")
    replies = json.loads(in_job_environment("generate.py", model, str(adapter), text=json.dumps(PROMPTS)))
    for prompt, before, after in zip(PROMPTS, replies["before"], replies["after"], strict=True):
        print(f"\n  {prompt}\n    before: {one_line(before)}\n    after:  {one_line(after)}")

    started = time.perf_counter()
    again = ow.fine_tuning.create(**params)
    print(f"\nThe same job again: {again.id} is {again.status}, after {time.perf_counter() - started:.2f} s")

    addition = ow.addition.create(a=5, b=9)
    addition.wait()
    print(f"Custom job {addition.id}: 5 + 9 = {ow.events.latest(['result'], job_id=addition.id)['result']}")


def plot(losses: list[tuple[int, float]], path: Path) -> Path:
    """Save the loss curve."""
    import matplotlib as mpl  # Slow to import, and needed only at the end.

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


if __name__ == "__main__":
    try:
        main()
    except OpenWeightsError as exc:
        raise SystemExit(f"error: {exc}") from None
