"""Which hardware a person means, and which offers satisfy a job."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from pydantic import TypeAdapter

from openweights_prefect.bundle import deploy_root
from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.provisioning.provider import Offer
from openweights_prefect.types.hardware import Hardware

VRAM_HEADROOM_GB = 5
"""What a card keeps for CUDA and the framework: an 80 GB card satisfies 75."""

_SPELLING = re.compile(r"\s*(?:(?P<count>\d+)\s*x\s*)?(?P<gpu>.*?)\s*", re.IGNORECASE | re.DOTALL)
_VENDORS = ("NVIDIA ", "AMD ", "NVIDIA GeForce ")


@dataclass(frozen=True)
class Tier:
    """One GPU type in one cloud."""

    price_per_hour: float
    """USD for one card."""
    max_count: int


@dataclass(frozen=True)
class Gpu:
    """A GPU type of the catalogue."""

    id: str
    name: str
    aliases: tuple[str, ...]
    memory_gb: int
    automatic: bool
    """May be chosen by its memory alone; the others must be named."""
    mig: bool
    """A slice of a card, which does not behave like one."""
    secure: Tier | None
    community: Tier | None


@cache
def catalogue() -> tuple[Gpu, ...]:
    """The GPU types of `infrastructure/gpus.json`."""
    document = json.loads((deploy_root() / "infrastructure" / "gpus.json").read_text(encoding="utf-8"))
    return TypeAdapter(tuple[Gpu, ...]).validate_python(document["gpus"])


def gpu_by_id(gpu_id: str) -> Gpu | None:
    """The catalogue's entry for a provider's GPU id."""
    return _by_id().get(gpu_id)


def parse_hardware(text: str) -> Hardware:
    """Read `2x A100`, `A100` (one), an alias or a full RunPod id, in any case and spacing.

    Raises `InvalidParameterError` with the closest names. `H100` and `V100` alone are refused: several cards
    of different prices go by that name.
    """
    match = _SPELLING.fullmatch(text)
    count = int(match["count"] or 1) if match else 0
    gpu = _spellings().get(_plain(match["gpu"])) if match else None
    if gpu is None or count < 1:
        raise InvalidParameterError(
            f"{text!r} is not a hardware configuration. Write '<count>x <GPU>', such as '2x A100', "
            f"with {_closest(match['gpu'] if match else text)}."
        )
    return Hardware(count=count, gpu=gpu.name, gpu_id=gpu.id, gpu_memory_gb=gpu.memory_gb)


def usable_vram_gb(offer: Offer) -> int:
    """Memory that a job can count on: every card keeps `VRAM_HEADROOM_GB` for itself."""
    return offer.memory_gb - VRAM_HEADROOM_GB * offer.count


def choose_offers(
    offers: Iterable[Offer],
    *,
    requires_vram_gb: int | None,
    allowed_hardware: Sequence[str] | None,
    max_price_per_hour: float | None,
) -> list[Offer]:
    """The offers that satisfy a job, in the order in which to try them.

    `allowed_hardware` decides alone and in its own order; else the cheapest that has the memory, one card
    before several. What the catalogue calls out of stock comes last of its equals.
    """
    whole = [offer for offer in offers if not _excluded(offer)]
    affordable = [o for o in whole if max_price_per_hour is None or o.price_per_hour <= max_price_per_hour]
    if allowed_hardware:
        wanted = [(hardware.gpu_id, hardware.count) for hardware in map(parse_hardware, allowed_hardware)]
        named = [offer for offer in affordable if (offer.gpu_id, offer.count) in wanted]
        return sorted(named, key=lambda o: (wanted.index((o.gpu_id, o.count)), *_by_stock_and_price(o)))
    fitting = [o for o in affordable if _automatic(o) and usable_vram_gb(o) >= (requires_vram_gb or 0)]
    single = [offer for offer in fitting if offer.count == 1]
    return sorted(single or _fewest_cards(fitting), key=_by_stock_and_price)


def explain_no_offer(
    offers: Iterable[Offer],
    *,
    requires_vram_gb: int | None,
    allowed_hardware: Sequence[str] | None,
    max_price_per_hour: float | None,
) -> str:
    """Why `choose_offers` found nothing, and the smallest change that would find something."""
    whole = [offer for offer in offers if not _excluded(offer)]
    if not whole:
        return "The provider offers no GPU at all now. Wait, or look at its status page."
    dearer = choose_offers(
        whole, requires_vram_gb=requires_vram_gb, allowed_hardware=allowed_hardware, max_price_per_hour=None
    )
    if dearer:
        nearest = min(dearer, key=lambda offer: offer.price_per_hour)
        return (
            f"max_price_per_hour={max_price_per_hour!r} is below every fitting offer; the cheapest is "
            f"{nearest}. Raise it to at least {nearest.price_per_hour:.2f}."
        )
    if allowed_hardware:
        return _explain_names(whole, allowed_hardware, max_price_per_hour)
    largest = max(filter(_automatic, whole), key=usable_vram_gb, default=None)
    if largest is None:
        return f"Nothing that is chosen by memory is offered now. Name other hardware, such as {whole[0]}."
    return (
        f"requires_vram_gb={requires_vram_gb!r} is more than any offer has; the largest is {largest} with "
        f"{usable_vram_gb(largest)} GB usable. Lower it, or name other hardware in allowed_hardware."
    )


def _explain_names(whole: list[Offer], allowed_hardware: Sequence[str], max_price: float | None) -> str:
    names = [parse_hardware(text) for text in allowed_hardware]
    counts = {
        hardware.gpu: max((o.count for o in whole if o.gpu_id == hardware.gpu_id), default=0)
        for hardware in names
    }
    for hardware in names:
        if 0 < counts[hardware.gpu] < hardware.count:
            return (
                f"'{hardware}' is not offered: a pod has at most {counts[hardware.gpu]} {hardware.gpu}. "
                f"Allow '{counts[hardware.gpu]}x {hardware.gpu}' as well."
            )
    memory = min(hardware.memory_gb for hardware in names)
    larger = [
        o for o in whole if o.memory_gb >= memory and (max_price is None or o.price_per_hour <= max_price)
    ]
    listed = ", ".join(f"'{hardware}'" for hardware in names)
    nearest = min(larger, key=_by_stock_and_price, default=None)
    mend = (
        f"Allow '{nearest.count}x {nearest.gpu_name}' as well."
        if nearest
        else "Wait, or allow other hardware."
    )
    return f"Nothing of allowed_hardware ({listed}) is offered now. {mend}"


def _excluded(offer: Offer) -> bool:
    gpu = gpu_by_id(offer.gpu_id)
    return offer.gpu_id == "unknown" or (gpu.mig if gpu else " MIG " in offer.gpu_id)


def _automatic(offer: Offer) -> bool:
    gpu = gpu_by_id(offer.gpu_id)
    return gpu is not None and gpu.automatic


def _by_stock_and_price(offer: Offer) -> tuple[bool, float, int]:
    return offer.availability == "NONE", offer.price_per_hour, offer.count


def _fewest_cards(offers: list[Offer]) -> list[Offer]:
    fewest: dict[tuple[str, str], Offer] = {}
    for offer in sorted(offers, key=lambda offer: offer.count):
        fewest.setdefault((offer.gpu_id, offer.cloud), offer)
    return list(fewest.values())


@cache
def _by_id() -> dict[str, Gpu]:
    return {gpu.id: gpu for gpu in catalogue()}


@cache
def _spellings() -> dict[str, Gpu]:
    spellings: dict[str, Gpu] = {}
    for gpu in catalogue():
        without_vendor = [gpu.id.removeprefix(vendor) for vendor in _VENDORS]
        for spelling in (gpu.name, gpu.id, *gpu.aliases, *without_vendor):
            spellings.setdefault(_plain(spelling), gpu)
    return spellings


def _plain(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def _closest(text: str) -> str:
    plain = _plain(text)
    near = [
        spelling
        for spelling in _spellings()
        if plain and (spelling.startswith(plain) or plain.startswith(spelling))
    ]
    near += difflib.get_close_matches(plain, _spellings(), n=4, cutoff=0.6)
    names = list(dict.fromkeys(_spellings()[spelling].name for spelling in near))
    if names:
        return f"GPU one of: {', '.join(names[:6])}"
    return f"GPU one of: {', '.join(gpu.name for gpu in catalogue() if gpu.automatic)}"
