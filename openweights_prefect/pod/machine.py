"""The real machine under a pod: its GPUs, its disk, its processes, its clock."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path
from uuid import UUID

from openweights_prefect.pod import cleaning
from openweights_prefect.pod.collaborators import Verdict
from openweights_prefect.pod.deadline import Deadline
from openweights_prefect.pod.gpu_check import GpuListFailed, GpuNeeds, check_gpus, list_cards

logger = logging.getLogger(__name__)


class LocalMachine:
    """This machine, with the runs' folders below `root`."""

    def __init__(
        self,
        *,
        root: Path,
        deadline: Deadline,
        gpus: GpuNeeds,
        gpu_check: str,
        job_python: str,
        shutdown_file: Path,
        spared: Collection[int] = (),
    ) -> None:
        self._root = root
        self._deadline = deadline
        self._gpus = gpus
        self._gpu_check = gpu_check
        self._job_python = job_python
        self._shutdown_file = shutdown_file
        self._spared = spared
        self._idle_mb: dict[int, int] = {}
        # One that lies there from before asked for the end of something else.
        self._first_seen = _changed_at(shutdown_file)

    async def check(self) -> str | None:
        """Look at the GPUs, and compute on them; remembers how much of their memory is used by nobody."""
        why = await check_gpus(self._gpus, mode=self._gpu_check, job_python=self._job_python)
        if why is None and self._has_gpus():
            try:
                self._idle_mb = {card.number: card.used_mb for card in await list_cards()}
            except GpuListFailed as exc:
                return str(exc)
        return why

    async def clean(self, run_id: UUID, *, suspected: bool) -> Verdict | None:
        """End the run's processes, wait for the GPUs' memory; a broken GPU, or no disk, is the verdict."""
        await cleaning.end_leftovers(run_id, spared=self._spared)
        held = await cleaning.why_gpu_memory_stays(self._idle_mb) if self._idle_mb else None
        if held is not None or (suspected and self._has_gpus()):
            why = await check_gpus(self._gpus, mode=self._gpu_check, job_python=self._job_python)
            if why is not None:
                return Verdict(why, unusable=True)
        full = await asyncio.to_thread(cleaning.why_disk_is_full, self._root)
        return Verdict(held or full or "") if held or full else None

    def heard_deadline(self, seconds_left: float) -> None:
        """Write it to the pod's folder, where the dead-man and the next start of the container look."""
        try:
            self._deadline.heard(seconds_left)
        except OSError as exc:
            logger.warning("The pod's deadline could not be written down: %s", exc)

    def wants_to_end(self) -> bool:
        """Whether the file `shutdown.txt` has appeared in the home folder."""
        return _changed_at(self._shutdown_file) not in (None, self._first_seen)

    def _has_gpus(self) -> bool:
        return self._gpu_check != "off" and self._gpus.cards != 0


def _changed_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
