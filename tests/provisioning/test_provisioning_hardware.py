from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.provisioning.hardware import (
    VRAM_HEADROOM_GB,
    Gpu,
    catalogue,
    catalogue_offers,
    choose_offers,
    explain_no_offer,
    parse_hardware,
)
from openweights_prefect.provisioning.provider import Cloud, Offer
from openweights_prefect.types.hardware import Needs


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
    chosen = choose_offers(offers, _needs(vram, allowed, price))
    return [f"{offer.count}x {offer.gpu_name}" for offer in chosen]


def _needs(vram: int | None = None, allowed: list[str] | None = None, price: float | None = None) -> Needs:
    return Needs(
        requires_vram_gb=vram or 0,
        allowed_hardware=None if allowed is None else tuple(allowed),
        max_price_per_hour=price,
    )


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
        ("A100x2", "2x A100"),
        ("A100 x 2", "2x A100"),
        ("a100-80gb:8", "8x A100"),
        ("A100-80GB-SXM", "1x A100S"),
        ("A100 SXM 40GB", "1x A100S_40GB"),
        ("H100 SXM", "1x H100S"),
        ("h100_sxm5", "1x H100S"),
        ("H100 80GB PCIe", "1x H100P"),
        ("H200-141GB", "1x H200"),
        ("4090", "1x RTX4090"),
        ("2x4090", "2x RTX4090"),
        ("RTX4090", "1x RTX4090"),
        ("NVIDIA RTX 4090", "1x RTX4090"),
        ("GeForce 3080 Ti", "1x RTX3080Ti"),
        ("MI300X", "1x MI300X"),
        ("MI300Xx8", "8x MI300X"),
        ("V100-PCIE-16GB", "1x V100P"),
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


RUNPODS_NAMES = {
    "AMD Instinct MI300X OAM": "MI300X",
    "AMD Instinct MI350 OAM": "MI350X",
    "NVIDIA A100 80GB PCIe": "A100 PCIe",
    "NVIDIA A100-SXM4-40GB": "A100 SXM 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 SXM",
    "NVIDIA A40": "A40",
    "NVIDIA B200": "B200",
    "NVIDIA B300 SXM6 AC": "B300",
    "NVIDIA B300 SXM6 AC MIG 1g.34gb": "B300 MIG 34GB",
    "NVIDIA GeForce RTX 3070": "RTX 3070",
    "NVIDIA GeForce RTX 3080": "RTX 3080",
    "NVIDIA GeForce RTX 3080 Ti": "RTX 3080 Ti",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 3090 Ti": "RTX 3090 Ti",
    "NVIDIA GeForce RTX 4070 Ti": "RTX 4070 Ti",
    "NVIDIA GeForce RTX 4080": "RTX 4080",
    "NVIDIA GeForce RTX 4080 SUPER": "RTX 4080 SUPER",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5080": "RTX 5080",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA A30": "A30",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA RTX 2000 Ada Generation": "RTX 2000 Ada",
    "NVIDIA RTX 4000 Ada Generation": "RTX 4000 Ada",
    "NVIDIA RTX 4000 SFF Ada Generation": "RTX 4000 Ada SFF",
    "NVIDIA RTX 5000 Ada Generation": "RTX 5000 Ada",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA RTX A2000": "RTX A2000",
    "NVIDIA RTX A4000": "RTX A4000",
    "NVIDIA RTX A4500": "RTX A4500",
    "NVIDIA RTX A5000": "RTX A5000",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA RTX PRO 4000 Blackwell": "RTX PRO 4000",
    "NVIDIA RTX PRO 4500 Blackwell": "RTX PRO 4500",
    "NVIDIA RTX PRO 4500 Blackwell Server Edition": "RTX PRO 4500 SE",
    "NVIDIA RTX PRO 5000 Blackwell": "RTX PRO 5000",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "RTX PRO 6000 MaxQ",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb": "PRO 6000 MIG 24GB",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 2g.48gb": "PRO 6000 MIG 48GB",
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000 WK",
    "Tesla V100-PCIE-16GB": "Tesla V100",
    "Tesla V100-SXM2-16GB": "V100 SXM2",
    "Tesla V100-SXM2-32GB": "V100 SXM2 32GB",
}


@pytest.mark.parametrize(("gpu_id", "name"), RUNPODS_NAMES.items())
def test_runpods_ids_and_names_are_read(gpu_id: str, name: str) -> None:
    """With the vendor and without, with blanks, dashes or underscores; each means one card."""
    spellings = [gpu_id, name, f"NVIDIA {name}", gpu_id.partition(" ")[2], gpu_id.replace(" ", "-")]
    spellings += [name.lower().replace(" ", "_"), f"{name} x4", f"4x{name}"]
    assert {parse_hardware(spelling).gpu_id for spelling in spellings} == {gpu_id}


def test_the_catalogue_has_every_card_of_runpods() -> None:
    """Ids and short names are all different, and each spelling means one card only."""
    assert {gpu.id for gpu in catalogue()} == {*RUNPODS_NAMES}
    assert len({gpu.name for gpu in catalogue()}) == len(catalogue())
    claims: dict[str, set[str]] = {}
    for gpu in catalogue():
        for spelling in (gpu.id, gpu.name, *gpu.aliases):
            claims.setdefault(spelling.lower(), set()).add(gpu.id)
    assert {spelling: ids for spelling, ids in claims.items() if len(ids) > 1} == {}


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
    assert mend in explain_no_offer(OFFERS, _needs(vram, allowed, price))


