"""The client against the simulated RunPod and its faults, as the worker uses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from named_pods import named

from openweights_prefect.errors import ProviderError
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    HostUnusable,
    ImageError,
    NoCapacity,
    PodRequest,
    ProviderOutage,
    RateLimited,
)
from openweights_prefect.provisioning.runpod.client import RunPodClient
from openweights_prefect.provisioning.runpod.contract import check_contract
from openweights_prefect.provisioning.runpod.system_log import diagnose
from openweights_prefect.simulator.server import SimulatorServer

pytestmark = pytest.mark.anyio
IMAGE = "sim/sleep"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def runpod() -> Iterator[SimulatorServer]:
    with SimulatorServer(config={"rate_limits": {}}, profile="fast") as server:
        yield server


@pytest.fixture
async def client(runpod: SimulatorServer) -> AsyncIterator[RunPodClient]:
    async with RunPodClient(base_url=runpod.rest, api_key=runpod.api_key) as client:
        yield client
        runpod.control("DELETE", "faults")
        for pod in await client.list():
            if pod.name.startswith("test-"):
                await client.terminate(pod.id)


def _fault(runpod: SimulatorServer, name: str, **params: Any) -> None:
    runpod.control("POST", "faults", {"name": name, "times": 1, "params": params})


def _request(name: str, **changes: Any) -> PodRequest:
    values: dict[str, Any] = {"gpu_id": "NVIDIA A40", "gpu_count": 1, "cloud": "SECURE", "disk_gb": 20}
    return PodRequest(name=f"test-{name}", image=IMAGE, **{**values, **changes})


async def _diagnosis(client: RunPodClient, pod_id: str, seconds: float = 20) -> ProviderError:
    async with asyncio.timeout(seconds):
        while (error := diagnose(await client.system_log(pod_id), image=IMAGE)) is None:
            await asyncio.sleep(0.05)
    return error


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("pull_auth", ImageError),
        ("pull_missing", ImageError),
        ("cuda_mismatch", HostUnusable),
        ("container_error", HostUnusable),
    ],
)
async def test_a_pod_that_never_comes_up_is_diagnosed(
    client: RunPodClient, runpod: SimulatorServer, fault: str, kind: type[ProviderError]
) -> None:
    """From its machine's log, while RunPod's status says nothing of it."""
    _fault(runpod, fault)
    pod = await client.create(_request(f"never-{fault.replace('_', '-')}"))
    error = await _diagnosis(client, pod.id)
    assert type(error) is kind
    assert IMAGE in str(error)


async def test_a_pod_without_a_machine_has_logged_nothing(
    client: RunPodClient, runpod: SimulatorServer
) -> None:
    """An empty log, and no fingerprint of a machine."""
    _fault(runpod, "alloc_stall")
    pod = await client.create(_request("stall"))
    assert await client.system_log(pod.id) == []
    listed = await client.get(pod.id)
    assert listed is not None
    assert (listed.host, listed.runtime_up) == (None, False)


async def test_pods_on_one_machine_have_one_fingerprint(client: RunPodClient) -> None:
    """And those on another have another."""
    hosts = []
    for name, gpu in (("one", "NVIDIA A40"), ("two", "NVIDIA A40"), ("three", "NVIDIA L4")):
        pod = await client.create(_request(f"host-{name}", gpu_id=gpu))
        async with asyncio.timeout(10):
            while (listed := await client.get(pod.id)) is None or listed.host is None:
                await asyncio.sleep(0.05)
        hosts.append(listed.host)
        assert listed.cuda
    assert hosts[0] == hosts[1] != hosts[2]


async def test_the_simulators_description_is_the_contract(client: RunPodClient) -> None:
    """What is sent is described there, the minima of a machine too; and they are obeyed."""
    assert await check_contract(client) == ([], True)
    pod = await client.create(_request("minima", gpu_count=2, min_vcpu_per_gpu=8, min_ram_gb_per_gpu=16))
    assert pod.vcpu >= 16
    assert pod.ram_gb >= 32
    with pytest.raises(NoCapacity):
        await client.create(_request("too-much", min_ram_gb_per_gpu=100_000))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("created_but_reset", Ambiguous),
        ("duplicate_create", None),
        ("refuse", Ambiguous),
        ("schema_outage", ProviderOutage),
    ],
)
async def test_a_create_goes_out_once_whatever_happens(
    client: RunPodClient, runpod: SimulatorServer, fault: str, kind: type[ProviderError] | None
) -> None:
    """Each way to fail has its class; what came of it is found by name."""
    before = runpod.report()["created"]
    _fault(runpod, fault)
    name = f"once-{fault.replace('_', '-')}"
    if kind is None:
        await client.create(_request(name))
    else:
        with pytest.raises(kind):
            await client.create(_request(name))
    made = {"created_but_reset": 1, "duplicate_create": 2}.get(fault, 0)
    found = await named(client, f"test-{name}")
    assert (len(found), runpod.report()["created"] - before) == (made, made)


async def test_a_refusal_for_the_rate_is_obeyed_by_all_calls() -> None:
    """After one 429 nothing is sent until its time is over, whatever is called."""
    with SimulatorServer(config={"rate_limits": {}}, profile="instant") as server:
        _fault(server, "rate_limited", retry_after=40)
        async with RunPodClient(base_url=server.rest, api_key=server.api_key) as client:
            for call in (
                client.create(_request("rate")),
                client.list(),
                client.terminate("nosuchpod"),
                client.system_log("nosuchpod"),
            ):
                with pytest.raises(RateLimited) as caught:
                    await call
                assert 30 < caught.value.retry_after_seconds <= 41
        assert server.report()["violations"] == []


async def test_a_list_with_a_torn_body_is_unknown(client: RunPodClient, runpod: SimulatorServer) -> None:
    """It never reads as fewer pods."""
    _fault(runpod, "truncated_json")
    with pytest.raises(ProviderOutage):
        await client.list()
    assert len(await client.list()) >= 3


async def test_a_failed_termination_is_repeated(client: RunPodClient, runpod: SimulatorServer) -> None:
    """500 although it is gone: the second try finds that out."""
    pod = await client.create(_request("end"))
    _fault(runpod, "delete_500")
    await client.terminate(pod.id)
    async with asyncio.timeout(10):
        while await named(client, "test-end"):
            await asyncio.sleep(0.05)


async def test_nothing_that_the_simulator_watches_for_was_done(
    client: RunPodClient, runpod: SimulatorServer
) -> None:
    """After all of the above; only that these tests look at one pod more often than the worker would."""
    assert len(await client.list()) >= 3
    assert {violation["kind"] for violation in runpod.report()["violations"]} <= {"get_storm"}
