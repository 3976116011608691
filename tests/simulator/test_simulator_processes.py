"""Pods as processes: what runs, what it knows, and that nothing of it is left."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from openweights_prefect.errors import StackError
from openweights_prefect.simulator.server import SimulatorServer

GPU = {"id": "NVIDIA A40", "count": 1}


@pytest.fixture(scope="module")
def runpod() -> Iterator[SimulatorServer]:
    images = {
        "our/*": {"entrypoint": ["/bin/sh", "-c"], "cmd": ["echo default; sleep 600"], "env": {"BASE": "1"}}
    }
    with SimulatorServer(config={"rate_limits": {}, "images": images}, profile="instant") as server:
        yield server


def _call(runpod: SimulatorServer, method: str, path: str, body: object = None) -> httpx.Response:
    headers = {"User-Agent": "a-test/1", "Authorization": f"Bearer {runpod.api_key}"}
    return httpx.request(method, runpod.rest + path, json=body, headers=headers, trust_env=False)


def _create(runpod: SimulatorServer, image: str, **changes: Any) -> str:
    name = f"{image}-{time.monotonic_ns()}"
    response = _call(
        runpod, "POST", "/pods", {"name": name, "image": image, "gpu": GPU, "disk": 5, **changes}
    )
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def _until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
    return value


def _up(runpod: SimulatorServer, pod_id: str) -> int:
    return int(_until(lambda: (runpod.pod(pod_id) or {}).get("pid")))


def _up_again(runpod: SimulatorServer, pod_id: str, dead: list[int]) -> None:
    _until(lambda: _up(runpod, pod_id) not in dead)


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _family(runpod: SimulatorServer, pod_id: str) -> list[int]:
    file = runpod.folder / "pods" / pod_id / "disk" / "pids.json"
    _until(file.exists)
    pids: list[int] = json.loads(file.read_text())
    assert len(pids) == 4
    assert all(map(_alive, pids))
    return pids


def test_the_environment_is_built_from_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Base, RunPod's variables, the request's; nothing of the parent. The marks cannot be overridden."""
    monkeypatch.setenv("PARENT_SECRET", "leak")
    with SimulatorServer(tmp_path, config={"rate_limits": {}}, profile="instant") as server:
        pod_id = _create(
            server, "sim/env-dump", env={"MINE": "1", "CUDA_VERSION": "9", "RUNPOD_POD_ID": "forged"}
        )
        env = json.loads(_until(lambda: server.log(pod_id)))
    assert "leak" not in env.values()
    assert set(env) - {name for name in env if name.startswith("RUNPOD_")} == {
        *("PATH", "LANG", "HOME", "TMPDIR", "CUDA_VERSION", "MINE")
    }
    assert (env["CUDA_VERSION"], env["RUNPOD_POD_ID"], env["RUNPOD_GPU_COUNT"]) == ("9", pod_id, "1")
    assert env["RUNPOD_API_KEY"] == f"rpa_pod_{pod_id}"
    assert Path(env["TMPDIR"]).is_relative_to(tmp_path)


def test_an_image_runs_its_command_or_the_arguments(runpod: SimulatorServer) -> None:
    """`args` replaces CMD as shell words, or CMD and entrypoint as JSON."""
    both = json.dumps({"entrypoint": ["/bin/sh", "-c", "echo json $BASE; sleep 600"]})
    for args, printed in {"": "default\n", "'echo words; sleep 600'": "words\n", both: "json 1\n"}.items():
        pod_id = _create(runpod, "our/image:1", args=args)
        _until(functools.partial(runpod.log, pod_id))
        assert runpod.log(pod_id) == printed
        _call(runpod, "DELETE", f"/pods/{pod_id}")


@pytest.mark.parametrize("code", [0, 3])
def test_a_container_that_exits_is_started_again(runpod: SimulatorServer, code: int) -> None:
    """Whatever its exit code, with the pod RUNNING and billing all the time."""
    pod_id = _create(runpod, f"sim/exit:{code}")
    _until(lambda: runpod.log(pod_id).count(f"exiting with exit:{code}") >= 3)
    assert runpod.pod(pod_id)["attempts"] >= 3
    assert _call(runpod, "GET", f"/pods/{pod_id}").json()["status"] == "RUNNING"
    _call(runpod, "DELETE", f"/pods/{pod_id}")


def test_a_command_that_cannot_be_executed_is_tried_again(runpod: SimulatorServer) -> None:
    """It never comes up, and the pod keeps billing."""
    pod_id = _create(runpod, "our/image:1", args=json.dumps({"entrypoint": ["/no/such/program"]}))
    _until(lambda: runpod.pod(pod_id)["attempts"] >= 2)
    _call(runpod, "DELETE", f"/pods/{pod_id}")


def test_delete_kills_children_sessions_and_orphans(runpod: SimulatorServer) -> None:
    """Also those that left the process group, ignore SIGTERM, or lost their parent."""
    pod_id = _create(runpod, "sim/fork")
    pids = _family(runpod, pod_id)
    _call(runpod, "DELETE", f"/pods/{pod_id}")
    _until(lambda: not any(map(_alive, pids)))


def test_delete_kills_what_ignores_sigterm_after_the_grace(runpod: SimulatorServer) -> None:
    """SIGTERM first, SIGKILL after `stop_grace`; the answer comes at once."""
    pod_id = _create(runpod, "sim/ignore-term")
    pid = _up(runpod, pod_id)
    _until(lambda: "ignoring" in runpod.log(pod_id))
    started = time.monotonic()
    assert _call(runpod, "DELETE", f"/pods/{pod_id}").status_code == 204
    assert time.monotonic() - started < 0.9
    _until(lambda: not _alive(pid))
    assert time.monotonic() - started > 0.9


