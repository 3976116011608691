"""The REST surface of the simulator: the order of its checks, its words and its control API."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from openweights_prefect.simulator.server import SimulatorServer

BODY: dict[str, Any] = {
    "name": "one",
    "image": "sim/sleep",
    "gpu": {"id": "NVIDIA A40", "count": 1},
    "cloud": "SECURE",
    "disk": 20,
    "env": {},
}
AGENT = {"User-Agent": "a-test/1"}


@pytest.fixture(scope="module")
def runpod() -> Iterator[SimulatorServer]:
    with SimulatorServer(config={"rate_limits": {}}, profile="fast") as server:
        yield server


@pytest.fixture
def http(runpod: SimulatorServer) -> Iterator[httpx.Client]:
    headers = {**AGENT, "Authorization": f"Bearer {runpod.api_key}"}
    with httpx.Client(base_url=runpod.rest, headers=headers, trust_env=False) as client:
        yield client
        runpod.control("DELETE", "faults")


def _until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def _detail(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json"
    return response.status_code, response.json()["detail"]


def test_size_is_checked_before_the_key(runpod: SimulatorServer) -> None:
    """An oversized body is 413 even for a stranger; a small one is 401."""
    with httpx.Client(base_url=runpod.rest, headers=AGENT, trust_env=False) as stranger:
        assert _detail(stranger.post("/pods", content=b"x" * 102_401))[0] == 413
        assert _detail(stranger.post("/pods", json=BODY)) == (401, "missing bearer token")
        wrong = stranger.get("/pods", headers={"Authorization": "Bearer wrong"})
        assert _detail(wrong) == (401, "invalid bearer token")
        assert stranger.get("/openapi.json").json()["openapi"] == "3.1.0"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"bogus": 1}, 422, "$: additional properties 'bogus' not allowed"),
        ({"name": None}, 422, "$: missing property 'name'"),
        ({"image": None}, 422, "$: missing property 'image'"),
        ({"disk": 0}, 422, "$.disk: minimum: got 0, want 1"),
        ({"disk": True}, 422, "$.disk: got another type, want integer"),
        ({"env": {"A": 1}}, 422, "$.env.A: got another type, want string"),
        ({"gpu": {"count": 1}}, 422, "$.gpu: missing property 'id'"),
        ({"gpu": {"id": "NVIDIA NOT A GPU", "count": 1}}, 422, "Unknown GPU type: NVIDIA NOT A GPU"),
        ({"gpu": {"id": "NVIDIA A40"}}, 400, "no longer any instances available"),
        ({"gpu": {"id": "NVIDIA A40", "count": 11}}, 400, "no longer any instances available"),
        ({"gpu": {"id": "NVIDIA A40", "count": 1, "minCudaVersion": "13.1"}}, 400, "no longer any instances"),
        ({"cloud": "COMMUNITY"}, 400, "no longer any instances available"),
        ({"gpu": None}, 400, "mutually exclusive"),
        ({"env": {f"V{n}": "" for n in range(51)}}, 400, "at most 50"),
    ],
)
def test_a_bad_create_is_refused_in_the_recorded_words(
    http: httpx.Client, change: dict[str, Any], status: int, words: str
) -> None:
    """Each rule has its status and its text, and nothing is created."""
    body = {key: value for key, value in {**BODY, **change}.items() if value is not None}
    before = len(http.get("/pods").json()["pods"])
    response = http.post("/pods", json=body)
    assert (response.status_code, words in json.dumps(response.json())) == (status, True)
    assert len(http.get("/pods").json()["pods"]) == before


def test_unknown_paths_and_methods_are_refused(http: httpx.Client) -> None:
    """404 for a path, 405 with `Allow` for a method, 400 for a body that is not JSON."""
    assert _detail(http.get("/serverless")) == (404, "resource not found")
    assert http.put("/pods/abc", json={}).headers["allow"] == "GET, PATCH, DELETE"
    assert _detail(http.get("/pods/abc")) == (404, "pod not found")
    assert _detail(http.post("/pods", content=b"{")) == (400, "invalid JSON body")
    assert http.get("/pods", headers={"User-Agent": "Python-urllib/3.12"}).text == "error code: 1010"


def test_scopes_and_accounts_are_kept_apart(runpod: SimulatorServer, http: httpx.Client) -> None:
    """A reader may not create, a pod's key may do nothing, another account sees no pod of this one."""
    pod_id = http.post("/pods", json=BODY).json()["id"]

    def as_key(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    assert _detail(http.post("/pods", json=BODY, headers=as_key("rpa_sim_read"))) == (403, "access denied")
    assert _detail(http.delete(f"/pods/{pod_id}", headers=as_key(f"rpa_pod_{pod_id}"))) == (
        403,
        "access denied",
    )
    assert http.get("/pods", headers=as_key("rpa_sim_other")).json()["pods"] == []
    assert http.delete(f"/pods/{pod_id}", headers=as_key("rpa_sim_other")).status_code == 404
    assert http.delete(f"/pods/{pod_id}").status_code == 204


def test_a_pod_is_running_before_it_is_up(http: httpx.Client) -> None:
    """RUNNING from rental on with `runtime` null, then an object; after DELETE TERMINATED, then 404."""
    created = http.post("/pods", json=BODY).json()
    assert (created["status"], created["runtime"], created["cost"]) == ("RUNNING", None, 0.49)
    url = f"/pods/{created['id']}"
    _until(lambda: http.get(url).json()["runtime"] is not None)
    assert http.delete(url).status_code == 204
    assert http.get(url).json()["status"] == "TERMINATED"
    assert http.delete(url).status_code == 204
    _until(lambda: http.get(url).status_code == 404)
    assert _detail(http.delete(url)) == (404, "pod not found")


def test_a_missing_image_ends_as_exited(http: httpx.Client) -> None:
    """The only diagnosis is the system log: `manifest unknown`."""
    pod_id = http.post("/pods", json={**BODY, "image": "nobody/nothing:1"}).json()["id"]
    _until(lambda: http.get(f"/pods/{pod_id}").json()["status"] == "EXITED")
    with http.stream("GET", f"/pods/{pod_id}/logs", params={"source": "system"}) as response:
        lines = response.iter_lines()
        assert any("manifest unknown" in line for line in lines)
    http.delete(f"/pods/{pod_id}")


def test_logs_come_as_server_sent_events(http: httpx.Client) -> None:
    """System and container lines in one stream, which ends with the pod."""
    pod_id = http.post("/pods", json={**BODY, "image": "sim/env-dump", "env": {"MARK": "seen"}}).json()["id"]
    with http.stream("GET", f"/pods/{pod_id}/logs") as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and '"container"' in line:
                assert "seen" in json.loads(line[6:])["line"]
                break
    http.delete(f"/pods/{pod_id}")


def test_the_catalogue_follows_what_is_rented(http: httpx.Client) -> None:
    """Availability falls with the free cards, and the sentinel and placeholder prices are there."""
    query = {"include": "AVAILABILITY", "product": "POD", "cloud": "SECURE", "count": "10"}

    def a40() -> Any:
        gpus = http.get("/catalog/gpus", params=query).json()["gpus"]
        return next(gpu for gpu in gpus if gpu["id"] == "NVIDIA A40")

    assert (a40()["availability"], a40()["price"], a40()["community"]) == (
        "HIGH",
        {"secure": 0.49, "community": 0.5},
        False,
    )
    many = {**BODY, "gpu": {"id": "NVIDIA A40", "count": 10}}
    pods = [http.post("/pods", json=many).json()["id"] for _ in range(2)]
    assert a40()["availability"] == "NONE"
    assert http.post("/pods", json=many).status_code == 400
    for pod_id in pods:
        http.delete(f"/pods/{pod_id}")
    assert a40()["availability"] == "HIGH"
    assert http.get("/catalog/gpus", params={"include": "AVAILABILITY"}).status_code == 400


def test_foreign_pods_are_listed_and_their_mutation_is_reported(
    runpod: SimulatorServer, http: httpx.Client
) -> None:
    """Three pods of somebody else, one of them locked; touching them shows in the report."""
    foreign = [pod for pod in http.get("/pods").json()["pods"] if "SIM_CANARY" in json.dumps(pod["env"])]
    assert [pod["status"] for pod in foreign] == ["RUNNING", "EXITED", "RUNNING"]
    assert foreign[0]["name"].startswith("ow-")
    assert _detail(http.delete(f"/pods/{foreign[2]['id']}")) == (400, "Pod is locked")
    violations = [v for v in runpod.report()["violations"] if v["kind"] == "foreign_mutation"]
    assert [violation["detail"] for violation in violations] == [f"pods.delete {foreign[2]['id']}"]
    assert len(runpod.report()["alive_by_owner"]["foreign"]) == 3


def test_careless_clients_are_reported(http: httpx.Client) -> None:
    """A default User-Agent and a name that is used twice are violations."""
    with SimulatorServer(config={"rate_limits": {}}, profile="instant") as server:
        http.headers["User-Agent"] = "python-httpx/0.28"
        for _ in range(2):
            assert http.post(f"{server.rest}/pods", json=BODY).status_code == 201
        report = server.report()
    assert {violation["kind"] for violation in report["violations"]} == {
        "default_user_agent",
        "same_name_create",
    }
    assert (report["created"], len(report["alive"])) == (2, 2)


def test_the_ledger_counts_by_the_second_and_stops_at_delete(
    runpod: SimulatorServer, http: httpx.Client
) -> None:
    """Cost grows while the pod is rented, by its price, and not after."""
    pod_id = http.post("/pods", json={**BODY, "gpu": {"id": "NVIDIA A40", "count": 4}}).json()["id"]
    _until(lambda: runpod.report()["cost_by_pod"][pod_id] > 0.0001)
    pod = runpod.pod(pod_id)
    least = time.time() - pod["created_at"]
    http.delete(f"/pods/{pod_id}")
    most = time.time() - pod["created_at"]
    cost = runpod.report()["cost_by_pod"][pod_id]
    assert 1.96 / 3600 * least - 1e-6 <= cost <= 1.96 / 3600 * most + 1e-6
    _until(lambda: runpod.pod(pod_id) is None)
    assert runpod.report()["cost_by_pod"][pod_id] == pytest.approx(cost, abs=1e-6)


def test_the_request_limit_is_told_and_kept(http: httpx.Client) -> None:
    """Headers on every answer, 429 with `Retry-After` when the window is used up; control calls are free."""
    with SimulatorServer(config={"rate_limits": {"minute": 3, "hour": 100}}, profile="instant") as server:
        answers = [http.get(f"{server.rest}/pods") for _ in range(4)]
        server.report()
    assert answers[0].headers["RateLimit"].startswith('"minute";r=2;t=60')
    assert answers[0].headers["RateLimit-Policy"] == '"minute";q=3;w=60, "hour";q=100;w=3600'
    assert _detail(answers[3]) == (429, "rate limit exceeded for the minute window")
    assert 50 <= int(answers[3].headers["Retry-After"]) <= 60


def test_fault_rules_match_count_and_end(runpod: SimulatorServer, http: httpx.Client) -> None:
    """A rule strikes what it matches, the `nth` time, so often; an unknown one is refused."""
    rule = {
        "name": "http_error",
        "match": {"op": "pods.list", "nth": 2},
        "params": {"status": 502},
        "times": None,
    }
    runpod.control("POST", "faults", rule)
    assert [http.get("/pods").status_code for _ in range(3)] == [200, 502, 200]
    runpod.control("DELETE", "faults")
    with pytest.raises(httpx.HTTPStatusError, match="422"):
        runpod.control("POST", "faults", {"name": "meteorite"})


def test_control_needs_its_token(runpod: SimulatorServer) -> None:
    """The token is in a file that only its owner can read."""
    assert httpx.get(f"{runpod.base_url}/_sim/state", trust_env=False).status_code == 401
    assert (runpod.folder / "control_token").stat().st_mode & 0o777 == 0o600
    assert (runpod.folder / "state.json").stat().st_mode & 0o777 == 0o600
