"""Every fault of the table, struck for real."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from openweights_prefect.simulator.faults import FAULTS
from openweights_prefect.simulator.server import SimulatorServer

GPU = {"id": "NVIDIA A40", "count": 2}
HEADERS = {"User-Agent": "a-test/1"}


class Client:
    """A client of one simulator, with what the tests need to look at."""

    def __init__(self, server: SimulatorServer) -> None:
        self.server = server
        self._names = 0
        headers = {**HEADERS, "Authorization": f"Bearer {server.api_key}"}
        self.http = httpx.Client(base_url=server.rest, headers=headers, trust_env=False, timeout=20)

    def body(self, image: str = "sim/sleep", **changes: Any) -> dict[str, Any]:
        self._names += 1
        return {"name": f"pod-{self._names}", "image": image, "gpu": GPU, "disk": 5, **changes}

    def create(self, image: str = "sim/sleep", **changes: Any) -> str:
        response = self.http.post("/pods", json=self.body(image, **changes))
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def up(self, image: str = "sim/sleep", **changes: Any) -> str:
        pod_id = self.create(image, **changes)
        self.server.wait("pod.phase==UP", pod=pod_id)
        return pod_id

    def get(self, pod_id: str) -> Any:
        response = self.http.get(f"/pods/{pod_id}")
        return response.json() if response.status_code == 200 else None

    def fault(self, name: str, **rule: Any) -> None:
        self.server.control("POST", "faults", {"name": name, **rule})

    def names(self) -> list[str]:
        pods = self.http.get("/pods").json()["pods"]
        return [pod["name"] for pod in pods if pod["name"].startswith("pod-")]

    def system_log(self, pod_id: str) -> list[str]:
        lines = []
        url, query = f"/pods/{pod_id}/logs", {"source": "system"}
        # The stream stays open: what came before it fell silent is all there is.
        with (
            contextlib.suppress(httpx.ReadTimeout),
            self.http.stream("GET", url, params=query, timeout=0.5) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: "):
                    lines.append(json.loads(line[6:])["line"])
                if len(lines) > 50:
                    break
        return lines


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatorServer]:
    smi = {"entrypoint": ["/bin/sh", "-c"], "cmd": ["nvidia-smi -L; sleep 600"]}
    images = {"our/*": smi, "private/*": {**smi, "private": True}, "cuda13/*": {**smi, "cuda": "13.9"}}
    config = {"rate_limits": {}, "images": images, "balance": 100_000}
    with SimulatorServer(config=config, profile="instant") as running:
        yield running


@pytest.fixture
def client(server: SimulatorServer) -> Iterator[Client]:
    client = Client(server)
    with client.http:
        yield client
        server.control("DELETE", "faults")
        server.control(
            "PUT", "accounts/main", {"revoked": False, "spend_limit_per_hour": 1e6, "balance": 1e5}
        )
        for pod_id in server.report()["alive"]:
            client.http.delete(f"/pods/{pod_id}")


def _until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
    return value


# Of a request

_CUT = (httpx.ReadError, httpx.RemoteProtocolError)
"""Which of them it is depends on how much the client has sent."""


@pytest.mark.parametrize("name", ["refuse", "created_but_reset"])
def test_a_connection_is_reset(client: Client, name: str) -> None:
    """Before anything was done, or with the pod there; nothing tells the two apart."""
    client.fault(name)
    with pytest.raises(_CUT):
        client.http.post("/pods", json=client.body())
    assert len(client.names()) == (name == "created_but_reset")


@pytest.mark.parametrize("name", ["hang", "created_but_timeout"])
def test_no_answer_comes(client: Client, name: str) -> None:
    """Silence, then a reset; the one has made a pod, the other not."""
    client.fault(name, params={"seconds": 0.3, "hold_s": 0.3})
    started = time.monotonic()
    with pytest.raises(_CUT):
        client.http.post("/pods", json=client.body())
    assert time.monotonic() - started >= 0.3
    assert len(client.names()) == (name == "created_but_timeout")


def test_a_body_comes_slowly_or_half(client: Client) -> None:
    """Headers at once, then a drip; or JSON that ends in the middle."""
    client.fault("slow_body", params={"seconds": 0.5})
    started = time.monotonic()
    with client.http.stream("GET", "/pods") as response:
        assert time.monotonic() - started < 0.4
        assert json.loads(response.read())["pods"]
    assert time.monotonic() - started >= 0.5
    client.fault("truncated_json")
    with pytest.raises(json.JSONDecodeError):
        client.http.get("/pods").json()


def test_an_answer_in_place_of_the_operation(client: Client) -> None:
    """Any status, also as a page; the 429 of a window; the outage of August."""
    client.fault("http_error", params={"status": 503, "html": True, "detail": "busy"})
    page = client.http.get("/pods")
    assert (page.status_code, page.headers["content-type"]) == (503, "text/html; charset=utf-8")
    client.fault("rate_limited", params={"retry_after": 7, "window": "hour"})
    limited = client.http.get("/pods")
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "7")
    assert limited.json()["detail"] == "rate limit exceeded for the hour window"
    client.fault("schema_outage")
    outage = client.http.post("/pods", json=client.body())
    assert outage.status_code == 400
    assert 'Field "objectMounts" is not defined by type' in outage.json()["detail"]


@pytest.mark.parametrize("body", [None, "pod"])
def test_a_pod_behind_a_500(client: Client, body: str | None) -> None:
    """The pod is there, with the whole of it in the answer or not."""
    client.fault("created_but_500", params={"body": body})
    response = client.http.post("/pods", json=client.body())
    assert (response.status_code, "id" in response.json()) == (500, body == "pod")
    assert len(client.names()) == 1


def test_a_create_makes_two(client: Client) -> None:
    """One of them is in the answer; the other's seconds are an orphan's."""
    client.fault("duplicate_create")
    pod_id = client.create()
    assert len(client.names()) == 2
    orphans = client.server.report()["orphans"]
    assert len(orphans.keys() & set(client.server.report()["alive"])) == 1
    assert pod_id not in orphans


@pytest.mark.parametrize(
    "text",
    [None, "create pod: There are no instances currently available", "Something went wrong."],
)
def test_there_is_no_capacity(client: Client, text: str | None) -> None:
    """Any of the known words, with any status."""
    status = 500 if text else 400
    client.fault("capacity", params={"text": text, "status": status} if text else {})
    response = client.http.post("/pods", json=client.body())
    wanted = text or "There are no longer any instances available with the requested specifications."
    assert response.status_code == status
    assert response.json()["detail"].startswith(wanted)
    assert client.names() == []


@pytest.mark.parametrize(
    ("name", "status"), [("delete_404", 404), ("delete_500", 500), ("delete_ignored", 204)]
)
def test_a_delete_is_not_what_it_says(client: Client, name: str, status: int) -> None:
    """404 and 204 with the pod alive, 500 with the pod gone."""
    pod_id = client.up()
    client.fault(name)
    assert client.http.delete(f"/pods/{pod_id}").status_code == status
    gone = (client.get(pod_id) or {"status": "gone"})["status"] != "RUNNING"
    assert gone == (name == "delete_500")


def test_a_list_is_short_or_in_pages(client: Client) -> None:
    """Silently short; with a cursor that leads to the rest; in pages of one."""
    for _ in range(3):
        client.create()
    whole = len(client.http.get("/pods").json()["pods"])
    client.fault("list_truncated", params={"fraction": 0.4})
    short = client.http.get("/pods").json()
    assert len(short["pods"]) < whole
    assert not short["pagination"]["hasNextPage"]
    client.fault("list_truncated", params={"fraction": 0.4, "cursor": True})
    first = client.http.get("/pods").json()
    rest = client.http.get("/pods", params={"cursor": first["pagination"]["nextCursor"]}).json()
    assert len(first["pods"]) + len(rest["pods"]) == whole
    client.fault("list_page_size", times=None, params={"n": 1})
    assert len(client.http.get("/pods").json()["pods"]) == 1


def test_a_pod_does_not_show_for_a_while(client: Client) -> None:
    """404 and unlisted after its creation, then there."""
    client.fault("visibility", params={"seconds": 0.5})
    pod_id = client.create()
    assert client.get(pod_id) is None
    assert client.names() == []
    _until(lambda: client.get(pod_id))


def test_the_clock_of_the_provider_is_off(client: Client) -> None:
    """`createdAt` alone, in every answer that the rule strikes."""
    pod_id = client.create()
    before = client.get(pod_id)
    client.fault("clock_skew", params={"seconds": -7200})
    skewed = client.get(pod_id)
    assert skewed["createdAt"] < before["createdAt"]
    assert skewed["startedAt"] == before["startedAt"]


def test_the_catalogue_lies(client: Client) -> None:
    """NONE where there is plenty; a create works all the same."""
    client.fault("catalog_lies", match={"gpu": "NVIDIA A40"}, params={"level": "NONE"})
    query = {"include": "AVAILABILITY", "product": "POD"}
    gpus = client.http.get("/catalog/gpus", params=query).json()["gpus"]
    assert {gpu["id"]: gpu.get("availability") for gpu in gpus}["NVIDIA A40"] == "NONE"
    client.create()


def test_an_account_loses_key_money_and_limit(client: Client) -> None:
    """401 from now on; the spending limit; and without a balance the pods end."""
    client.fault("key_revoked")
    assert [client.http.get("/pods").status_code for _ in range(2)] == [401, 401]
    client.server.control("PUT", "accounts/main", {"revoked": False})
    client.fault("spend_limit", params={"per_hour": 0.5})
    refused = client.http.post("/pods", json=client.body())
    assert (refused.status_code, refused.json()["detail"]) == (402, "You have exceeded your spending limit.")
    client.server.control("PUT", "accounts/main", {"spend_limit_per_hour": 100})
    pod_id = client.up()
    client.fault("balance")
    refused = client.http.post("/pods", json=client.body())
    assert (refused.status_code, "Insufficient balance" in refused.json()["detail"]) == (402, True)
    _until(lambda: client.get(pod_id) is None)


# On the way to a container


def test_no_machine_or_an_endless_pull(client: Client) -> None:
    """RUNNING without a runtime, and the log says nothing, or stops in the middle of the layers."""
    client.fault("alloc_stall")
    stalled = client.create()
    client.fault("pull_stuck")
    stuck = client.create("our/stuck:1")
    client.server.wait("pod.phase==pulling", pod=stuck)
    assert client.system_log(stuck)[-1].endswith("Downloading")
    assert client.server.pod(stalled)["phase"] == "allocating"
    assert {client.get(pod)["status"] for pod in (stalled, stuck)} == {"RUNNING"}
    assert client.get(stalled)["dataCenterId"] is None


def test_a_slow_pull_ends(client: Client) -> None:
    """After its seconds, with all the lines of a pull."""
    client.fault("slow_pull", params={"seconds": 0.4})
    pod_id = client.create("our/slow:1")
    client.server.wait("pod.phase==UP", pod=pod_id)
    log = client.system_log(pod_id)
    assert log[0:2] == ["create container our/slow:1", "1 Pulling from our/slow"]
    assert [word for line in log for word in ("Pulling fs", "Extracting", "Pull complete") if word in line]
    assert log[-1] == "start container for our/slow:1: begin"
    assert "Status: Downloaded newer image for our/slow:1" in log
    assert any(line.startswith("Digest: sha256:") for line in log)


@pytest.mark.parametrize(
    ("name", "image", "words"),
    [
        ("pull_auth", "sim/sleep", "unauthorized: authentication required"),
        ("pull_missing", "sim/sleep", "manifest unknown"),
        (None, "private/one", "unauthorized: authentication required"),
        (None, "nobody/nothing", "manifest unknown"),
    ],
)
def test_an_image_cannot_be_had(client: Client, name: str | None, image: str, words: str) -> None:
    """EXITED, unbilled, with the reason in the system log."""
    if name:
        client.fault(name)
    pod_id = client.create(image)
    client.server.wait("pod.phase==stopped", pod=pod_id)
    assert client.get(pod_id)["status"] == "EXITED"
    assert words in client.system_log(pod_id)[-1]


@pytest.mark.parametrize("image", ["sim/sleep", "cuda13/one"])
def test_the_driver_is_too_old(client: Client, image: str) -> None:
    """By a rule or because the image needs more than the host has: no container, for ever."""
    if image == "sim/sleep":
        client.fault("cuda_mismatch")
    pod_id = client.create(image)
    client.server.wait("pod.phase==stuck", pod=pod_id)
    assert "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=" in str(
        client.system_log(pod_id)
    )
    assert (client.get(pod_id)["status"], client.get(pod_id)["runtime"]) == ("RUNNING", None)


def test_a_container_cannot_start_and_a_pod_ends_in_error(client: Client) -> None:
    """Tried again and again; or ERROR."""
    client.fault("container_error")
    looping = client.create()
    client.server.wait("pod.attempts>=3", pod=looping)
    assert "error starting container: OCI runtime create failed" in str(client.system_log(looping))
    client.fault("error_state")
    broken = client.create()
    client.server.wait("pod.phase==errored", pod=broken)
    assert client.get(broken)["status"] == "ERROR"


# In the container


@pytest.mark.parametrize(("name", "cards"), [("zero_gpu", 0), ("missing_gpu", 1), (None, 2)])
def test_cards_are_missing(client: Client, name: str | None, cards: int) -> None:
    """`nvidia-smi` tells what is there, not what was ordered; a second start finds the same."""
    if name:
        client.fault(name)
    pod_id = client.up("our/image")
    said = _until(lambda: client.server.log(pod_id))
    assert (said.count("GPU-"), "No devices were found" in said) == (cards, cards == 0)
    assert client.get(pod_id)["gpu"]["count"] == 2


def test_a_card_counts_errors(client: Client) -> None:
    """Uncorrected ones, of the first card."""
    client.fault("ecc_errors", params={"errors": 3})
    query = (
        "nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total --format=csv,noheader; sleep 9"
    )
    pod_id = client.up("our/image", args=json.dumps({"cmd": [query]}))
    assert _until(lambda: client.server.log(pod_id)) == "0, 3\n1, 0\n"


@pytest.mark.parametrize(("params", "status"), [({}, "RUNNING"), ({"mode": "exited"}, "EXITED")])
def test_a_container_dies(client: Client, params: dict[str, str], status: str) -> None:
    """A rule that is added strikes a pod that runs; it restarts or stays EXITED."""
    pod_id = client.up()
    pid = client.server.pod(pod_id)["pid"]
    client.fault("pod_death", match={"podId": pod_id}, params=params)
    _until(lambda: not _alive(pid))
    assert client.get(pod_id)["status"] == status
    if status == "RUNNING":
        client.server.wait("pod.attempts>=2", pod=pod_id)


@pytest.mark.parametrize("then", ["exited", "vanish"])
def test_a_pod_is_preempted(client: Client, then: str) -> None:
    """SIGTERM, which may be used, then the end."""
    trap = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.05; done"
    pod_id = client.up("our/image", args=f'"{trap}"')
    _until(lambda: "ready" in client.server.log(pod_id))
    client.fault("preempt", match={"podId": pod_id}, params={"then": then, "grace_s": 0.5})
    _until(lambda: "asked" in client.server.log(pod_id))
    _until(lambda: (client.get(pod_id) or {"status": "gone"})["status"] != "RUNNING")
    assert (client.get(pod_id) is None) == (then == "vanish")


def test_a_host_is_lost_after_a_while(client: Client) -> None:
    """404 at once, and the bill ends."""
    client.fault("host_lost", params={"after_s": [0.2, 0.3]})
    pod_id = client.up()
    _until(lambda: client.get(pod_id) is None)
    cost = client.server.report()["cost_by_pod"][pod_id]
    assert client.server.report()["cost_by_pod"][pod_id] == cost > 0


@pytest.mark.parametrize("name", ["freeze", "maintenance"])
def test_a_pod_stands_still(client: Client, name: str) -> None:
    """All its processes, for some seconds; in maintenance nothing is billed meanwhile."""
    pod_id = client.up()
    pid = client.server.pod(pod_id)["pid"]
    client.fault(name, match={"podId": pod_id}, params={"seconds": 1})
    _until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    costs = [client.server.report()["cost_by_pod"][pod_id]]
    time.sleep(0.3)
    costs.append(client.server.report()["cost_by_pod"][pod_id])
    assert (costs[0] == costs[1]) == (name == "maintenance")
    _until(lambda: psutil.Process(pid).status() == psutil.STATUS_SLEEPING)
    _until(lambda: client.server.report()["cost_by_pod"][pod_id] > costs[1])


def test_the_network_is_cut(client: Client) -> None:
    """Not even the machine's own services answer, by the network or by the proxy."""
    port = client.server.base_url.rpartition(":")[2]
    ask = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/v1/x', timeout=5)"
    script = f'python3 -c "{ask}" 2>&1 | tail -1; sleep 600'
    client.fault("network_cut", match={"name": "cut"})
    args = json.dumps({"cmd": [script]})
    cut, free = client.up("our/image", name="cut", args=args), client.up("our/image", args=args)
    assert "HTTP Error 410" in _until(lambda: client.server.log(free))
    said = _until(lambda: client.server.log(cut))
    assert "unreachable" in said or "refused" in said


