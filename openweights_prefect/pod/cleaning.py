"""What one run leaves must not reach the next: processes, files, GPU memory, a full disk."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from openweights_prefect.pod.gpu_check import Card, GpuListFailed, list_cards
from openweights_prefect.pod.processes import RunProcesses

logger = logging.getLogger(__name__)

FREE_DISK_FLOOR = 2 << 30
_GPU_MEMORY_SLACK_MB = 512
_GPU_WAIT_SECONDS = 15.0
_GPU_LOOK_SECONDS = 0.5


async def end_leftovers(run_id: object, *, spared: Collection[int] = ()) -> None:
    """End what is still alive of a run that has ended, when no other one has begun."""
    if killed := await asyncio.to_thread(RunProcesses(run_id, spared=spared).sweep):
        logger.warning("Run %s had left %d processes; they were killed.", run_id, killed)


def remove_old_runs(root: Path) -> None:
    """Delete the folders of runs that an earlier process of this pod did not come to delete."""
    shutil.rmtree(root, ignore_errors=True)


async def why_gpu_memory_stays(
    idle_mb: Mapping[int, int], *, seconds: float = _GPU_WAIT_SECONDS
) -> str | None:
    """Why the cards are not as free as when they were `idle_mb`, after a bounded wait, or None.

    The driver gives memory back a moment after a process died. A card that is not named was empty.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            held = [card for card in await list_cards() if _is_held(card, idle_mb)]
        except GpuListFailed as exc:
            return str(exc)
        if not held:
            return None
        if asyncio.get_running_loop().time() >= deadline:
            cards = ", ".join(f"{card.used_mb} MB of GPU {card.number}" for card in held)
            return f"{cards} stayed in use after a run"
        await asyncio.sleep(_GPU_LOOK_SECONDS)


def why_disk_is_full(folder: Path, *, floor_bytes: int = FREE_DISK_FLOOR) -> str | None:
    """Why another run could not write here, or None."""
    free = shutil.disk_usage(folder).free
    return None if free >= floor_bytes else f"only {free / 1e9:.1f} GB of disk are free"


def _is_held(card: Card, idle_mb: Mapping[int, int]) -> bool:
    return card.used_mb > idle_mb.get(card.number, 0) + _GPU_MEMORY_SLACK_MB
