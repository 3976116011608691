"""QLoRA: an adapter for a model of 70 billion parameters, whose weights are held in 4 bits.

On a GPU: one card of 80 GB, for which it is enough that the weights are quantized; the gated model needs the
secret `HF_TOKEN` (`ow env set HF_TOKEN`). With `--local`: LoRA on a tiny random model without the
quantization, which needs a GPU; everything else is the same job.
"""

from __future__ import annotations

from typing import Any

from program import DATA, OUTPUT, TINY, run

from openweights_prefect import OpenWeights


def parameters(local: bool) -> dict[str, Any]:
    """What is trained, and how: small batches that are added up, and a checkpoint every 20 minutes."""
    gpu = {
        "model": "meta-llama/Llama-3.3-70B-Instruct",
        "load_in_4bit": True,
        "r": 32,
        "lora_alpha": 64,
        "learning_rate": 5e-5,
        "epochs": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "max_seq_length": 2048,
        "allowed_hardware": ["1x A100", "1x A100S", "1x H100S"],
        "secrets": ["HF_TOKEN"],
    }
    return {
        "loss": "sft",
        "training_file": DATA / "conversations.jsonl",
        "save_minutes": 20,
        **(TINY if local else gpu),
    }


def main(local: bool) -> None:
    """See what it will cost before it runs, and what it needed afterwards."""
    job = OpenWeights().fine_tuning.create(**parameters(local))
    if job.status == "pending":
        print(job.explain())
    job.wait()

    events = [event["data"] for event in job.events()]
    start = next(data for data in events if data.get("tag") == "start")
    print(f"Trained {start['trainable_parameters']:,} parameters on {start['trained_tokens']} tokens")
    memory = [data["gpu_memory_reserved_mb"] for data in events if data.get("tag") == "gpu"]
    print(f"GPU memory: {max(memory) / 1024:.1f} GB" if memory else "GPU memory: none, it ran on a CPU")
    print(f"Cost: {job.cost or 0:.4f} USD")
    job.download(OUTPUT / "qlora_70b")


if __name__ == "__main__":
    run(main, __doc__)