def test_a_disk_is_full(client: Client) -> None:
    """Small files can be written, and the log can; a larger one ends where the disk does."""
    script = "head -c 500000 /dev/zero >small; head -c 5000000 /dev/zero >large; ls -l; sleep 600"
    client.fault("disk_full", params={"megabytes": 1})
    pod_id = client.up("our/image", args=json.dumps({"cmd": [script]}))
    said = _until(lambda: (log := client.server.log(pod_id)).count("\n") >= 4 and log)
    assert "No space left on device" in said
    assert " 500000 " in said
    assert " 1000000 " in said


def test_nothing_gets_in(client: Client) -> None:
    """A port and the proxy answer, until the host cannot be reached; the process runs on."""
    pod_id = client.up("sim/http:8000", ports=["8000/http", "8001/tcp", "22/tcp"])
    url = f"{client.server.base_url}/_proxy/{pod_id}/8000/"
    _until(lambda: client.http.get(url).status_code == 200)
    assert client.http.get(f"{client.server.base_url}/_proxy/{pod_id}/9/").status_code == 502
    assert client.http.get(f"{client.server.base_url}/_proxy/nobody/8000/").status_code == 404
    assert client.get(pod_id)["ssh"]["direct"]["port"] > 1024
    client.fault("host_unreachable", match={"podId": pod_id})
    with pytest.raises(httpx.ReadTimeout):
        client.http.get(url, timeout=0.5)
    assert client.server.pod(pod_id)["phase"] == "up"


def test_telemetry_is_missing_or_old(client: Client) -> None:
    """Null while the process runs, for a time; or the last value after it has died."""
    client.fault("runtime_null", params={"seconds": 0.5})
    pod_id = client.up()
    assert client.get(pod_id)["runtime"] is None
    _until(lambda: client.get(pod_id)["runtime"])
    client.fault("runtime_stale", match={"image": "sim/exit:1"})
    dead = client.create("sim/exit:1")
    client.server.wait("pod.attempts>=3", pod=dead)
    last = _until(lambda: client.get(dead)["runtime"])
    assert {client.get(dead)["runtime"]["uptime"] for _ in range(5)} == {last["uptime"]}


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_every_fault_has_its_test() -> None:
    """The table above names each of them."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in FAULTS if f'"{name}"' not in source] == []
