"""The programs that RunPod's machines put into a pod: `nvidia-smi` and `runpodctl`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from openweights_prefect.provisioning.hardware import gpu_by_id
from openweights_prefect.simulator.hosts import version
from openweights_prefect.simulator.model import Pod

_PROGRAMS = {"nvidia-smi": "nvidia_smi.py", "runpodctl": "runpodctl.py"}
_DRIVERS = {"12.4": "550.127.05", "12.8": "570.124.06", "12.9": "575.57.08", "13.0": "580.95.05"}
_WITHOUT_ECC = ("GeForce", "AMD")


def install(folder: Path, pod: Pod, *, base_url: str) -> None:
    """Write the programs of one pod into a folder; what they need is baked in, an environment may be lost."""
    folder.mkdir(parents=True, exist_ok=True)
    gpus = folder / "gpus.json"
    write_gpus(folder, pod)
    baked = {"nvidia-smi": str(gpus), "runpodctl": base_url}
    for name, file in _PROGRAMS.items():
        source = Path(__file__).with_name("shim_programs") / file
        command = shlex.join([sys.executable, "-I", "-S", str(source), baked[name]])
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        program.chmod(0o755)


def write_gpus(folder: Path, pod: Pod) -> None:
    """Tell the pod's `nvidia-smi` which cards there are now."""
    gpu = gpu_by_id(pod.gpu_id)
    memory_mib = 1024 * (gpu.memory_gb if gpu else 0)
    has_ecc = not any(word in pod.gpu_id for word in _WITHOUT_ECC)
    cards = [
        _card(pod, index, memory_mib, has_ecc=has_ecc)
        for index in range(max(0, pod.gpu_count - pod.gpus_missing))
    ]
    known = [v for v in _DRIVERS if version(v) <= version(pod.cuda)]
    driver = _DRIVERS[max(known, key=version)] if known else "550.54.14"
    document = {"driver": driver, "cuda": pod.cuda, "gpus": cards, "compute_apps": []}
    temporary = folder / "gpus.json.new"
    temporary.write_text(json.dumps(document), encoding="utf-8")
    temporary.replace(folder / "gpus.json")


def _card(pod: Pod, index: int, memory_mib: int, *, has_ecc: bool) -> dict[str, Any]:
    errors = pod.ecc_errors if index == 0 else 0
    return {
        "index": index,
        "name": pod.gpu_id,
        "uuid": f"GPU-{pod.id}-{index}",
        "memory_mib": memory_mib,
        "ecc": "Enabled" if has_ecc else "[N/A]",
        "ecc_errors": errors if has_ecc or errors else "[N/A]",
    }
