"""What a pod imports once for all its jobs of ours: a plan for `runtime.preloaded`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from typing import Any

ENVIRONMENT = {
    # As in `jobs.training.train`, for it is read when the libraries are imported.
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    # To ask the driver's own library whether there is a GPU leaves CUDA alone, which no fork would survive.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # No thread of Arrow's allocator.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
MODULES = ("openweights_prefect.jobs.training.train", "openweights_prefect.jobs.logprob.measure")
LATE = ("HF_TOKEN", "WANDB_API_KEY")

# What everything begins with, and nothing patches.
_FIRST = ("torch", "pandas", "pyarrow")
# They are imported on demand, which takes a second: most trainings need one of the models and the others.
_ON_DEMAND = (
    "torch.distributed.tensor",
    "transformers.generation",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)
_CUDA_DEVICE = "/dev/nvidia-uvm"


def preload() -> None:
    """Import what trainings need, as far as that neither touches a GPU nor comes before Unsloth."""
    for name in _FIRST:
        importlib.import_module(name)
    torch: Any = sys.modules["torch"]
    if torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None:
        return  # Unsloth patches the others, so it comes before them, and it starts CUDA.
    importlib.import_module("openweights_prefect.jobs.training.job")
    for name in _ON_DEMAND:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def why_not_fork() -> str | None:
    """CUDA is unusable in the fork of a process that has used it."""
    torch: Any = sys.modules["torch"]
    if torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork() or _has_open(_CUDA_DEVICE):
        return "a library has used the GPU"
    return None


def _has_open(device: str) -> bool:
    numbers = os.listdir("/proc/self/fd")  # noqa: PTH208 - one of them is this listing's own, and gone
    return any(os.path.realpath(f"/proc/self/fd/{number}") == device for number in numbers)
