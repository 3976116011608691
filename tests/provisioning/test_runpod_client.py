"""The client against the simulated RunPod, and against servers that misbehave, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from answering_server import AnsweringServer, answer
from named_pods import named

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.provisioning.hardware import parse_hardware
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    InsufficientFunds,
    NoCapacity,
    PodRequest,
    Provider,
    ProviderOutage,
    RateLimited,
    RequestRejected,
    Unauthorized,
)
from openweights_prefect.provisioning.runpod.client import RunPodClient
from openweights_prefect.simulator.server import SimulatorServer

pytestmark = pytest.mark.anyio
KEY = "rpa_secret_key_of_a_test"
POD = '{"id": "p1", "name": "n", "status": "RUNNING", "runtime": null}'


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def runpod() -> Iterator[SimulatorServer]:
    keys = {
        SimulatorServer.api_key: {"account": "main"},
        "poor": {"account": "poor"},
        "read": {"account": "main", "scope": "read"},
    }
    with SimulatorServer(
        config={"rate_limits": {}, "page_size": 2, "keys": keys}, profile="instant"
    ) as server:
        yield server


@pytest.fixture
async def client(runpod: SimulatorServer) -> AsyncIterator[RunPodClient]:
    async with RunPodClient(base_url=runpod.rest, api_key=runpod.api_key) as client:
        yield client
        for pod in await client.list():
            if pod.name.startswith("test-"):
                await client.terminate(pod.id)
        runpod.control("DELETE", "faults")


@contextlib.asynccontextmanager
async def _served(
    *answers: str, stays_open: bool = False
) -> AsyncIterator[tuple[AnsweringServer, RunPodClient]]:
    async with (
        AnsweringServer(*answers, stays_open=stays_open) as server,
        RunPodClient(base_url=server.url, api_key=KEY) as client,
    ):
        yield server, client


def _request(name: str, **changes: object) -> PodRequest:
    request = PodRequest(
        name=f"test-{name}", image="sim/sleep", gpu_id="NVIDIA A40", gpu_count=1, cloud="SECURE", disk_gb=20
    )
    return dataclasses.replace(request, **changes)  # type: ignore[arg-type]


async def _until(condition: Callable[[], Awaitable[bool]], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_a_pod_is_created_listed_read_and_terminated(client: RunPodClient) -> None:
    """The four calls agree on one pod, and terminating twice is silent."""
    provider: Provider = client
    pod = await provider.create(_request("life", env={"A": "1"}, gpu_count=2, min_cuda="13.0"))
    assert (pod.gpu_id, pod.gpu_count, pod.cost_per_hour) == ("NVIDIA A40", 2, 0.98)
    assert [listed.id for listed in await provider.list() if listed.name == pod.name] == [pod.id]
    await _until(lambda: _is_up(client, pod.id))
    await provider.terminate(pod.id)
    await provider.terminate(pod.id)
    await _until(lambda: _is_gone(client, pod.id))
    await provider.terminate(pod.id)


async def _is_up(client: RunPodClient, pod_id: str) -> bool:
    pod = await client.get(pod_id)
    return pod is not None and pod.runtime_up


async def _is_gone(client: RunPodClient, pod_id: str) -> bool:
    return await client.get(pod_id) is None


async def test_the_list_follows_its_pages(client: RunPodClient) -> None:
    """With two pods a page, all eight come: three foreign ones and five of ours."""
    created = {(await client.create(_request(f"page-{number}"))).id for number in range(5)}
    listed = await client.list()
    assert created <= {pod.id for pod in listed}
    assert len(listed) >= 8


async def test_other_peoples_environment_is_not_kept(
    client: RunPodClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The canaries in the list body are in no value and no log line."""
    with caplog.at_level(logging.DEBUG):
        listed = await client.list()
    assert len(listed) >= 3
    assert "SIM_CANARY" not in repr(listed) + caplog.text


async def test_every_offer_can_be_spelled_and_bought(client: RunPodClient) -> None:
    """Offers carry our short names, whole-pod prices and memory; placeholders are not offers."""
    offers = {(o.gpu_name, o.count, o.cloud): o for o in await client.offers()}
    assert offers["A100", 2, "COMMUNITY"].price_per_hour == 2.38
    assert offers["A100", 2, "COMMUNITY"].memory_gb == 160
    assert ("MI300X", 1, "COMMUNITY") not in offers
    assert all(parse_hardware(f"{count}x {name}").count == count for name, count, _ in offers)


