"""Every refusal that was recorded of RunPod, and that none of them repeats what it should not."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
from answering_server import AnsweringServer, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openweights_prefect.errors import ProviderError
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    InsufficientFunds,
    NoCapacity,
    PodRequest,
    ProviderOutage,
    RateLimited,
    RequestRejected,
    Unauthorized,
)
from openweights_prefect.provisioning.runpod.client import RunPodClient

pytestmark = pytest.mark.anyio
SECRET = "one-time-token-of-the-pod"
QUOTED = '{"name": "n", "env": [{"key": "T", "value": "' + SECRET + '"}]'

CAPACITY = [
    "There are no longer any instances available with the requested specifications. "
    "Please refresh and try again.",
    "There are no longer any instances available with the request specifications. Please try again later.",
    "There are no longer any instances available with enough disk space.",
    "There are no instances available with the request specifications. Please try again later.",
    "create pod: There are no instances currently available",
    "This machine does not have the resources to deploy your pod. Please try a different machine",
    "There are not enough free GPUs on the host machine to start this pod.",
    "Insufficient resources",
    "SUPPLY_CONSTRAINT",
]
OTHERS: list[tuple[int, str, type[ProviderError]]] = [
    (400, "Something went wrong. Please try again later or contact support.", Ambiguous),
    (400, "create pod: Container Disk must be less than or equal to 80 GB for this instance", NoCapacity),
    (400, "allowedCudaVersions and minCudaVersion are mutually exclusive", RequestRejected),
    (400, "$: missing property 'name'", RequestRejected),
    (
        400,
        f'Variable "$input" got invalid value {QUOTED}, objectMounts: null, tags: null}}; '
        'Field "objectMounts" is not defined by type "PodFindAndDeployOnDemandInput".',
        ProviderOutage,
    ),
    (
        400,
        f'Variable "$input" got invalid value {QUOTED}, gpuCount: "x"}}; Int cannot represent',
        RequestRejected,
    ),
    (400, f'Variable "$input" got invalid value {QUOTED[:60]}', RequestRejected),
    (
        400,
        "Insufficient balance to resume this on-demand pod. You need at least $3.59 (current: $3.01, "
        "deficit: $0.58).",
        InsufficientFunds,
    ),
    (400, "You have exceeded your spend limit", InsufficientFunds),
    (402, "insufficient balance", InsufficientFunds),
    (401, "missing bearer token", Unauthorized),
    (403, "access denied", Unauthorized),
    (404, "resource not found", RequestRejected),
    (405, "The requested method is not allowed for this path.", RequestRejected),
    (413, "request body exceeds 102400 bytes", RequestRejected),
    (422, "Request validation failed.", RequestRejected),
    (422, "Unknown GPU type: NVIDIA NOT A GPU", NoCapacity),
    (429, "rate limit exceeded for the minute window", RateLimited),
    (500, "create pod: There are no instances currently available", Ambiguous),
    (500, "This machine does not have the resources to deploy your pod.", Ambiguous),
    (502, "Bad gateway", Ambiguous),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def _refusal(status: int, detail: str, env: Mapping[str, str]) -> tuple[ProviderError, int]:
    request = PodRequest(name="n", image="i", gpu_id="g", gpu_count=1, cloud="SECURE", disk_gb=1, env=env)
    said = problem(status, detail)
    async with (
        AnsweringServer(said) as server,
        RunPodClient(base_url=server.url, api_key="rpa_key") as client,
    ):
        with pytest.raises(ProviderError) as caught:
            await client.create(request)
    return caught.value, len(server.heads)


@pytest.mark.parametrize("text", CAPACITY)
async def test_a_recorded_shortage_is_recognized(text: str) -> None:
    """In any case of letters; it is asked once."""
    for said in (text, text.upper()):
        error, asked = await _refusal(400, said, {})
        assert isinstance(error, NoCapacity)
        assert (error.recognized, asked) == (True, 1)


@pytest.mark.parametrize(("status", "text", "kind"), OTHERS)
async def test_every_other_recorded_refusal_has_its_class(
    status: int, text: str, kind: type[ProviderError], caplog: pytest.LogCaptureFixture
) -> None:
    """Asked once, with the status in the message, and the quoted environment in neither message nor log."""
    with caplog.at_level(logging.DEBUG):
        error, asked = await _refusal(status, text, {"T": SECRET})
    assert type(error) is kind
    assert asked == 1
    assert str(status) in str(error)
    assert SECRET not in repr(error) + caplog.text
    if isinstance(error, NoCapacity):
        assert not error.recognized


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(alphabet="{}\"', :;abc", max_size=40),
    st.text(alphabet="{}\"', :;abc", max_size=40),
    st.integers(0, 60),
    st.sampled_from([400, 422, 500]),
)
async def test_no_refusal_repeats_a_value_of_the_environment(
    before: str, after: str, cut: int, status: int
) -> None:
    """However RunPod quotes the request, whole or cut short, and whatever braces the value has itself."""
    value = f"sec{after}ret}}}}{before}token"
    text = f"{before} invalid {{env: {{T: {value}}}, x: {after}}}"
    error, _ = await _refusal(status, text[: len(text) - cut], {"T": value})
    assert value not in str(error)
    assert "sec" not in str(error)
    assert "tok" not in str(error)
