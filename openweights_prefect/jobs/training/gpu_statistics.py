"""GPU memory and utilisation, every few steps; nothing where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from openweights_prefect.jobs.training.reporting import Telemetry

_MEGABYTE = 1024 * 1024


# mypy sees no transformers in the control environment.
class GpuStatistics(TrainerCallback):  # type: ignore[misc]
    """Logs what `read` says of the GPU of the first process, every ten steps and after the first."""

    def __init__(
        self, telemetry: Telemetry, *, read: Callable[[], dict[str, Any]] | None = None, every: int = 10
    ) -> None:
        self._telemetry = telemetry
        self._read = read or (read_gpu if torch.cuda.is_available() else None)
        self._every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log the state of the GPU; one that cannot be read is not asked again."""
        step = state.global_step
        if self._read is None or not state.is_world_process_zero or (step != 1 and step % self._every):
            return
        try:
            data = self._read()
        except Exception as exc:  # Drivers fail in many ways, and training does not need these figures.
            self._read = None
            self._telemetry.say(f"warning: GPU statistics end here ({exc})")
            return
        self._telemetry.log_once({**data, "step": step, "tag": "gpu"})


def read_gpu() -> dict[str, Any]:
    """The figures of the current GPU; its utilisation is None where `pynvml` is not installed."""
    free, _ = torch.cuda.mem_get_info()
    return {
        "gpu_memory_allocated_mb": round(torch.cuda.memory_allocated() / _MEGABYTE, 1),
        "gpu_memory_reserved_mb": round(torch.cuda.memory_reserved() / _MEGABYTE, 1),
        "gpu_memory_free_mb": round(free / _MEGABYTE, 1),
        "gpu_name": torch.cuda.get_device_name(),
        "gpu_utilization_percent": _utilization(),
    }


def _utilization() -> int | None:
    try:
        return int(torch.cuda.utilization())
    except Exception:  # No `pynvml`, or a driver that does not answer: the other figures still count.
        return None