async def test_no_capacity_is_told_from_a_bad_request(client: RunPodClient, runpod: SimulatorServer) -> None:
    """Both are 400: the recorded words decide, and unknown words count as unrecognized shortage."""
    runpod.control("POST", "faults", {"name": "capacity", "match": {"gpu": "NVIDIA A4?"}})
    with pytest.raises(NoCapacity) as shortage:
        await client.create(_request("full"))
    assert shortage.value.recognized
    with pytest.raises(NoCapacity):
        await client.create(_request("more-than-a-host-has", gpu_count=100))
    for text, kind in {
        "a is not a valid b": RequestRejected,
        'Variable "$input" got invalid value {}; Field "x" is not defined by type "y".': ProviderOutage,
        "Something went wrong. Please try again later or contact support.": Ambiguous,
    }.items():
        runpod.control("POST", "faults", {"name": "http_error", "params": {"status": 400, "detail": text}})
        with pytest.raises(kind):
            await client.create(_request("full"))
    runpod.control(
        "POST", "faults", {"name": "http_error", "params": {"status": 400, "detail": "Never heard"}}
    )
    with pytest.raises(NoCapacity) as unknown:
        await client.create(_request("full"))
    assert not unknown.value.recognized


async def test_a_rejected_request_says_why(client: RunPodClient) -> None:
    """An oversized body and bad values are never worth a retry; a type that is unknown is one offer less."""
    with pytest.raises(NoCapacity, match="Unknown GPU type: NVIDIA A4000000") as unknown:
        await client.create(_request("gpu", gpu_id="NVIDIA A4000000"))
    assert not unknown.value.recognized
    with pytest.raises(RequestRejected, match="413"):
        await client.create(_request("size", env={"A": "x" * 103_000}))
    with pytest.raises(RequestRejected, match="disk: minimum"):
        await client.create(_request("disk", disk_gb=0))


@pytest.mark.parametrize("key", ["wrong", "read"])
async def test_a_bad_key_is_named(runpod: SimulatorServer, key: str) -> None:
    """401 and 403 ask for another key and do not show this one."""
    async with RunPodClient(base_url=runpod.rest, api_key=key) as client:
        with pytest.raises(Unauthorized, match="RUNPOD_API_KEY") as caught:
            await client.create(_request("key"))
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize("key", ["", " ", "two words", "line\nbreak", "schlüssel"])
async def test_a_malformed_key_is_refused_before_it_is_sent(key: str) -> None:
    """HTTP libraries quote a header they cannot send: the key must not come that far."""
    with pytest.raises(ConfigurationError, match="RUNPOD_API_KEY"):
        RunPodClient(base_url="http://127.0.0.1:1/v2", api_key=key)


async def test_an_expensive_account_stops_at_its_spending_limit(runpod: SimulatorServer) -> None:
    """402 is an error of its own, because everything must stop then."""
    async with RunPodClient(base_url=runpod.rest, api_key="poor") as client:
        await client.create(_request("poor-1", gpu_id="NVIDIA B300 SXM6 AC", gpu_count=8))
        with pytest.raises(InsufficientFunds, match="spending limit"):
            await client.create(_request("poor-2", gpu_id="NVIDIA B300 SXM6 AC", gpu_count=8))


@pytest.mark.parametrize("body", [None, "pod"])
async def test_a_create_that_fails_after_the_fact_leaves_one_pod(
    client: RunPodClient, runpod: SimulatorServer, body: str | None
) -> None:
    """500 with the pod created is `Ambiguous`, asked once, and the pod is found by its name."""
    params = {"body": body} if body else {}
    runpod.control("POST", "faults", {"name": "created_but_500", "params": params})
    created = runpod.report()["created"]
    with pytest.raises(Ambiguous):
        await client.create(_request(f"lost-{body}"))
    assert len(await named(client, f"test-lost-{body}")) == 1
    assert runpod.report()["created"] == created + 1


