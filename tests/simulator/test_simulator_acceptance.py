"""What a simulator of RunPod must do, as its specification lists it; the rest is in the other files here."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from openweights_prefect.simulator.faults import FAULTS
from openweights_prefect.simulator.gateway import OPENAPI
from openweights_prefect.simulator.report import VIOLATIONS
from openweights_prefect.simulator.server import SimulatorServer

jsonschema = pytest.importorskip("jsonschema")

BODY: dict[str, Any] = {
    "name": "one",
    "image": "sim/sleep",
    "gpu": {"id": "NVIDIA A40", "count": 2},
    "disk": 20,
    "env": {},
}
STILL = {"rate_limits": {}, "clock": "manual", "foreign_pods": False}
# What a live account answered; the shape is what matters.
RECORDED = {
    *("actions", "args", "cloud", "cost", "createdAt", "cudaVersion", "dataCenterId", "disk", "env"),
    *("globalNetworking", "gpu", "id", "image", "locked", "mounts", "name", "ports", "registry", "runtime"),
    *("ssh", "startedAt", "status", "template"),
}


def _http(server: SimulatorServer, key: str | None = None) -> httpx.Client:
    headers = {"User-Agent": "a-test/1", "Authorization": f"Bearer {key or server.api_key}"}
    return httpx.Client(base_url=server.rest, headers=headers, trust_env=False, timeout=30)


@pytest.fixture(scope="module")
def runpod() -> Iterator[SimulatorServer]:
    with SimulatorServer(config={"rate_limits": {}}, profile="instant") as server:
        yield server


@pytest.fixture
def http(runpod: SimulatorServer) -> Iterator[httpx.Client]:
    with _http(runpod) as client:
        yield client
        runpod.control("DELETE", "faults")
        for pod_id in runpod.report()["alive"]:
            client.delete(f"/pods/{pod_id}")


def _up(server: SimulatorServer, http: httpx.Client, **changes: Any) -> str:
    response = http.post("/pods", json={**BODY, "name": f"pod-{time.monotonic_ns()}", **changes})
    assert response.status_code == 201, response.text
    pod_id = str(response.json()["id"])
    server.wait("pod.phase==UP", pod=pod_id)
    return pod_id


def _conforms(response: httpx.Response, path: str, method: str) -> None:
    document = json.loads(OPENAPI.read_text(encoding="utf-8"))
    answer = document["paths"][path][method]["responses"][str(response.status_code)]
    while "$ref" in answer:
        answer = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    schema = next(iter(answer["content"].values()))["schema"]
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(
        response.json()
    )


def test_answers_conform_to_the_published_api(runpod: SimulatorServer, http: httpx.Client) -> None:
    """Pods in every phase, refusals, the catalogue and the billing; the document itself needs no key."""
    assert httpx.get(f"{runpod.rest}/openapi.json", trust_env=False).json()["paths"]
    created = http.post("/pods", json=BODY)
    _conforms(created, "/v2/pods", "post")
    runpod.wait("pod.phase==UP", pod=created.json()["id"])
    for path, url, method in [
        ("/v2/pods", "/pods", "get"),
        ("/v2/pods/{id}", f"/pods/{created.json()['id']}", "get"),
        ("/v2/pods/{id}", "/pods/nobody", "get"),
        ("/v2/pods", "/pods", "post"),
        ("/v2/catalog/gpus", "/catalog/gpus?include=AVAILABILITY&product=POD", "get"),
        ("/v2/billing/pods", "/billing/pods", "get"),
    ]:
        response = http.request(method, url, json={"bogus": 1} if method == "post" else None)
        _conforms(response, path, method)


def test_a_list_has_the_recorded_shape(runpod: SimulatorServer, http: httpx.Client) -> None:
    """All keys of a live answer, the host's mark in the ssh name, and RunPod's own port."""
    pod_id = _up(runpod, http)
    page = http.get("/pods").json()
    assert page["pagination"] == {"hasNextPage": False, "nextCursor": None}
    pod = next(pod for pod in page["pods"] if pod["id"] == pod_id)
    assert set(pod) >= RECORDED
    assert pod["ssh"]["proxy"]["username"][:19] == f"{pod_id}-6441"
    assert set(pod["runtime"]) == {"cpu", "gpus", "memory", "ports", "uptime"}
    assert [port["private"] for port in pod["runtime"]["ports"]] == [19123]


def test_the_retired_apis_answer_410(runpod: SimulatorServer) -> None:
    """Version 1, at both of its places."""
    for path in ("/v1/pods", "/pods", "/pods/abc"):
        answer = httpx.get(runpod.base_url + path, trust_env=False)
        assert (answer.status_code, answer.json()["status"]) == (410, 410)


def test_a_pod_stops_starts_and_changes(runpod: SimulatorServer, http: httpx.Client) -> None:
    """The disk is empty after stop and start, new ports are drawn, a wrong state is a 409."""
    pod_id = _up(runpod, http, ports=["22/tcp"])
    file = runpod.folder / "pods" / pod_id / "disk" / "kept"
    file.write_text("x")
    action = f"/pods/{pod_id}/action"
    refused = http.post(action, json={"action": "start"})
    assert (refused.status_code, refused.json()["detail"]) == (
        409,
        'action "start" is not valid for pod status RUNNING',
    )
    assert http.post(action, json={"action": "dance"}).json()["errors"] == [
        "$.action: value must be one of 'start', 'stop', 'restart', 'terminate'"
    ]
    assert http.post(action, json={"action": "stop"}).json()["status"] == "EXITED"
    assert http.post(action, json={"action": "start"}).status_code == 200
    runpod.wait("pod.phase==UP", pod=pod_id)
    assert not file.exists()
    before = runpod.pod(pod_id)
    assert http.patch(f"/pods/{pod_id}", json={"name": "other"}).json()["name"] == "other"
    assert runpod.pod(pod_id)["pid"] == before["pid"]
    http.patch(f"/pods/{pod_id}", json={"env": {"A": "1"}})
    runpod.wait(f"pod.attempts>={before['attempts'] + 1}", pod=pod_id)
    runpod.wait("pod.phase==UP", pod=pod_id)
    assert runpod.pod(pod_id)["public_ports"] != before["public_ports"]
    assert http.patch(f"/pods/{pod_id}", json={"locked": True}).json()["locked"]
    assert http.delete(f"/pods/{pod_id}").json()["detail"] == "Pod is locked"
    http.patch(f"/pods/{pod_id}", json={"locked": False})


def test_a_stopped_pod_may_find_its_cards_taken(runpod: SimulatorServer, http: httpx.Client) -> None:
    """Its host is kept, its cards are not."""
    pod_id = _up(runpod, http, gpu={"id": "NVIDIA A40", "count": 10})
    http.post(f"/pods/{pod_id}/action", json={"action": "stop"})
    _up(runpod, http, gpu={"id": "NVIDIA A40", "count": 10})
    refused = http.post(f"/pods/{pod_id}/action", json={"action": "start"})
    assert (refused.status_code, "not enough free GPUs" in refused.json()["detail"]) == (400, True)


def test_an_hour_costs_the_price(tmp_path: Path) -> None:
    """Price x time and the disk, to the micro-dollar, in the report and in the billing endpoint."""
    config = {**STILL, "bill_disks": True, "timings": {"balance_check": 300}}
    with SimulatorServer(tmp_path, config=config, profile="instant") as server, _http(server) as http:
        ended, kept = (http.post("/pods", json={**BODY, "name": n}).json()["id"] for n in ("a", "b"))
        server.control("POST", "clock/advance", {"seconds": 3600})
        http.delete(f"/pods/{ended}")
        server.control("POST", "clock/advance", {"seconds": 1800.5})
        report = server.report()
        disk = 20 * 0.10 / 720
        assert report["cost_by_pod"][ended] == pytest.approx(2 * 0.49 + disk, abs=1e-6)
        hours = 5400.5 / 3600
        assert report["cost_by_pod"][kept] == pytest.approx(hours * (2 * 0.49 + disk), abs=1e-6)
        for bucket in ("hour", "day", "week", "month", "year"):
            bill = http.get("/billing/pods", params={"bucketSize": bucket, "lastN": "9"}).json()
            total = bill["metadata"]["totals"]["totalAmount"]
            assert total == pytest.approx(report["cost_total"], abs=1e-6)
            assert sum(r["totalAmount"] for r in bill["records"]) == pytest.approx(total, abs=1e-6)
        mine = http.get("/billing/pods", params={"podId": ended}).json()["records"]
        assert {record["podId"] for record in mine} == {ended}
        both = {"lastN": "1", "startTime": "2027-01-01T00:00:00Z"}
        assert http.get("/billing/pods", params=both).status_code == 400


def test_an_empty_balance_ends_the_pods(tmp_path: Path) -> None:
    """A create needs an hour's credit; when it is spent, the pods are terminated at the next look."""
    config = {**STILL, "balance": 1.5, "timings": {"balance_check": 300}}
    with SimulatorServer(tmp_path, config=config, profile="fast") as server, _http(server) as http:
        pod_id = http.post("/pods", json=BODY).json()["id"]
        server.control("POST", "clock/advance", {"seconds": 5000})
        assert http.get(f"/pods/{pod_id}").json()["status"] == "RUNNING"
        assert http.post("/pods", json={**BODY, "name": "two"}).status_code == 402
        server.control("POST", "clock/advance", {"seconds": 1000})
        assert http.get(f"/pods/{pod_id}").status_code == 404
        assert 1.5 <= server.report()["cost_by_pod"][pod_id] <= 1.5 + 2 * 0.49 * 300 / 3600


