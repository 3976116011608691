"""A folder for trainings: models, data, and jobs laid out as an agent does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openweights_prefect
from openweights_prefect.jobs.fine_tuning.params import FineTuningParams
from openweights_prefect.jobs.weighted_sft.params import WeightedSftParams
from openweights_prefect.runtime import forking, wire
from openweights_prefect.runtime.entrypoint import base_environment

REPOSITORY = Path(openweights_prefect.__file__).parent.parent
ROWS = 240
_HEX = "0123456789ab"

# The tokenizer of the cookbook's tiny model, with weights for which a step takes some tens of milliseconds.
_WIDEN = """
import sys, torch, transformers
config = transformers.LlamaConfig.from_pretrained(sys.argv[1])
config.update({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4})
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


class TrainingSite:
    """Where the jobs of this benchmark are."""

    def __init__(self, folder: Path, job_python: str) -> None:
        self.folder = folder
        self.job_python = job_python
        (folder / "lib").mkdir()
        (folder / "lib" / "openweights_prefect").symlink_to(Path(openweights_prefect.__file__).parent)

    def make_models(self) -> None:
        """`tiny`, and `small` for which a step takes some tens of milliseconds."""
        for name in ("tiny", "small"):
            script = REPOSITORY / "cookbook" / "fine_tuning" / "models.py"
            self._run(str(script), "tiny", str(self.folder / name))
        self._run("-c", _WIDEN, str(self.folder / "small"))

    def make_job(self, name: str, *, model: str, case: str, **values: Any) -> Path:
        """The folder of a job; `case` is a loss, or `weighted`."""
        work = self.folder / name
        (work / "uploads").mkdir(parents=True)
        (work / "model").symlink_to(self.folder / model)
        rows = preferences() if case in ("dpo", "orpo") else conversations()
        (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        purpose = "preference" if case in ("dpo", "orpo") else "conversations"
        file = f"{purpose}:file-{_HEX}"
        kind = WeightedSftParams if case == "weighted" else FineTuningParams
        loss = "sft" if case == "weighted" else case
        params = kind(**{"model": "model", "training_file": file, "loss": loss, **values})
        stored = {**params.model_dump(mode="json"), "files": {file: "data.jsonl"}}
        (work / "params.json").write_text(json.dumps(stored), encoding="utf-8")
        return work

    def environment(self, work: Path) -> dict[str, str]:
        """What a job finds in its environment; no agent answers, so that nothing waits for one."""
        return {
            **base_environment(self.job_python),
            "PYTHONPATH": str(self.folder / "lib"),
            wire.RUN_VARIABLE: forking.UNMARKED,
            wire.JOB_VARIABLE: f"ftjob-{_HEX}",
            wire.SPOOL_VARIABLE: str(work / "events.jsonl"),
            wire.SOCKET_VARIABLE: str(self.folder / "no-agent"),
            "N_GPUS": "0",
        }

    def _run(self, *command: str) -> None:
        subprocess.run(
            [self.job_python, *command],
            env=base_environment(self.job_python),
            check=True,
            capture_output=True,
        )


def conversations() -> list[Mapping[str, Any]]:
    """Conversations of different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + 1?" + " Tell me a joke." * (i % 3)},
                {"role": "assistant", "content": f"Arr, matey! It be {i + 1}." + " Aye, the sea." * (i % 8)},
            ]
        }
        for i in range(ROWS)
    ]


def preferences() -> list[Mapping[str, Any]]:
    """Pairs of different lengths."""
    return [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": f"I like dogs {i}." + " Soup." * (i % 5)}],
        }
        for i, row in enumerate(conversations())
    ]