async def test_a_pod_above_the_ceiling_is_given_back(client: RunPodClient) -> None:
    """A price that went up between catalogue and create costs nothing."""
    with pytest.raises(NoCapacity, match="ceiling"):
        await client.create(_request("dear", price_ceiling=0.10))
    assert await named(client, "test-dear") == []


async def test_reads_are_repeated_after_an_error_of_the_server(
    client: RunPodClient, runpod: SimulatorServer
) -> None:
    """Two 503 answers cost a moment, not an error."""
    runpod.control(
        "POST", "faults", {"name": "http_error", "params": {"status": 503, "html": True}, "times": 2}
    )
    assert len(await client.list()) >= 3


async def test_the_pace_of_the_server_is_obeyed() -> None:
    """A long `Retry-After` comes out as `RateLimited` with the wait; a short one is waited for."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with SimulatorServer(config={"rate_limits": {"minute": 2}}, profile="instant") as server:
        async with RunPodClient(base_url=server.rest, api_key=server.api_key, sleep=sleep) as client:
            await client.list()
            await client.list()
            with pytest.raises(RateLimited) as caught:
                await client.list()
    assert 30 < caught.value.retry_after_seconds <= 61
    assert waits == []


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno", Ambiguous),
        ("HTTP/1.1 408 Request Timeout\r\nContent-Length: 17\r\n\r\n" + '{"detail": "slo"}', Ambiguous),
        ("HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\nhtml", Ambiguous),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Ambiguous),
        ("HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", Ambiguous),
        ("HTTP/1.1 201 Created\r\nContent-Length: 5\r\n\r\n{brok", Ambiguous),
        (f"HTTP/1.1 201 Created\r\nContent-Length: {len(POD)}\r\n\r\n{POD}", Ambiguous),
        ("HTTP/1.1 201 Created\r\nContent-Length: 500\r\n\r\n{", Ambiguous),
        ("", Ambiguous),
    ],
)
async def test_an_unclear_answer_to_a_create_is_ambiguous_and_asked_once(
    said: str, kind: type[Exception]
) -> None:
    """Only 201 with our pod is success, and only a clean refusal is a failure; nothing is sent twice."""
    async with _served(said) as (server, client):
        with pytest.raises(kind) as caught:
            await client.create(_request("unclear", env={"TOKEN": "hidden-value"}))
    assert len(server.heads) == 1
    assert "hidden-value" not in str(caught.value)


async def test_a_create_that_could_not_be_sent_is_an_outage() -> None:
    """A refused connection proves that nothing was created."""
    async with AnsweringServer("") as server:
        pass
    async with RunPodClient(base_url=server.url, api_key=KEY) as client:
        with pytest.raises(ProviderOutage, match="Nothing was created"):
            await client.create(_request("unsent"))


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{}",
        "<html>",
        '{"pods": null}',
        '{"pods": [{"name": "x"}]}',
        '{"pods": [], "pagination": {"hasNextPage": true}}',
        '{"pods": [], "pagination": {"hasNextPage": true, "nextCursor": "again"}}',
    ],
)
async def test_a_list_that_is_not_whole_is_an_error(body: str) -> None:
    """A body of another form, an entry without id or an endless list never looks like fewer pods."""
    async with (
        AnsweringServer(answer(200, body)) as server,
        RunPodClient(base_url=server.url, api_key=KEY) as client,
    ):
        with pytest.raises(ProviderOutage):
            await client.list()


async def test_a_sparse_pod_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """Missing keys are tolerated; the key goes into one header, and nowhere else."""
    body = f'{{"pods": [{POD}, {{"id": "p2", "runtime": {{"uptime": 0}}, "new": 1}}]}}'
    with caplog.at_level(logging.DEBUG):
        async with (
            AnsweringServer(answer(200, body)) as server,
            RunPodClient(base_url=server.url, api_key=KEY) as client,
        ):
            pods = await client.list()
            assert KEY not in repr(client) + caplog.text
    assert [(pod.id, pod.runtime_up, pod.created_at) for pod in pods] == [
        ("p1", False, None),
        ("p2", False, None),
    ]
    head = server.heads[0]
    assert head.startswith("GET /v2/pods HTTP")
    assert head.count(KEY) == 1
    assert "User-Agent: openweights-prefect/" in head


async def test_an_outage_ends_the_retries_of_a_terminate() -> None:
    """DELETE is tried a few times, then the error says so."""

    async def sleep(_: float) -> None:
        return None

    async with (
        AnsweringServer("") as server,
        RunPodClient(base_url=server.url, api_key=KEY, sleep=sleep) as client,
    ):
        with pytest.raises(ProviderOutage, match="failed 4 times"):
            await client.terminate("abc")
        with pytest.raises(ValueError, match="not a pod id"):
            await client.terminate("../account")
    assert len(server.heads) == 4


RECORDED = {
    "id": "mqseb0i5acrssr",
    "name": "test-recorded",
    "status": "RUNNING",
    "cost": 0.13,
    "createdAt": "2026-10-08T09:33:33.607Z",
    "cudaVersion": "13.0",
    "dataCenterId": None,
    "gpu": {"count": 1, "id": "NVIDIA GeForce RTX 3070", "memory": 18, "vcpuCount": 22},
    "runtime": {"uptime": 33},
    "ssh": {
        "direct": {"host": "203.0.113.7", "port": 30001, "username": "root"},
        "proxy": {"host": "ssh.runpod.io", "port": 22, "username": "mqseb0i5acrssr-64411cb6"},
    },
}


@pytest.mark.parametrize(
    ("ssh", "host"),
    [
        (RECORDED["ssh"], "64411cb6"),
        ({"direct": {"host": "203.0.113.7"}, "proxy": None}, "203.0.113.7"),
        ({"direct": None, "proxy": {"username": "somebody"}}, None),
        ({"direct": None, "proxy": {"username": "mqseb0i5acrssr-"}}, None),
        (None, None),
    ],
)
async def test_the_machine_of_a_pod_is_known_by_its_shell(ssh: object, host: str | None) -> None:
    """The proxy's user carries the machine, the direct address almost; and what the machine has is read."""
    body = {"pods": [{**RECORDED, "ssh": ssh}]}
    async with _served(answer(200, body)) as (_server, client):
        [pod] = await client.list()
    assert pod.host == host
    assert (pod.cuda, pod.vcpu, pod.ram_gb, pod.runtime_up) == ("13.0", 22, 18, True)


