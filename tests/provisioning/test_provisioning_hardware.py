from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.provisioning.hardware import (
    Gpu,
    catalogue,
    choose_offers,
    explain_no_offer,
    parse_hardware,
)
from openweights_prefect.provisioning.provider import Cloud, Offer


def _offer(hardware: str, price: float, *, cloud: Cloud = "SECURE", stock: bool = True) -> Offer:
    parsed = parse_hardware(hardware)
    return Offer(
        gpu_id=parsed.gpu_id,
        gpu_name=parsed.gpu,
        count=parsed.count,
        cloud=cloud,
        price_per_hour=price,
        memory_gb=parsed.memory_gb,
        availability="HIGH" if stock else "NONE",
    )


OFFERS = [
    _offer("1x H100S", 2.69),
    _offer("1x A40", 0.49),
    _offer("1x A100", 1.59),
    _offer("2x A40", 0.98),
    _offer("2x H100S", 5.38),
    _offer("2x A100", 3.18),
    _offer("4x A100", 6.36),
    _offer("1x B200", 0.01),
]


def _chosen(
    vram: int | None = None,
    allowed: list[str] | None = None,
    price: float | None = None,
    offers: list[Offer] = OFFERS,
) -> list[str]:
    chosen = choose_offers(offers, requires_vram_gb=vram, allowed_hardware=allowed, max_price_per_hour=price)
    return [f"{offer.count}x {offer.gpu_name}" for offer in chosen]


def _explained(vram: int | None = None, allowed: list[str] | None = None, price: float | None = None) -> str:
    return explain_no_offer(OFFERS, requires_vram_gb=vram, allowed_hardware=allowed, max_price_per_hour=price)


@pytest.mark.parametrize(
    ("spelling", "normal"),
    [
        ("2x A100", "2x A100"),
        ("2xA100", "2x A100"),
        ("2X  a-100", "2x A100"),
        ("A100S", "1x A100S"),
        ("1x A100 80GB", "1x A100"),
        ("A100 PCIe", "1x A100"),
        ("1x A100 SXM 80GB", "1x A100S"),
        ("A100 SXM4", "1x A100S"),
        ("8x H100 SXM 80GB", "8x H100S"),
        ("h100 nvl", "1x H100N"),
        ("H200 SXM", "1x H200"),
        ("RTX 6000 Ada", "1x 6000Ada"),
        ("4x4000Ada", "4x 4000Ada"),
        ("rtx 3090", "1x RTX3090"),
        ("RTX A6000", "1x A6000"),
        ("2000Ada", "1x 2000Ada"),
        ("A4000_SFF", "1x A4000_SFF"),
        ("NVIDIA H100 80GB HBM3", "1x H100S"),
        ("2x NVIDIA GeForce RTX 4090", "2x RTX4090"),
        ("16x A100", "16x A100"),
    ],
)
def test_every_spelling_is_read_as_one_name(spelling: str, normal: str) -> None:
    """Aliases, full ids, any case and spacing, with or without a count."""
    assert str(parse_hardware(spelling)) == normal


@pytest.mark.parametrize("text", ["", "0x A100", "1x TPU", "1x A100 40GB", "-1x A100", "1x", "1.5x A100"])
def test_unknown_hardware_is_refused(text: str) -> None:
    """What is not in the catalogue is an error that quotes the value."""
    with pytest.raises(InvalidParameterError, match="not a hardware configuration") as caught:
        parse_hardware(text)
    assert repr(text) in str(caught.value)


def test_a_name_of_several_cards_is_refused_with_all_of_them() -> None:
    """`H100` alone could mean three prices, so the choice is left to the person."""
    with pytest.raises(InvalidParameterError, match="H100S, H100N, H100P"):
        parse_hardware("4x H100")


@given(st.sampled_from(catalogue()), st.integers(1, 64), st.booleans())
def test_the_normal_form_and_the_id_read_back_as_themselves(gpu: Gpu, count: int, upper: bool) -> None:
    """Parsing is idempotent for every GPU of the catalogue, and blind to case."""
    for name in (gpu.name, gpu.id, *gpu.aliases):
        hardware = parse_hardware(f"{count}x {name.upper() if upper else name}")
        assert hardware == parse_hardware(str(hardware))
        assert (hardware.count, hardware.gpu, hardware.memory_gb) == (count, gpu.name, count * gpu.memory_gb)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but `InvalidParameterError` comes out of the parser."""
    with contextlib.suppress(InvalidParameterError):
        assert parse_hardware(text).count > 0


def test_the_cheapest_card_with_the_memory_comes_first() -> None:
    """One card before several; what must be named (B200) is never chosen by memory."""
    assert _chosen(vram=24) == ["1x A40", "1x A100", "1x H100S"]


def test_a_card_keeps_five_gigabytes_for_itself() -> None:
    """A 48 GB card serves 43 and not 44."""
    assert _chosen(vram=43)[0] == "1x A40"
    assert _chosen(vram=44)[0] == "1x A100"


def test_several_cards_are_chosen_when_none_is_large_enough() -> None:
    """The smallest sufficient number of each type, cheapest first."""
    assert _chosen(vram=120) == ["2x A100", "2x H100S"]
    assert _chosen(vram=200) == ["4x A100"]


def test_allowed_hardware_decides_alone_and_in_its_order() -> None:
    """The order of preference wins over price and over memory."""
    assert _chosen(vram=500, allowed=["2x h100 sxm", "B200", "1x A40"]) == ["2x H100S", "1x B200", "1x A40"]


def test_the_price_ceiling_holds_for_the_whole_pod() -> None:
    """An offer above it is not tried, even when it is preferred."""
    assert _chosen(allowed=["2x A100", "1x A100"], price=2.0) == ["1x A100"]


def test_what_is_out_of_stock_is_tried_last() -> None:
    """The catalogue's stock is only a hint."""
    offers = [_offer("1x A40", 0.35, stock=False), _offer("1x A100", 1.59)]
    assert _chosen(vram=24, offers=offers) == ["1x A100", "1x A40"]


def test_slices_of_a_card_are_never_chosen() -> None:
    """MIG entries and the sentinel are left out, known to the catalogue or not."""
    slices = [
        Offer("NVIDIA B300 SXM6 AC MIG 1g.34gb", "B300_MIG_34GB", 1, "SECURE", 0.5, 34, "HIGH"),
        Offer("NVIDIA X1 MIG 1g.99gb", "X1", 1, "SECURE", 0.5, 99, "HIGH"),
        Offer("unknown", "unknown", 1, "SECURE", 0.5, 99, "HIGH"),
    ]
    assert _chosen(offers=slices) == []
    assert _chosen(allowed=["B300_MIG_34GB"], offers=slices) == []


@pytest.mark.parametrize(
    ("vram", "allowed", "price", "mend"),
    [
        (24, None, 0.10, "Raise it to at least 0.49"),
        (900, None, None, "the largest is 4x A100"),
        (None, ["8x A100"], None, "Allow '4x A100' as well"),
        (None, ["1x L4"], None, "Allow '1x B200' as well"),
    ],
)
def test_the_nearest_mend_is_named(
    vram: int | None, allowed: list[str] | None, price: float | None, mend: str
) -> None:
    """A job that cannot be placed is told the smallest change that helps."""
    assert _chosen(vram, allowed, price) == []
    assert mend in _explained(vram, allowed, price)