def test_the_window_of_the_limit_resets_with_the_clock(tmp_path: Path) -> None:
    """60 calls, then 429 until the minute is over."""
    with SimulatorServer(tmp_path, config={"clock": "manual"}, profile="instant") as server:
        with _http(server) as http:
            codes = [http.get("/pods").status_code for _ in range(61)]
            assert (codes[:60], codes[60]) == ([200] * 60, 429)
            server.control("POST", "clock/advance", {"seconds": 60})
            assert http.get("/pods").status_code == 200
        assert (server.report()["rate_limited"], server.report()["violations"]) == (1, [])


def _story(folder: Path) -> bytes:
    with SimulatorServer(folder, config=STILL, profile="realistic", seed=7) as server, _http(server) as http:
        server.control("POST", "faults", {"name": "preempt", "probability": 0.5, "times": None})
        for name in ("a", "b", "c"):
            http.post("/pods", json={**BODY, "name": name})
            server.control("POST", "clock/advance", {"seconds": 100})
        server.control("POST", "clock/advance", {"seconds": 900})
        http.get("/pods")
        return (folder / "journal.jsonl").read_bytes()


def test_one_seed_tells_one_story(tmp_path: Path) -> None:
    """The same requests at the same times give the same journal, byte for byte."""
    first, second = _story(tmp_path / "a"), _story(tmp_path / "b")
    assert first.count(b'"preempt"') >= 1
    assert first == second