def _specification(*gpu_keys: str) -> str:
    schema: dict[str, object] = {"properties": {"gpu": {"properties": {key: {} for key in gpu_keys}}}}
    body = {"requestBody": {"content": {"application/json": {"schema": schema}}}}
    return answer(200, {"paths": {"/v2/pods": {"post": body}}})


async def test_machine_minima_are_asked_only_of_a_server_that_knows_them() -> None:
    """An unknown key is refused with 422, so the server's description is read first, once."""
    wish = {"gpu_id": "NVIDIA A40", "min_ram_gb_per_gpu": 16, "min_vcpu_per_gpu": 8, "min_cuda": "12.8"}
    plain = {"id": "NVIDIA A40", "count": 1, "minCudaVersion": "12.8"}
    pod = answer(201, RECORDED)
    for keys, more in {
        ("minRamPerGpu", "minVcpuCountPerGpu"): {"minRamPerGpu": 16, "minVcpuCountPerGpu": 8},
        ("id",): {},
    }.items():
        async with _served(_specification(*keys), pod) as (server, client):
            await client.create(_request("recorded", **wish))
            await client.create(_request("recorded", **wish))
        assert [head.split(" ")[:2] for head in server.heads] == [
            ["GET", "/v2/openapi.json"],
            ["POST", "/v2/pods"],
            ["POST", "/v2/pods"],
        ]
        assert KEY not in server.heads[0]
        assert server.bodies[1]["gpu"] == server.bodies[2]["gpu"] == {**plain, **more}
    async with _served(pod) as (server, client):
        await client.create(_request("recorded"))
    assert server.bodies[0] == {
        "name": "test-recorded",
        "image": "sim/sleep",
        "gpu": {"id": "NVIDIA A40", "count": 1},
        "cloud": "SECURE",
        "disk": 20,
        "env": {},
    }


