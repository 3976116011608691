"""One side of the training benchmark, in the job environment: a job of ours, or a bare script for TRL.

`python training_steps.py ours|bare CASE BLOCK`, in the folder of a job of ours. Trains a block of steps for
each line that it reads, and answers with one: how long they took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from transformers import trainer as transformers_trainer

COMMON = {
    "output_dir": "bare",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}


def main(side: str, case: str, block: int) -> None:
    """Train until there is nothing more to read."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(f"{side}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(log, number)

    class Gate(transformers.TrainerCallback):  # type: ignore[misc]
        """In both sides alike: every trainer has the default callbacks."""

        def __init__(self) -> None:
            self._blocks = Blocks(sys.stdin, answers)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % block == 0:
                self._blocks.next()

    transformers_trainer.DEFAULT_CALLBACKS.append(Gate)
    if side == "ours":
        from openweights_prefect.jobs.training.job import train

        train(Path.cwd(), "weighted_sft" if case == "weighted" else "fine_tuning")
    else:
        bare(case, json.loads(Path("params.json").read_text(encoding="utf-8")))


class Blocks:
    """Measures what happens between two pauses, in both of which the other side may be at work."""

    def __init__(self, orders: TextIO, answers: TextIO) -> None:
        self._orders, self._answers = orders, answers
        self._began: tuple[float, float] | None = None

    def next(self) -> None:
        """Tell of the block that has ended, and wait for the order to begin another."""
        now = (time.perf_counter(), time.process_time())
        seconds, cpu = (0.0, 0.0)
        if self._began is not None:
            seconds, cpu = now[0] - self._began[0], now[1] - self._began[1]
        self._answers.write(json.dumps({"seconds": seconds, "cpu_seconds": cpu}) + "\n")
        if not self._orders.readline():
            os._exit(0)  # Measured; what a job does at its end is another matter.
        self._began = (time.perf_counter(), time.process_time())


def bare(case: str, params: dict[str, Any]) -> None:
    """What a script of one's own would do; TRL renders, tokenizes and masks by itself."""
    import datasets
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    transformers.set_seed(params["seed"])
    names = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate")
    arguments = {
        **COMMON,
        **{name: params[name] for name in (*names, "warmup_steps", "weight_decay", "seed")},
    }
    rows = [json.loads(line) for line in Path("data.jsonl").read_text(encoding="utf-8").splitlines()]
    lora = ("r", "lora_alpha", "use_rslora", "target_modules")
    given = {
        "model": transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32),
        "processing_class": transformers.AutoTokenizer.from_pretrained("model"),
        "peft_config": LoraConfig(task_type="CAUSAL_LM", **{name: params[name] for name in lora}),
        "train_dataset": datasets.Dataset.from_list(rows),
    }
    if case == "dpo":
        trainer = DPOTrainer(args=DPOConfig(**arguments, beta=params["beta"], max_length=None), **given)
    elif case == "orpo":
        trainer = ORPOTrainer(args=ORPOConfig(**arguments, beta=params["beta"], max_length=512), **given)
    else:
        trainer = SFTTrainer(args=SFTConfig(**arguments, assistant_only_loss=True, max_length=None), **given)
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