def test_the_disk_survives_a_restart_of_the_container(runpod: SimulatorServer, http: httpx.Client) -> None:
    """As measured; attempts count up."""
    pod_id = _up(runpod, http)
    file = runpod.folder / "pods" / pod_id / "disk" / "kept"
    file.write_text("x")
    runpod.control("POST", f"pods/{pod_id}/kill", {"mode": "restart"})
    runpod.wait("pod.attempts>=2", pod=pod_id)
    runpod.wait("pod.phase==UP", pod=pod_id)
    assert file.exists()


def test_a_log_goes_on_where_the_client_was(runpod: SimulatorServer, http: httpx.Client) -> None:
    """`Last-Event-ID` gives what came after; `since` leaves out the whole of its second."""
    pod_id = _up(runpod, http, image="sim/env-dump")

    def ids(headers: dict[str, str], since: str | None = None) -> list[str]:
        found: list[str] = []
        query = {} if since is None else {"since": since}
        url = f"/pods/{pod_id}/logs"
        with (
            contextlib.suppress(httpx.ReadTimeout),
            http.stream("GET", url, headers=headers, params=query, timeout=2) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("id: "):
                    found.append(line[4:])
        return found

    every = ids({})
    assert len(every) == len(set(every)) >= 5
    assert ids({"Last-Event-ID": every[2]}) == every[3:]
    second = datetime.fromisoformat(every[-1].partition("/")[0].replace("Z", "+00:00"))
    assert ids({}, since=second.isoformat()) == []
    assert ids({}, since=(second - timedelta(minutes=5)).isoformat()) == every


def test_an_older_server_does_not_know_the_newest_fields(tmp_path: Path) -> None:
    """`spec_level: aug2026` refuses `entrypoint`; the newest runs it."""
    for level, status in {"aug2026": 422, "newest": 201}.items():
        config = {"rate_limits": {}, "spec_level": level}
        body = {**BODY, "entrypoint": ["/bin/sh", "-c"], "cmd": ["echo mine; sleep 9"]}
        folder = tmp_path / level
        with SimulatorServer(folder, config=config, profile="instant") as server, _http(server) as http:
            assert http.post("/pods", json=body).status_code == status


def test_a_pod_ends_itself_with_its_own_key(runpod: SimulatorServer, http: httpx.Client) -> None:
    """By `runpodctl` in the pod; neither another pod nor by REST."""
    other, mine = _up(runpod, http), _up(runpod, http)
    key = f"rpa_pod_{mine}"
    with _http(runpod, key) as inside:
        assert inside.delete(f"/pods/{mine}").status_code == 403
        query = f'mutation {{ podTerminate(input: {{ podId: "{other}" }}) }}'
        refused = inside.post(f"{runpod.base_url}/graphql", json={"query": query}).json()
        assert refused["errors"][0]["message"] == "Unauthorized"
    program = runpod.folder / "pods" / mine / "bin" / "runpodctl"
    environment = {"RUNPOD_API_KEY": key}
    with psutil.Popen([str(program), "remove", "pod", mine], env=environment, stdout=-1) as process:
        assert process.communicate()[0].decode() == f'pod "{mine}" removed\n'
    runpod.wait("pod.phase==gone", pod=mine)
    assert runpod.pod(other)["phase"] == "up"


def test_every_kind_of_carelessness_is_reported(tmp_path: Path) -> None:
    """And a careful client leaves the list empty."""
    config = {"rate_limits": {"minute": 1000}}
    with SimulatorServer(tmp_path, config=config, profile="instant") as server, _http(server) as http:
        pod_id = _up(server, http)
        http.get("/pods")
        http.delete(f"/pods/{pod_id}")
        assert server.report()["violations"] == []
        foreign = next(p for p in http.get("/pods").json()["pods"] if p["name"].startswith("ow-"))
        http.patch(f"/pods/{foreign['id']}", json={"name": "mine"})
        (tmp_path / "client.log").write_text(foreign["env"]["SECRET"])
        server.control("POST", "scan", {"paths": [str(tmp_path / "client.log")]})
        server.control("POST", "faults", {"name": "created_but_500"})
        for _ in range(2):
            http.post("/pods", json=BODY)
        http.put("/account/ssh-keys", json={"keys": []})
        http.delete("/registries/reg_of_a_colleague")
        http.get(f"/pods?key={server.api_key}", headers={"User-Agent": "curl/8"})
        for _ in range(2):
            http.get(f"/pods/{foreign['id']}")
        spot = 'mutation { podRentInterruptable(input: { bidPerGpu: 0.2, name: "s" }) { id } }'
        dead = (
            'mutation { podFindAndDeployOnDemand(input: { name: "t", imageName: "sim/sleep", '
            'gpuTypeId: "NVIDIA A40", stopAfter: "2027-01-01" }) { id } }'
        )
        for query in (spot, dead):
            http.post(f"{server.base_url}/graphql", json={"query": query})
        server.control("POST", "faults", {"name": "rate_limited", "params": {"retry_after": 30}})
        http.get("/pods")
        time.sleep(0.6)
        http.get("/pods")
        kinds = {violation["kind"] for violation in server.report()["violations"]}
    assert kinds == {
        *("foreign_mutation", "foreign_env_logged", "same_name_create", "create_retry_after_ambiguous"),
        *("ssh_keys_replaced", "registry_deleted_foreign", "key_in_url", "default_user_agent", "get_storm"),
        *("ignored_retry_after", "spot_field_used", "ttl_field_used"),
    }


def test_hosts_and_capacity_can_be_changed(runpod: SimulatorServer, http: httpx.Client) -> None:
    """No free card of a kind; a host that is off; a new one with a newer driver."""
    places = {"gpu": "NVIDIA A40", "cloud": "SECURE"}
    runpod.control("PUT", "capacity", {**places, "free": 1})
    assert http.post("/pods", json=BODY).status_code == 400
    runpod.control("PUT", "capacity", {**places, "free": None})
    host = next(h for h in runpod.control("GET", "state")["hosts"] if h["gpu_id"] == "NVIDIA A40")
    runpod.control("PATCH", f"hosts/{host['id']}", {"offline": True})
    assert runpod.pod(_up(runpod, http))["host"] != host["id"]
    runpod.control("PATCH", f"hosts/{host['id']}", {"offline": False})
    new = {
        "gpu_id": "NVIDIA A40",
        "cloud": "SECURE",
        "data_center": "EU-FR-1",
        "gpu_total": 8,
        "cuda": "13.4",
    }
    added = runpod.control("POST", "hosts", new)["id"]
    gpu = {**BODY["gpu"], "minCudaVersion": "13.2"}
    assert runpod.pod(_up(runpod, http, gpu=gpu))["host"] == added


def test_chaos_strikes_its_share(tmp_path: Path) -> None:
    """Half of the pods, and every third create or so, by one seed always the same."""
    config = {"rate_limits": {}, "chaos": {"host_lost": 0.5, "capacity": 0.3}, "clock": "manual"}
    with SimulatorServer(tmp_path, config=config, profile="instant", seed=3) as server, _http(server) as http:
        small = {**BODY, "gpu": {"id": "NVIDIA A40", "count": 1}}
        codes = [http.post("/pods", json={**small, "name": f"p{n}"}).status_code for n in range(20)]
        server.control("POST", "clock/advance", {"seconds": 4})
        before = len(server.report()["alive"])
        server.control("POST", "clock/advance", {"seconds": 60})
        after = len(server.report()["alive"])
        server.control("POST", "chaos", {})
        assert server.control("GET", "state")["faults"] == []
    assert 1 <= codes.count(400) <= 12
    assert before == codes.count(201)
    assert 0.2 * before <= after <= 0.8 * before


def test_fifty_pods_start_in_five_seconds(tmp_path: Path) -> None:
    """Real processes each; the limit allows for a busy machine."""
    config = {"rate_limits": {}, "spend_limit_per_hour": 1000}
    types = ("NVIDIA A40", "NVIDIA L40S", "NVIDIA RTX A6000", "NVIDIA RTX A5000")
    with SimulatorServer(tmp_path, config=config, profile="fast") as server, _http(server) as http:
        started = time.monotonic()
        for number in range(50):
            gpu = {"id": types[number % 4], "count": 1}
            assert http.post("/pods", json={**BODY, "name": f"p{number}", "gpu": gpu}).status_code == 201
        server.wait("pods.up>=50", timeout_seconds=60)
        seconds = time.monotonic() - started
        cpu = psutil.Process(server.pid).cpu_times()
    print(f"50 pods up after {seconds:.2f} s, {cpu.user + cpu.system:.2f} s of CPU")
    assert cpu.user + cpu.system < 5


def test_the_page_names_every_fault_violation_and_choice() -> None:
    """With the words of the code."""
    page = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text(encoding="utf-8")
    missing = [
        name for name, fault in FAULTS.items() if f"| `{name}` | {fault.stage} | {fault.effect} |" not in page
    ]
    missing += [name for name, what in VIOLATIONS.items() if f"| `{name}` | {what} |" not in page]
    assert missing == []
