"""`ow pod ttl`: from outside through a real ledger, from inside through the socket of an agent."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from openweights_prefect.cli.main import main
from openweights_prefect.errors import BudgetExceeded
from openweights_prefect.pod.agent import Agent
from openweights_prefect.pod.service import local_socket, pod_calls
from tests.callers import Callers, bootstrap_hash


@pytest.fixture(autouse=True)
def home(tmp_path: Path, ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("OW_", "OPENWEIGHTS_", "SUPABASE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OW_DATABASE_URL", ledger_url)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def ttl(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["pod", "ttl", *arguments])


def answer(*arguments: str) -> Any:
    result = ttl(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*arguments: str) -> str:
    result = ttl(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def pod(ledger: Callers) -> str:
    """A pod that is at work."""
    row = {
        "id": "pod-a",
        "docker_image": "i",
        "hardware": "1x L40",
        "gpu_type": "NVIDIA L40",
        "gpu_count": 1,
        "vram_gb": 45,
        "cloud": "SECURE",
        "price_per_hour": 1.0,
        "bought_for": None,
    }
    intent = ledger.call(
        "intend_pod", pod=row, bootstrap_hash=bootstrap_hash("pod-a"), ttl_seconds=7200, max_pods=4
    )
    assert intent[0]["outcome"] == "intended"
    ledger.call("record_pod", for_worker="pod-a", provider_id="rp-a", price=1.0)
    ledger.call("register_pod", for_worker="pod-a", as_boot=uuid4(), lease_seconds=600, models=[])
    return "pod-a"


def test_from_outside(pod: str) -> None:
    """It is shown, extended from where it is, and set from now; people get a sentence."""
    assert answer(pod)["deadline_seconds"] == pytest.approx(7200, abs=60)
    assert answer(pod, "--extend", "3")["deadline_seconds"] == pytest.approx(18000, abs=60)
    assert answer(pod, "--check")["deadline_seconds"] == pytest.approx(18000, abs=60)
    assert answer(pod, "--set", "0.5") == {"pod": pod, "deadline_seconds": 1800}
    shown = ttl(pod, "--check").stdout
    assert shown.startswith("pod-a: ends in 29m")
    assert shown.endswith("UTC\n")


def test_errors_name_the_mend(pod: str) -> None:
    """An unknown pod, no pod, options that exclude each other, hours that are none."""
    assert "see `ow pod ls`" in refusal("pod-b", "--extend", "1")
    assert "Name the pod" in refusal("--extend", "1")
    assert "one of" in refusal(pod, "--extend", "1", "--set", "1")
    assert "721" in refusal(pod, "--set", "721")


class PlayedAgent:
    """What `ow pod ttl` asks of an agent."""

    def __init__(self) -> None:
        self.left = 3600.0

    async def time_to_live(self, hours: float | None = None, *, added: bool = False) -> dict[str, Any]:
        if hours is not None and hours > 100:
            raise BudgetExceeded("Too much. Ask for less.")
        if hours is not None:
            self.left = 3600 * hours + (self.left if added else 0)
        return {"pod": "pod-a", "deadline_seconds": self.left}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a pod whose agent answers."""
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    folder = tmp_path / ("a-long-name-" * 10)  # a socket's own path may have 107 bytes
    folder.mkdir()

    async def answer_until_done() -> None:
        async with local_socket(folder, pod_calls(cast(Agent, PlayedAgent()))):
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(answer_until_done()))
    thread.start()
    assert ready.wait(10)
    yield folder
    loop.call_soon_threadsafe(done.set)
    thread.join(10)
    loop.close()
    assert list(folder.iterdir()) == []


def test_in_a_shell_of_the_pod(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is needed: the pod's folder has a link to its agent."""
    monkeypatch.chdir(folder)
    assert answer() == {"pod": "pod-a", "deadline_seconds": 3600}
    assert answer("--extend", "1") == {"pod": "pod-a", "deadline_seconds": 7200}
    assert answer("--set", "0") == {"pod": "pod-a", "deadline_seconds": 0}
    assert "Ask for less" in refusal("--set", "200")


def test_in_a_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job has its agent's socket in its environment."""
    monkeypatch.setenv("OW_AGENT_SOCKET", str((folder / "agent.sock").resolve()))
    assert answer("--set", "2") == {"pod": "pod-a", "deadline_seconds": 7200}


def test_an_agent_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so, in one line."""
    monkeypatch.setenv("OW_AGENT_SOCKET", str(tmp_path / "gone"))
    assert "did not answer" in refusal("--check")
