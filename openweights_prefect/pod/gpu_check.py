"""Whether the cards of this pod are those that were paid for, and compute."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openweights_prefect.errors import ConfigurationError, OpenWeightsError
from openweights_prefect.pod import gpu_probe

logger = logging.getLogger(__name__)

_LIST_SECONDS = 60.0
_PROBE_SECONDS = 300.0
_KILLED_SECONDS = 2.0
_LEAST_MEMORY = 0.85
"""Of what the type has by name: ECC takes a sixteenth, and some makers count in powers of ten."""
_FIELDS = "index,name,memory.total,memory.used"
_ECC_FIELDS = "index,ecc.errors.uncorrected.volatile.total"
_TAIL_BYTES = 64 * 1024
_GPU_ERRORS = re.compile(
    rb"CUDA error|cudaError|CUBLAS_STATUS_|CUDNN_STATUS_|NCCL error|uncorrectable ECC|no CUDA-capable device"
    rb"|GPU has fallen off the bus|device-side assert"
)


class GpuListFailed(OpenWeightsError):
    """`nvidia-smi` is missing, failed, or did not end in time."""


class GpuNeeds(NamedTuple):
    """What the pod was bought as. None: it was not said, and is not checked."""

    cards: int | None
    memory_gb: float | None
    """Of one card."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> GpuNeeds:
        """What the worker wrote into the environment; raises `ConfigurationError` for what is no number."""
        count, memory = environment.get("OW_GPU_COUNT"), environment.get("OW_GPU_MEMORY_GB")
        try:
            return cls(int(count) if count else None, float(memory) if memory else None)
        except ValueError as exc:
            raise ConfigurationError(
                f"OW_GPU_COUNT={count!r} and OW_GPU_MEMORY_GB={memory!r} must be numbers; "
                "the worker sets them."
            ) from exc


class Card(NamedTuple):
    """One card, as its driver describes it."""

    number: int
    name: str
    memory_mb: int
    used_mb: int
    ecc_errors: int = 0
    """Uncorrected ones since the driver was loaded; 0 for a card that does not count them."""


async def list_cards(*, with_errors: bool = False) -> list[Card]:
    """The cards of this machine, none where there is no driver's tool; raises `GpuListFailed`.

    Their memory errors are a question of their own, which not every driver answers.
    """
    try:
        listed = await _query(_FIELDS)
    except FileNotFoundError:
        return []
    errors = ""
    if with_errors:
        with contextlib.suppress(GpuListFailed):
            errors = await _query(_ECC_FIELDS)
    return parse_cards(listed, errors)


def parse_cards(listed: str, ecc_errors: str = "") -> list[Card]:
    """The cards in the tool's two answers; raises `GpuListFailed` for an answer that is not understood."""
    counts = {row[0]: int(row[1]) for row in _rows(ecc_errors) if len(row) == 2 and row[1].isdecimal()}
    cards = []
    for row in _rows(listed):
        try:
            number, name, total, used = row
            cards.append(Card(int(number), name, int(total), int(used), counts.get(number, 0)))
        except ValueError as exc:
            raise GpuListFailed(f"`nvidia-smi` answered {listed.strip()[:200]!r}.") from exc
    return cards


def why_unusable(cards: Sequence[Card], needs: GpuNeeds) -> str | None:
    """Why these are not the cards that are needed, or None."""
    if needs.cards is not None and len(cards) != needs.cards:
        return f"{len(cards)} GPUs instead of {needs.cards}"
    for card in cards:
        if needs.memory_gb and card.memory_mb < _LEAST_MEMORY * needs.memory_gb * 1024:
            return (
                f"GPU {card.number} ({card.name}) has {card.memory_mb} MB instead of {needs.memory_gb:g} GB"
            )
        if card.ecc_errors:
            return f"GPU {card.number} ({card.name}) had {card.ecc_errors} uncorrected memory errors"
    return None


async def check_gpus(needs: GpuNeeds, *, mode: str, job_python: str) -> str | None:
    """Why no work may be done here, or None; takes a bounded time. `mode` is `settings.gpu_check`."""
    if mode == "off" or needs.cards == 0:
        return None
    try:
        cards = await list_cards(with_errors=True)
    except GpuListFailed as exc:
        return str(exc)
    if not cards and needs.cards:
        return f"no GPU is visible instead of {needs.cards}: `nvidia-smi` is missing, or lists none"
    why = why_unusable(cards, needs)
    if why is not None or mode == "inventory" or not cards:
        return why
    return await _why_not_computing(len(cards), job_python)


def names_gpu_error(log: Path) -> bool:
    """Whether the end of a log has an error of the card or its driver; running out of memory is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return _GPU_ERRORS.search(stream.read()) is not None
    except OSError:
        return False


async def _why_not_computing(count: int, job_python: str) -> str | None:
    if not job_python:
        logger.info("No `OW_JOB_PYTHON`: the GPUs are not computed on.")
        return None
    try:
        text = await _output(job_python, "-I", gpu_probe.__file__, seconds=_PROBE_SECONDS)
        answer: dict[str, Any] = json.loads(text.splitlines()[-1])
    except FileNotFoundError:
        return f"the job interpreter {job_python!r} is missing"
    except (GpuListFailed, ValueError, IndexError) as exc:
        return f"computing on the GPUs failed: {exc}"
    if not answer["torch"]:
        logger.info("The job environment has no PyTorch: the GPUs are not computed on.")
        return None
    if answer["cards"] != count:
        return f"PyTorch sees {answer['cards']} of {count} GPUs"
    return "; ".join(f"GPU {card}: {why}" for card, why in answer["wrong"]) or None


async def _query(fields: str) -> str:
    command = ("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return await _output(*command, seconds=_LIST_SECONDS)


async def _output(*command: str, seconds: float) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        raise GpuListFailed(f"`{command[0]}` did not end within {seconds:g} s.") from None
    finally:
        if process.returncode is None:
            process.kill()
            with contextlib.suppress(TimeoutError):  # a driver may hold a process that was killed
                await asyncio.wait_for(process.wait(), _KILLED_SECONDS)
    text = output.decode("utf-8", "replace")
    if process.returncode != 0:
        last = (text.strip().splitlines() or [""])[-1][:200]
        raise GpuListFailed(f"`{command[0]}` exited with code {process.returncode}: {last}")
    return text


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