def test_delete_kills_children_that_cleared_their_environment(runpod: SimulatorServer) -> None:
    """They carry no mark, but their parents are known."""
    script = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['/bin/sleep', '600'], env={}, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    pod_id = _create(runpod, "our/image:1", args=json.dumps({"entrypoint": [sys.executable, "-c", script]}))
    child = int(_until(lambda: runpod.log(pod_id).strip()))
    _call(runpod, "DELETE", f"/pods/{pod_id}")
    _until(lambda: not _alive(child))


def test_the_exit_of_the_container_ends_what_it_left(runpod: SimulatorServer) -> None:
    """When the first process dies, the rest dies before the container starts again."""
    pod_id = _create(runpod, "sim/fork")
    pids = _family(runpod, pod_id)
    os.kill(pids[0], 9)
    _until(lambda: not any(map(_alive, pids)))
    _up_again(runpod, pod_id, pids)
    _call(runpod, "DELETE", f"/pods/{pod_id}")


@pytest.mark.parametrize("mode", ["restart", "exited", "host_lost"])
def test_a_pod_can_be_broken_on_request(runpod: SimulatorServer, mode: str) -> None:
    """`restart` comes up again, `exited` stays as EXITED, `host_lost` is 404 and unlisted at once."""
    pod_id = _create(runpod, "sim/fork")
    pids = _family(runpod, pod_id)
    runpod.control("POST", f"pods/{pod_id}/kill", {"mode": mode})
    _until(lambda: not any(map(_alive, pids)))
    response = _call(runpod, "GET", f"/pods/{pod_id}")
    found = response.json()["status"] if response.status_code == 200 else response.status_code
    assert found == {"restart": "RUNNING", "exited": "EXITED", "host_lost": 404}[mode]
    if mode == "restart":
        _up_again(runpod, pod_id, pids)
    _call(runpod, "DELETE", f"/pods/{pod_id}")


def test_a_host_is_lost_by_a_rule(runpod: SimulatorServer) -> None:
    """The fault strikes a while after the container is up."""
    runpod.control(
        "POST", "faults", {"name": "host_lost", "match": {"name": "sleep"}, "params": {"after_s": 0.1}}
    )
    pod_id = _create(runpod, "sim/sleep")
    _until(lambda: _call(runpod, "GET", f"/pods/{pod_id}").status_code == 404)
    assert pod_id in runpod.report()["cost_by_pod"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_sigkill_of_the_simulator_leaves_no_process_and_forgets_no_pod(tmp_path: Path) -> None:
    """All processes die with it; started again on the same folder, it has the pods and their cost."""
    server = SimulatorServer(tmp_path, config={"rate_limits": {}}, profile="instant")
    with server:
        pod_id, ended = _create(server, "sim/fork"), _create(server, "sim/sleep")
        pids = _family(server, pod_id)
        _call(server, "DELETE", f"/pods/{ended}")
        _until(lambda: server.pod(ended) is None)
        before = server.report()
        server.kill()
        _until(lambda: not any(map(_alive, pids)))
        server.start()
        _up_again(server, pod_id, pids)
        report, pod = server.report(), server.pod(pod_id)
    assert report["alive"] == [pod_id]
    assert len(report["alive_by_owner"]["foreign"]) == 3
    assert pod["attempts"] == 2
    assert report["cost_by_pod"][ended] == before["cost_by_pod"][ended]
    assert report["cost_total"] >= before["cost_total"]


def test_sigterm_of_the_simulator_stops_the_pods_and_keeps_them_rented(tmp_path: Path) -> None:
    """A clean stop leaves no process; the pods run again after the next start."""
    server = SimulatorServer(tmp_path, config={"rate_limits": {}}, profile="instant")
    with server:
        pod_id = _create(server, "sim/fork")
        pids = _family(server, pod_id)
        server.stop()
        assert not any(map(_alive, pids))
        server.start()
        _up(server, pod_id)


def test_two_simulators_do_not_disturb_each_other(runpod: SimulatorServer, tmp_path: Path) -> None:
    """With the same seed and so the same pod ids, each kills only its own processes."""
    with (
        SimulatorServer(tmp_path / "a", profile="instant") as one,
        SimulatorServer(tmp_path / "b", profile="instant") as two,
    ):
        first, second = _create(one, "sim/sleep"), _create(two, "sim/sleep")
        assert first == second
        mine, other = _up(one, first), _up(two, second)
        _call(one, "DELETE", f"/pods/{first}")
        _until(lambda: not _alive(mine))
        assert _alive(other)


def test_a_log_that_grows_is_moved_away(tmp_path: Path) -> None:
    """The container keeps writing; the file starts again from nothing."""
    images = {
        "chatty": {
            "entrypoint": [
                "/bin/sh",
                "-c",
                "head -c 2000000 /dev/zero | tr '\\0' x; echo; echo end; sleep 600",
            ]
        }
    }
    config = {"rate_limits": {}, "images": images, "log_limit_mb": 1}
    with SimulatorServer(tmp_path, config=config, profile="instant") as server:
        folder = tmp_path / "pods" / _create(server, "chatty")
        _until((folder / "container.log.1").exists)
        _until(lambda: (folder / "container.log").stat().st_size < 1_000_000)


def test_a_folder_serves_one_simulator_at_a_time(tmp_path: Path) -> None:
    """A second one says so and touches nothing."""
    with SimulatorServer(tmp_path, profile="instant") as server:
        pid = _up(server, _create(server, "sim/sleep"))
        with pytest.raises(StackError, match="lock"):
            SimulatorServer(tmp_path, profile="instant").start()
        assert _alive(pid)