def test_a_cloud_can_be_demanded() -> None:
    """`cloud` narrows the named and the automatic; what is nearest elsewhere is told."""
    offers = [_offer("1x A40", 0.49), _offer("1x A100", 1.19, cloud="COMMUNITY"), _offer("1x A100", 1.59)]
    community = dataclasses.replace(_needs(24), cloud="COMMUNITY")
    assert [str(offer) for offer in choose_offers(offers, community)] == ["1x A100 (community, $1.19/h)"]
    for needs, mend in {
        dataclasses.replace(_needs(allowed=["A40"]), cloud="COMMUNITY"): "Leave it out for 1x A40 (secure",
        dataclasses.replace(
            _needs(allowed=["A40"], price=0.1), cloud="COMMUNITY"
        ): "raise the price to at least 0.49",
        dataclasses.replace(_needs(24, price=1.0), cloud="COMMUNITY"): "Raise it to at least 1.19",
    }.items():
        assert choose_offers(offers, needs) == []
        assert mend in explain_no_offer(offers, needs)


def test_a_price_is_never_proposed_that_would_not_do() -> None:
    """It is rounded up to a whole cent."""
    offers = [_offer("1x A40", 0.4912)]
    assert "at least 0.50" in explain_no_offer(offers, _needs(24, price=0.4))
    assert choose_offers(offers, _needs(24, price=0.50))


def test_more_memory_than_is_automatic_is_proposed_by_name() -> None:
    """The nearest card that must be named is told, but no AMD card, which no CUDA image runs on."""
    offers = [_offer("1x A100", 1.59), _offer("1x MI300X", 2.39), _offer("1x B200", 6.79)]
    assert "allow '1x B200' by name" in explain_no_offer(offers, _needs(150))
    assert "name other hardware" in explain_no_offer(offers, _needs(1500))


def test_a_named_slice_is_told_from_a_shortage() -> None:
    """MIG slices are never rented, whoever names them."""
    assert "a slice of a card" in explain_no_offer(catalogue_offers(), _needs(allowed=["B300 MIG 34GB"]))


def test_the_packaged_catalogue_is_offers() -> None:
    """Every number of cards up to the quota of each cloud; nothing of a cloud that does not sell the type."""
    offers = catalogue_offers()
    a100 = {(o.count, o.cloud): o.price_per_hour for o in offers if o.gpu_name == "A100"}
    assert (a100[8, "SECURE"], a100[6, "COMMUNITY"], len(a100)) == (12.72, 7.14, 14)
    assert not [o for o in offers if o.gpu_name in ("A30", "V100S_32GB")]
    assert choose_offers(offers, Needs())


NAMES = [gpu.name for gpu in catalogue()]
OFFER = st.builds(
    lambda gpu, count, cloud, cents, stock: Offer(
        gpu.id, gpu.name, count, cloud, cents / 100, gpu.memory_gb * count, stock
    ),
    st.sampled_from(catalogue()),
    st.integers(1, 8),
    st.sampled_from(["SECURE", "COMMUNITY"]),
    st.integers(1, 5000),
    st.sampled_from(["NONE", "LOW", "HIGH"]),
)
NEEDS = st.builds(
    Needs,
    requires_vram_gb=st.integers(0, 400),
    allowed_hardware=st.none()
    | st.lists(st.builds("{}x {}".format, st.integers(1, 8), st.sampled_from(NAMES)), min_size=1).map(tuple),
    max_price_per_hour=st.none() | st.integers(1, 5000).map(lambda cents: cents / 100),
    cloud=st.sampled_from([None, "SECURE", "COMMUNITY"]),
)


@given(st.lists(OFFER, max_size=30), NEEDS)
def test_what_is_chosen_satisfies_every_need(offers: list[Offer], needs: Needs) -> None:
    """Price, cloud, hardware or memory; no slice of a card; and in the order in which to try."""
    chosen = choose_offers(offers, needs)
    assert set(chosen) <= set(offers)
    for offer in chosen:
        assert needs.cloud in (None, offer.cloud)
        assert needs.max_price_per_hour is None or offer.price_per_hour <= needs.max_price_per_hour
        assert "MIG" not in offer.gpu_id
    if needs.allowed_hardware:
        ranks = [needs.allowed_hardware.index(f"{offer.count}x {offer.gpu_name}") for offer in chosen]
        assert ranks == sorted(ranks)
        return
    assert all(o.memory_gb - VRAM_HEADROOM_GB * o.count >= needs.requires_vram_gb for o in chosen)
    order = [(offer.availability == "NONE", offer.price_per_hour) for offer in chosen]
    assert order == sorted(order)
    assert len({offer.count == 1 for offer in chosen}) <= 1


@given(st.lists(OFFER, max_size=30), NEEDS, st.integers(0, 5000))
def test_a_higher_ceiling_never_takes_the_last_offer_away(
    offers: list[Offer], needs: Needs, more_cents: int
) -> None:
    """Who would pay more can buy whenever who would pay less can; by name, all the same and more."""
    if needs.max_price_per_hour is None:
        return
    richer = dataclasses.replace(needs, max_price_per_hour=needs.max_price_per_hour + more_cents / 100)
    poor, rich = choose_offers(offers, needs), choose_offers(offers, richer)
    assert rich or not poor
    if needs.allowed_hardware:
        assert set(poor) <= set(rich)


@given(st.lists(OFFER, max_size=30), NEEDS)
def test_there_is_always_an_offer_or_a_reason(offers: list[Offer], needs: Needs) -> None:
    """A price that is proposed works."""
    if choose_offers(offers, needs):
        return
    reason = explain_no_offer(offers, needs)
    assert reason.endswith(".")
    if "Raise it to at least " in reason:
        price = float(reason.rpartition("at least ")[2].rstrip("."))
        assert choose_offers(offers, dataclasses.replace(needs, max_price_per_hour=price))
