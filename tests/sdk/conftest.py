from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.files.store import LocalFileStore
from openweights_prefect.ledger.connect import connect
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.resources.job import Job
from openweights_prefect.resources.session import Session
from openweights_prefect.settings import Settings
from openweights_prefect.types.canonical import encode_event
from tests.callers import Callers, bootstrap_hash


class RecordingLedger:
    """Passes calls on and counts them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.calls: list[str] = []

    @property
    def organization_id(self) -> str:
        return self._ledger.organization_id

    def call(self, function: str, **arguments: Any) -> list[Row]:
        self.calls.append(function)
        return self._ledger.call(function, **arguments)

    def close(self) -> None:
        self._ledger.close()

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.calls)


class Pod:
    """The pod's side: what an agent tells the ledger."""

    def __init__(self, ledger: Callers) -> None:
        self.ledger = ledger
        self.boot = ""
        self.run_id = ""
        self._events = 0
        self._log_bytes = 0

    def open(self, job: Job) -> str:
        """A new pod opens a new run of the job; returns its id."""
        self.boot, self.run_id = str(uuid.uuid4()), str(uuid.uuid4())
        self._events = self._log_bytes = 0
        worker = f"w-{self.run_id[:8]}"
        fitting = {
            "id": worker,
            "docker_image": job.docker_image,
            "hardware": "1x H200",
            "gpu_type": "H200",
            "gpu_count": 1,
            "vram_gb": 500,
            "cloud": "SECURE",
            "price_per_hour": 1,
        }
        attempt = self.ledger.call("get_job", job_id=job.id)[0]["attempt"]
        self.ledger.call("record_flow_run", for_job=job.id, for_attempt=attempt, flow_run=self.run_id)
        self.ledger.call(
            "intend_pod", pod=fitting, bootstrap_hash=bootstrap_hash(worker), ttl_seconds=3600, max_pods=50
        )
        self.ledger.call("register_pod", for_worker=worker, as_boot=self.boot, lease_seconds=600, models=[])
        [answer] = self.ledger.call("open_run", for_run=self.run_id, for_worker=worker, as_boot=self.boot)
        assert answer["outcome"] == "opened", answer
        return self.run_id

    def log(self, *events: dict[str, Any], file: str | None = None) -> None:
        batch = [{"at": time.time(), "data": encode_event(data), "file": file} for data in events]
        [answer] = self.ledger.call(
            "append_events",
            for_run=self.run_id,
            as_boot=self.boot,
            first_sequence=self._events,
            batch=json.loads(json.dumps(batch)),
        )
        assert answer["outcome"] == "stored"
        self._events += len(events)

    def print(self, text: str) -> None:
        end = self._log_bytes + len(text.encode())
        [answer] = self.ledger.call(
            "append_log",
            for_run=self.run_id,
            as_boot=self.boot,
            from_offset=self._log_bytes,
            to_offset=end,
            piece=text,
        )
        assert answer["outcome"] == "stored"
        self._log_bytes = end

    def finish(self, result: str = "completed", why: str | None = None, log_file: str | None = None) -> None:
        [answer] = self.ledger.call(
            "finish_run",
            for_run=self.run_id,
            as_boot=self.boot,
            result=result,
            why=why,
            log_file_id=log_file,
        )
        assert answer["outcome"] == "finished"


@pytest.fixture
def settings(tmp_path: Path, ledger_url: str) -> Settings:
    return Settings(
        home=tmp_path / "home", database_url=ledger_url, prefect_api_url="http://127.0.0.1:4200/api"
    )


@pytest.fixture
def ow(settings: Settings) -> Iterator[OpenWeights]:
    with OpenWeights(settings=settings) as client:
        yield client


@pytest.fixture
def ledger(settings: Settings) -> Iterator[RecordingLedger]:
    recording = RecordingLedger(connect(settings))
    yield recording
    recording.close()


@pytest.fixture
def session(settings: Settings, ledger: RecordingLedger) -> Session:
    return Session(ledger, LocalFileStore(settings.files_folder), settings.organization_id, settings)


@pytest.fixture
def pod(settings: Settings) -> Iterator[Pod]:
    ledger = Callers(settings.database_url, settings.organization_id)
    yield Pod(ledger)
    ledger.close()


@pytest.fixture
def conversations(tmp_path: Path) -> Callable[..., Path]:
    """Writes a valid training file."""

    def write(name: str = "train.jsonl", text: str = "hi") -> Path:
        path = tmp_path / name
        rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yo"}]}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
