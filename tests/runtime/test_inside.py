"""The client inside a job: what it asks of the agent and what it writes into the spool."""

from __future__ import annotations

import json
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.runtime import wire
from openweights_prefect.runtime.inside import CurrentRun, RunFiles


class Agent(socketserver.ThreadingUnixStreamServer):
    """Stands for the pod's agent: stores every upload under its purpose, and fetches one file."""

    calls: list[dict[str, Any]]
    fetched: Path


class Answer(socketserver.StreamRequestHandler):
    """One line in, one line out."""

    def handle(self) -> None:
        call = json.loads(self.rfile.readline())
        assert isinstance(self.server, Agent)
        self.server.calls.append(call)
        if call["call"] == "fetch":
            answer: dict[str, Any] = {"path": str(self.server.fetched)}
        else:
            answer = {"file": {"id": f"{call['purpose']}:file-0123456789ab"}}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Agent]:
    folder = Path(tempfile.mkdtemp(prefix="ow-inside-"))  # a socket's path must be short
    with Agent(str(folder / "agent"), Answer) as server:
        server.calls = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(wire.RUN_VARIABLE, "run")
        monkeypatch.setenv(wire.JOB_VARIABLE, "job")
        monkeypatch.setenv(wire.SPOOL_VARIABLE, str(tmp_path / "events.jsonl"))
        monkeypatch.setenv(wire.SOCKET_VARIABLE, str(folder / "agent"))
        yield server
        server.shutdown()
    shutil.rmtree(folder)


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def test_a_file_is_uploaded_for_its_purpose_and_named_by_the_event(agent: Agent, tmp_path: Path) -> None:
    """Both in the event's own column and in its data, where `outputs` are read."""
    path = tmp_path / "samples.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    CurrentRun().log({"step": 3}, file=path, purpose="samples")
    [event] = logged(tmp_path)
    assert event["file"] == "samples:file-0123456789ab"
    assert event["data"] == {"step": 3, "file": "samples:file-0123456789ab"}
    assert agent.calls == [
        {"call": "upload", "path": str(path), "purpose": "samples", "name": "samples.jsonl"}
    ]


def test_a_file_without_a_purpose_is_an_events_file(agent: Agent, tmp_path: Path) -> None:
    with (tmp_path / "notes.txt").open("w+b") as file:
        file.write(b"hello")
        file.seek(0)
        CurrentRun().log({"a": 1}, file=file)
    assert agent.calls[0]["purpose"] == "event"
    assert logged(tmp_path)[0]["data"]["file"] == "event:file-0123456789ab"


def test_an_event_without_a_file_asks_nobody(agent: Agent, tmp_path: Path) -> None:
    CurrentRun().log({"loss": 0.5})
    assert [(event["data"], event["file"]) for event in logged(tmp_path)] == [({"loss": 0.5}, None)]
    assert agent.calls == []


def test_a_stored_file_is_listed_later(agent: Agent, tmp_path: Path) -> None:
    """Of several files that go together, none is listed before all of them are stored."""
    path = tmp_path / "optimizer.pt"
    path.write_bytes(b"state")
    stored = RunFiles().upload(path, name="checkpoints/checkpoint-3/optimizer.pt")
    assert agent.calls[0]["name"] == "checkpoints/checkpoint-3/optimizer.pt"
    assert not (tmp_path / "events.jsonl").exists()
    CurrentRun().list_file("checkpoints/checkpoint-3/optimizer.pt", stored["id"])
    [event] = logged(tmp_path)
    assert event["file"] == stored["id"]
    assert event["data"] == {"path": "checkpoints/checkpoint-3/optimizer.pt", "file": stored["id"]}


def test_a_file_is_downloaded_to_a_path(agent: Agent, tmp_path: Path) -> None:
    """It is not read into memory, and no second copy of it stays on the disk."""
    agent.fetched = tmp_path / "fetched" / "model"
    agent.fetched.parent.mkdir()
    agent.fetched.write_bytes(b"weights")
    target = tmp_path / "tmp" / "checkpoint-3" / "model.safetensors"
    assert RunFiles().download("result:file-0123456789ab", target) == target
    assert target.read_bytes() == b"weights"
    assert not agent.fetched.exists()
    assert agent.calls == [{"call": "fetch", "id": "result:file-0123456789ab"}]
