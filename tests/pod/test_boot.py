"""The first program of a pod: what it does before there is an agent, and after."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from runpod_api import RunPodApi

from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.pod.environment import prepare_environment
from openweights_prefect.pod.nursery import Nursery
from openweights_prefect.pod.session import proxy_token, session_secret
from openweights_prefect.settings import Settings

Boot = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def boot(tmp_path: Path, runpod: RunPodApi) -> Iterator[Boot]:
    """Start a pod in a folder of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(**variables: str) -> subprocess.Popen[str]:
        environment = {
            **runpod.environment(),
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "OW_HOME": str(tmp_path / "home"),
            "OW_POD_ID": "pod-0123456789ab",
            **variables,
        }
        argv = [sys.executable, "-P", "-m", "openweights_prefect.pod"]
        started.append(
            subprocess.Popen(
                argv,
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        family = [psutil.Process(process.pid)] if process.poll() is None else []
        for each in [child for parent in family for child in parent.children(recursive=True)] + family:
            each.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def eventually(look: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_past_its_deadline_a_pod_does_nothing(boot: Boot, runpod: RunPodApi) -> None:
    """A container that is started again asks for its end, and sleeps; it does not look at its settings."""
    process = boot(OW_DEADLINE_AT=str(time.time() - 1), OW_LEASE_SECONDS="bad")
    assert line_of(process) == "OpenWeights pod pod-0123456789ab starts.\n"
    assert "deadline has passed" in line_of(process)
    eventually(lambda: runpod.calls, 20)
    assert process.poll() is None
    assert psutil.Process(process.pid).children() == []


def test_a_pod_that_may_not_go_on_asks_for_its_end(
    boot: Boot, runpod: RunPodApi, ledger_url: str, tmp_path: Path
) -> None:
    """Its token is not accepted: it ends nothing of its own, asks RunPod, and never exits by itself."""
    process = boot(
        OW_DATABASE_URL=ledger_url,
        OW_POD_TOKEN=f"owb_{'x' * 43}",
        OW_DEADLINE_AT=str(time.time() + 600),
        PREFECT_API_URL="http://127.0.0.1:9/api",
    )
    assert line_of(process).startswith("OpenWeights pod")
    eventually(lambda: runpod.calls, 60)
    assert process.poll() is None
    [guard] = psutil.Process(process.pid).children()
    assert os.getsid(guard.pid) == guard.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    guard.kill()


def test_the_first_line_comes_at_once(boot: Boot) -> None:
    """Before anything that takes long: a pod without a first line is taken for a broken machine."""
    started = time.monotonic()
    line_of(boot(OW_DEADLINE_AT=str(time.time() - 1)))
    assert time.monotonic() - started < 5


def test_a_pod_that_cannot_work_asks_for_its_end(boot: Boot, runpod: RunPodApi) -> None:
    """With a setting that is wrong it would be started again and again, and bill."""
    process = boot(OW_DEADLINE_AT=str(time.time() + 600), OW_LEASE_SECONDS="bad")
    line_of(process)
    assert "It cannot work: OW_LEASE_SECONDS='bad'" in line_of(process)
    eventually(lambda: runpod.calls, 20)
    assert process.poll() is None


def test_with_a_proxy_the_pod_knows_that_alone(tmp_path: Path) -> None:
    """Its address and a token made of the session; whatever the environment said before."""
    session = session_secret(tmp_path / ".session")
    settings = Settings(prefect_api_url="http://server/api", prefect_proxy_url="https://proxy/api")
    environment = {"PREFECT_API_URL": "http://server/api", "PREFECT_API_KEY": "somebody's"}
    prepare_environment(settings, environment, session)
    token = proxy_token(session)
    assert environment["PREFECT_API_URL"] == "https://proxy/api"
    assert environment["PREFECT_API_AUTH_STRING"] == token
    assert "PREFECT_API_KEY" not in environment
    assert token.startswith("owx_")
    assert session not in token
    assert len(hash_secret(token)) == 64
    assert token == proxy_token(session_secret(tmp_path / ".session"))


def test_without_a_proxy_there_is_no_key(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    prepare_environment(Settings(prefect_api_url="http://server/api"), environment, "owp_x")
    assert environment["PREFECT_API_URL"] == "http://server/api"
    assert "PREFECT_API_AUTH_STRING" not in environment


def test_every_run_begins_with_the_environment_of_the_start(tmp_path: Path) -> None:
    """Whatever becomes of the agent's own: also after the process that runs are forked from was replaced."""
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "MARK": "of the start"}
    nursery = Nursery(environment)
    environment["MARK"] = "of later"

    async def marks() -> list[str]:
        seen = []
        for _ in range(2):
            await nursery.start()
            assert nursery._process is not None
            seen.append(psutil.Process(nursery._process.pid).environ()["MARK"])
            await nursery.stop()
            await asyncio.sleep(0.1)
        return seen

    assert asyncio.run(marks()) == ["of the start"] * 2