async def test_a_pod_with_a_smaller_machine_is_given_back() -> None:
    """A server that cannot be asked for a minimum may send less; one that does not tell is believed."""
    for wish, words in (
        ({"min_vcpu_per_gpu": 23}, "has 22 vCPU"),
        ({"min_ram_gb_per_gpu": 19}, "18 GB of RAM"),
    ):
        async with _served(answer(404), answer(201, RECORDED), answer(204)) as (server, client):
            with pytest.raises(NoCapacity, match=words):
                await client.create(_request("recorded", **wish))
        assert server.heads[-1].startswith("DELETE /v2/pods/mqseb0i5acrssr ")
        untold = {**RECORDED, "gpu": {"id": "NVIDIA A40", "count": 1}}
        async with _served(answer(404), answer(201, untold)) as (server, client):
            assert (await client.create(_request("recorded", **wish))).vcpu == 0


async def test_what_cannot_be_had_is_no_offer() -> None:
    """The sentinel, a cloud that does not sell it, a quota of none and places that cannot be worked with."""
    card = {
        "id": "NVIDIA A40",
        "memory": 48,
        "secure": True,
        "price": {"secure": 0.5},
        "maxCount": {"secure": 1},
        "availability": "HIGH",
        "dataCenters": [{"id": "EU-RO-1"}, {"id": "SA-AR-1"}],
    }
    unusable = (
        {"id": "unknown"},
        {"secure": False},
        {"maxCount": {"secure": 0}},
        {"price": {"secure": 0}},
        {"dataCenters": [{"id": "SA-AR-1"}, {"id": "AR-BA-2"}]},
    )
    arkansas = {**card, "id": "NVIDIA L4", "dataCenters": [{"id": "US-AR-1"}]}
    body = {"gpus": [card, arkansas, *({**card, **change} for change in unusable)]}
    async with _served(answer(200, body)) as (_server, client):
        offers = await client.offers()
    assert [(offer.gpu_name, offer.cloud) for offer in offers] == [("A40", "SECURE"), ("L4", "SECURE")]


async def test_the_machines_log_of_a_pod_is_read(client: RunPodClient) -> None:
    """Against the simulator: what was logged so far, although the stream stays open; nothing of no pod."""
    pod = await client.create(_request("log"))
    await _until(lambda: _is_up(client, pod.id))
    lines = await client.system_log(pod.id)
    assert lines[0] == "create container sim/sleep"
    assert any(line.startswith("start container") for line in lines)
    assert await client.system_log("nosuchpod") == []


def _events(*lines: object) -> str:
    events = [f"id: 2026-06-01T12:02:03Z/{n:012}\ndata: {line}\n\n" for n, line in enumerate(lines)]
    return "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: hello\n\n" + "".join(events)


async def test_a_log_that_stays_open_or_breaks_off_is_read_as_far_as_it_goes() -> None:
    """Comments, broken events, foreign sources and a last half event are passed over; lines are bounded."""
    said = _events(
        '{"ts": "x", "source": "system", "line": "one"}',
        "no json",
        "[]",
        '{"source": "container", "line": "not this"}',
        '{"line": "two\u2028half"}',
        f'{{"source": "system", "line": "{"x" * 9000}"}}',
        '{"source": "system", "li',
    )
    for stays_open in (True, False):
        async with _served(said, stays_open=stays_open) as (server, client):
            lines = await client.system_log("p1")
        assert lines[:2] == ["one", "two\u2028half"]
        assert [len(line) for line in lines[2:]] == [2000]
        assert "GET /v2/pods/p1/logs?source=system&tail=500 HTTP" in server.heads[0]


async def test_an_endless_log_is_left_after_its_limit() -> None:
    """A server that never falls silent costs a bounded number of bytes."""
    said = _events(*['{"source": "system", "line": "' + "y" * 1000 + '"}'] * 3000)
    async with _served(said, stays_open=True) as (_server, client):
        lines = await client.system_log("p1")
    assert 100 < len(lines) < 1000


@pytest.mark.parametrize(
    ("said", "kind"),
    [(answer(403), None), (answer(404), None), (answer(401), Unauthorized), (answer(503), ProviderOutage)],
)
async def test_a_log_that_may_not_be_read_is_empty(said: str, kind: type[Exception] | None) -> None:
    """Without a log a pod is judged by its other signs; a broken server is an error."""
    async with _served(said) as (_server, client):
        if kind is None:
            assert await client.system_log("p1") == []
        else:
            with pytest.raises(kind):
                await client.system_log("p1")
