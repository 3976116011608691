"""What a job asks of its pod: read, kept out of its id, and refused when nothing can satisfy it."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.utilities.schema_tools.validation import validate

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.options import Options, validated
from openweights_prefect.jobs.request import custom_request
from openweights_prefect.provisioning.hardware import catalogue, catalogue_offers, choose_offers
from openweights_prefect.types.hardware import Needs
from openweights_prefect.worker.configuration import (
    RunPodJobConfiguration,
    RunPodVariables,
    job_variables_of,
)

NEEDS: dict[str, Any] = {"cloud": "Secure", "min_cuda": "12.8", "min_vcpu": 16, "min_ram_gb": 64}


def _row(*, vram_gb: int = 24, **options: Any) -> dict[str, Any]:
    checked = validated(Options, options, job_type="sort")
    request = custom_request("sort", {"n": 1}, "python sort.py", {}, checked, requires_vram_gb=vram_gb)
    return request.row(organization_id="o", default_image="i")


def test_the_needs_are_in_the_row_and_not_in_the_id() -> None:
    """They say how a job is run; the same job with others is the same job."""
    row, plain = _row(**NEEDS), _row()
    assert {name: row[name] for name in NEEDS} == {**NEEDS, "cloud": "SECURE"}
    assert {name: plain[name] for name in NEEDS} == dict.fromkeys(NEEDS)
    assert row["id"] == plain["id"]
    needs = Needs.from_row(row)
    assert (needs.cloud, needs.min_cuda, needs.min_vcpu, needs.min_ram_gb) == ("SECURE", "12.8", 16, 64)
    assert Needs.from_row(plain) == Needs(docker_image="i", requires_vram_gb=24)


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ({"cloud": "private"}, "cloud='private': is no cloud; write 'secure' or 'community'"),
        ({"cloud": 1}, "cloud=1"),
        ({"min_cuda": "12"}, "min_cuda='12'"),
        ({"min_cuda": 12.8}, "min_cuda=12.8"),
        ({"min_cuda": "12.8.1"}, "min_cuda='12.8.1'"),
        ({"min_vcpu": 0}, "min_vcpu=0"),
        ({"min_ram_gb": "64"}, "min_ram_gb='64'"),
    ],
)
def test_a_bad_need_is_named(option: dict[str, Any], part: str) -> None:
    """With the value as it was written."""
    with pytest.raises(InvalidParameterError) as caught:
        _row(**option)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ({"max_price_per_hour": 0.01}, "Raise it to at least 0.33"),
        ({"requires_vram_gb": 1300}, "allow '5x B300' by name in allowed_hardware"),
        ({"allowed_hardware": ["16x A100"]}, "Allow '8x A100' as well"),
        ({"allowed_hardware": ["1x A30"]}, "Allow '1x A5000' as well"),
        ({"allowed_hardware": ["A40"], "cloud": "community"}, "Leave it out for 1x A40"),
        ({"allowed_hardware": ["B300 MIG 34GB"]}, "a slice of a card"),
    ],
)
def test_a_job_that_nothing_can_satisfy_is_refused_at_once(options: dict[str, Any], mend: str) -> None:
    """With the nearest mend, which works."""
    with pytest.raises(InvalidParameterError, match="No pod can run this job") as caught:
        _row(**options)
    assert mend in str(caught.value)


def test_memory_of_the_job_type_counts_unless_the_options_say_otherwise() -> None:
    """The estimate is what is checked; naming hardware overrides it."""
    with pytest.raises(InvalidParameterError, match="requires_vram_gb=2000"):
        _row(vram_gb=2000)
    assert _row(vram_gb=2000, requires_vram_gb=80)["requires_vram_gb"] == 80
    assert _row(vram_gb=2000, allowed_hardware=["8x B300"])["allowed_hardware"] == ["8x B300"]


def test_every_card_that_is_sold_can_be_asked_for() -> None:
    """Nothing in the catalogue is refused but slices of cards."""
    for gpu in catalogue():
        sold = any(tier and tier.max_count for tier in (gpu.secure, gpu.community))
        if sold and not gpu.mig:
            assert _row(allowed_hardware=[gpu.id])["allowed_hardware"] == [f"1x {gpu.name}"]
    largest = max(
        offer.memory_gb for offer in choose_offers(catalogue_offers(), Needs(requires_vram_gb=1000))
    )
    assert largest > 1000


def test_every_need_is_a_job_variable() -> None:
    """Of the form, with a help text, and of what the worker reads; in any case of letters."""
    for name in NEEDS:
        assert RunPodVariables.model_fields[name].description
        assert name in RunPodJobConfiguration.model_fields
    template = {"variables": RunPodVariables.model_json_schema()}
    variables = job_variables_of(NEEDS, template)
    assert {name: variables[name] for name in NEEDS} == NEEDS
    assert validated(Options, variables, job_type="flow").cloud == "SECURE"
    validate(NEEDS, template["variables"], raise_on_error=True)
