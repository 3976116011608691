"""A pod asks RunPod to end it, and nothing that RunPod answers disturbs it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from runpod_api import RunPodApi

from openweights_prefect.pod.termination import ask_for_termination


def test_it_asks_for_itself(runpod: RunPodApi) -> None:
    """With the pod's own key in the header, and a name of ours as the program."""
    assert ask_for_termination(runpod.environment("abc"))
    [call] = runpod.calls
    assert call.path == "/graphql"
    assert call.key == "Bearer rpa_of_this_pod"
    assert call.agent.startswith("openweights-prefect/")
    assert call.body == {"query": 'mutation { podTerminate(input: { podId: "abc" }) }'}


@pytest.mark.parametrize(
    ("status", "document", "agreed"),
    [
        (200, {"errors": [{"message": "gone", "extensions": {"code": "POD_NOT_FOUND"}}], "data": None}, True),
        (200, {"errors": [{"message": "rpa_of_this_pod is bad"}], "data": None}, False),
        (403, {}, False),
        (500, {}, False),
        (200, "not an object", False),
    ],
)
def test_every_answer_is_survived(
    runpod: RunPodApi, caplog: pytest.LogCaptureFixture, status: int, document: object, agreed: bool
) -> None:
    """A pod that is gone is ended; a refusal is logged, and the key never."""
    runpod.status, runpod.document = status, document  # type: ignore[assignment]
    assert ask_for_termination(runpod.environment()) is agreed
    assert bool(caplog.records) is not agreed
    assert "rpa_of_this_pod" not in caplog.text


def test_a_silent_runpod_is_not_waited_for(runpod: RunPodApi) -> None:
    """The question takes a bounded time."""
    runpod.seconds = 5
    started = time.monotonic()
    assert not ask_for_termination(runpod.environment(), seconds=0.3)
    assert time.monotonic() - started < 2


def test_outside_of_runpod_nothing_is_asked(runpod: RunPodApi) -> None:
    assert not ask_for_termination({"RUNPOD_API_BASE_URL": runpod.url})
    assert runpod.calls == []


def test_the_settings_name_the_address(runpod: RunPodApi, tmp_path: Path) -> None:
    """Pods of a local stack end up at its simulated RunPod, even if nobody told them where that is."""
    environment = {**runpod.environment(), "OW_HOME": str(tmp_path), "OW_RUNPOD_API_URL": f"{runpod.url}/v2"}
    del environment["RUNPOD_API_BASE_URL"]
    assert ask_for_termination(environment)
    assert runpod.calls


def test_runpods_own_library_is_used_where_it_is(
    runpod: RunPodApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key that the pod was given."""
    (tmp_path / "runpod.py").write_text(
        "import pathlib\napi_key = None\n"
        "asked = pathlib.Path(__file__).with_name('asked')\n"
        "def terminate_pod(pod_id): asked.write_text(f'{pod_id} {api_key}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "runpod", raising=False)
    assert ask_for_termination(runpod.environment("abc"))
    monkeypatch.delitem(sys.modules, "runpod")
    assert (tmp_path / "asked").read_text() == "abc rpa_of_this_pod"
    assert runpod.calls == []
