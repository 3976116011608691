"""Which hardware a person means, and which offers satisfy a job."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from pydantic import TypeAdapter

from openweights_prefect.bundle import deploy_root
from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.provisioning.provider import Cloud, Offer
from openweights_prefect.types.hardware import Hardware, Needs

VRAM_HEADROOM_GB = 5
"""What a card keeps for CUDA and the framework: an 80 GB card satisfies 75."""

# `2x A100`, `A100`, and as others write it: `A100 x2`, `A100:2`.
_SPELLINGS = (
    re.compile(r"\s*(?:(?P<count>\d{1,4})\s*x\s*)?(?P<gpu>.*?)\s*", re.IGNORECASE | re.DOTALL),
    re.compile(r"\s*(?P<gpu>.*?)\s*[x:]\s*(?P<count>\d{1,4})\s*", re.IGNORECASE | re.DOTALL),
)
_FAMILIES = ("nvidia", "amd", "geforce", "instinct", "tesla", "rtx")
"""Words before a name that many leave out."""


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
    for spelling in _SPELLINGS:
        match = spelling.fullmatch(text)
        gpu = _gpu_called(match["gpu"]) if match else None
        count = int(match["count"] or 1) if match else 0
        if gpu is not None and count > 0:
            return Hardware(count=count, gpu=gpu.name, gpu_id=gpu.id, gpu_memory_gb=gpu.memory_gb)
    whole = _SPELLINGS[0].fullmatch(text)
    raise InvalidParameterError(
        f"{text!r} is not a hardware configuration. Write '<count>x <GPU>', such as '2x A100', "
        f"with {_closest(whole['gpu'] if whole else text)}."
    )


def usable_vram_gb(offer: Offer) -> int:
    """Memory that a job can count on: every card keeps `VRAM_HEADROOM_GB` for itself."""
    return offer.memory_gb - VRAM_HEADROOM_GB * offer.count


@cache
def catalogue_offers() -> tuple[Offer, ...]:
    """The offers of the packaged catalogue: what could be bought on the day it was written down."""
    found = []
    for gpu in catalogue():
        tiers: tuple[tuple[Cloud, Tier | None], ...] = (("SECURE", gpu.secure), ("COMMUNITY", gpu.community))
        for cloud, tier in tiers:
            for count in range(1, (tier.max_count if tier else 0) + 1):
                price = round(count * tier.price_per_hour, 6) if tier else 0.0
                found.append(Offer(gpu.id, gpu.name, count, cloud, price, count * gpu.memory_gb, "MEDIUM"))
    return tuple(found)


def choose_offers(offers: Iterable[Offer], needs: Needs) -> list[Offer]:
    """The offers that satisfy a job, in the order in which to try them.

    `allowed_hardware` decides alone and in its own order; else the cheapest that has the memory, one card
    before several. What the catalogue calls out of stock comes last of its equals. CUDA, vCPU and RAM belong
    to the machine, of which an offer says nothing: they go into the request.
    """
    within = [offer for offer in offers if not _excluded(offer) and _is_within(offer, needs)]
    if needs.allowed_hardware:
        wanted = [
            (hardware.gpu_id, hardware.count) for hardware in map(parse_hardware, needs.allowed_hardware)
        ]
        named = [offer for offer in within if (offer.gpu_id, offer.count) in wanted]
        return sorted(named, key=lambda o: (wanted.index((o.gpu_id, o.count)), *_by_stock_and_price(o)))
    fitting = [o for o in within if _automatic(o) and usable_vram_gb(o) >= needs.requires_vram_gb]
    single = [offer for offer in fitting if offer.count == 1]
    return sorted(single or _fewest_cards(fitting), key=_by_stock_and_price)


def explain_no_offer(offers: Iterable[Offer], needs: Needs) -> str:
    """Why `choose_offers` found nothing, and the smallest change that would find something."""
    whole = [offer for offer in offers if not _excluded(offer)]
    if not whole:
        return "The provider offers no GPU at all now. Wait, or look at its status page."
    return _explain_limits(whole, needs) or _explain_hardware(whole, needs)


def _explain_limits(whole: list[Offer], needs: Needs) -> str | None:
    """What to change of the price ceiling and the cloud, when that would do."""
    ceiling = f"max_price_per_hour={needs.max_price_per_hour!r}"
    unlimited = dataclasses.replace(needs, max_price_per_hour=None)
    if dearer := choose_offers(whole, unlimited):
        nearest = min(dearer, key=lambda offer: offer.price_per_hour)
        return (
            f"{ceiling} is below every fitting offer; the cheapest is {nearest}. "
            f"Raise it to at least {_whole_cents(nearest.price_per_hour):.2f}."
        )
    if elsewhere := choose_offers(whole, dataclasses.replace(needs, cloud=None)):
        return f"Nothing that fits is offered with cloud={needs.cloud!r}. Leave it out for {elsewhere[0]}."
    if elsewhere := choose_offers(whole, dataclasses.replace(unlimited, cloud=None)):
        nearest = min(elsewhere, key=lambda offer: offer.price_per_hour)
        return (
            f"Nothing that fits is offered with cloud={needs.cloud!r}, and {ceiling} is below all that fits "
            f"elsewhere. Leave `cloud` out, and raise the price to at least "
            f"{_whole_cents(nearest.price_per_hour):.2f} for {nearest}."
        )
    return None


def _explain_hardware(whole: list[Offer], needs: Needs) -> str:
    within = [offer for offer in whole if _is_within(offer, needs)]
    if needs.allowed_hardware:
        return _explain_names(whole, within, needs.allowed_hardware)
    automatic = [*filter(_automatic, within)] or [*filter(_automatic, whole)]
    largest = max(automatic, key=usable_vram_gb, default=None)
    if largest is None:
        return f"Nothing that is chosen by memory is offered now. Name other hardware, such as {whole[0]}."
    larger = [o for o in within if not _is_amd(o) and usable_vram_gb(o) >= needs.requires_vram_gb]
    nearest = min(larger, key=_by_stock_and_price, default=None)
    mend = f"allow '{nearest.count}x {nearest.gpu_name}' by name" if nearest else "name other hardware"
    return (
        f"requires_vram_gb={needs.requires_vram_gb!r} is more than any offer has; the largest is {largest} "
        f"with {usable_vram_gb(largest)} GB usable. Lower it, or {mend} in allowed_hardware."
    )


def _explain_names(whole: list[Offer], within: list[Offer], allowed: Iterable[str]) -> str:
    names = [parse_hardware(text) for text in allowed]
    for hardware in names:
        most = max((o.count for o in whole if o.gpu_id == hardware.gpu_id), default=0)
        if 0 < most < hardware.count:
            return (
                f"'{hardware}' is not offered: a pod has at most {most} {hardware.gpu}. "
                f"Allow '{most}x {hardware.gpu}' as well."
            )
    memory = min(hardware.memory_gb for hardware in names)
    larger = [offer for offer in within if not _is_amd(offer) and offer.memory_gb >= memory]
    listed = ", ".join(f"'{hardware}'" for hardware in names)
    nearest = min(larger, key=_by_stock_and_price, default=None)
    mend = (
        f"Allow '{nearest.count}x {nearest.gpu_name}' as well."
        if nearest
        else "Wait, or allow other hardware."
    )
    slices = [str(hardware) for hardware in names if " MIG " in hardware.gpu_id]
    note = f" (a slice of a card, such as {slices[0]!r}, is never used)" if slices else ""
    return f"Nothing of allowed_hardware ({listed}) is offered now{note}. {mend}"


def _whole_cents(price: float) -> float:
    """The price, rounded up: less would not be enough."""
    return math.ceil(round(100 * price, 6)) / 100


def _is_within(offer: Offer, needs: Needs) -> bool:
    """Whether it keeps to the price and the cloud."""
    ceiling = needs.max_price_per_hour
    return (ceiling is None or offer.price_per_hour <= ceiling) and needs.cloud in (None, offer.cloud)


def _excluded(offer: Offer) -> bool:
    gpu = gpu_by_id(offer.gpu_id)
    return offer.gpu_id == "unknown" or (gpu.mig if gpu else " MIG " in offer.gpu_id)


def _is_amd(offer: Offer) -> bool:
    # No job runs on one unless its image is made for it: they are not proposed.
    return offer.gpu_id.startswith("AMD ")


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
    """Every GPU by each of its names, and by those without the family where that means one GPU only."""
    whole: dict[str, Gpu] = {}
    for gpu in catalogue():
        for spelling in (gpu.name, gpu.id, *gpu.aliases):
            whole.setdefault(_plain(spelling), gpu)
    for spelling, gpu in list(whole.items()):
        whole.setdefault(f"{spelling}{gpu.memory_gb}gb", gpu)
    short: dict[str, list[Gpu]] = {}
    for spelling, gpu in whole.items():
        short.setdefault(_without_family(spelling), []).append(gpu)
    return {**{name: gpus[0] for name, gpus in short.items() if len({*gpus}) == 1}, **whole}


def _gpu_called(text: str) -> Gpu | None:
    plain = _plain(text)
    return _spellings().get(plain) or _spellings().get(_without_family(plain))


def _without_family(plain: str) -> str:
    while family := next((word for word in _FAMILIES if plain.startswith(word)), None):
        plain = plain.removeprefix(family)
    return plain


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
