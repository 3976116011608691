"""Results of flows on a pod go through the agent's socket into the file store."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from prefect import Flow, flow, task
from prefect.results import get_result_store
from prefect.states import Completed
from prefect.testing.utilities import prefect_test_harness

from openweights_prefect.errors import InvalidRequestError
from openweights_prefect.files.store import LocalFileStore
from openweights_prefect.orchestration.caching import JobIdCachePolicy
from openweights_prefect.orchestration.results import (
    MAX_RESULT_BYTES,
    AgentResultStorage,
    keep_results_in_store,
)
from openweights_prefect.pod.answers import Answers
from openweights_prefect.pod.library import Library
from openweights_prefect.pod.server import serve
from openweights_prefect.runtime import wire
from openweights_prefect.runtime.entrypoint import RunFolder

ORGANIZATION = "00000000-0000-0000-0000-000000000001"


class Pod:
    """The part of an agent that answers a flow, on a socket of its own."""

    def __init__(self, store: LocalFileStore, folder: Path) -> None:
        self.socket = folder / "flow.sock"
        self._library = Library(ledger=cast(Any, None), store=store, organization_id=ORGANIZATION)
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result(10)

    async def _serve(self) -> asyncio.Server:
        nothing = cast(Any, None)
        answers = Answers(
            job={},
            folder=RunFolder(self._folder),
            library=self._library,
            ledger=nothing,
            shipper=nothing,
            ending=nothing,
            finish=nothing,
        )
        return await serve(self.socket, answers.for_flow())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def store(tmp_path: Path) -> LocalFileStore:
    return LocalFileStore(tmp_path / "store")


@pytest.fixture
def pods(
    store: LocalFileStore, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Pod]]:
    """Two pods with one store; this process is a flow on the first one."""
    made = [Pod(store, tmp_path_factory.mktemp("pod")) for _ in range(2)]
    monkeypatch.setenv(wire.SOCKET_VARIABLE, str(made[0].socket))
    yield made
    for pod in made:
        pod.close()


@pytest.fixture(scope="module")
def prefect_api() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


def kept(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "store" / "organizations" / ORGANIZATION / "flow-results"
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def test_a_block_reads_what_it_wrote(pods: list[Pod], tmp_path: Path) -> None:
    """Any bytes, by the sync and the async way; what is not there is an error."""
    block = AgentResultStorage()
    content = bytes(range(256)) * 100
    block.write_path("key", content)
    assert block.read_path("key") == asyncio.run(block.aread_path("key")) == content
    asyncio.run(block.awrite_path("key", b""))
    assert block.read_path("key") == b""
    with pytest.raises(FileNotFoundError, match="no result 'other'"):
        block.read_path("other")
    assert kept(tmp_path) == {"key": b""}


@pytest.mark.parametrize("key", ["../../x", "/etc/passwd", "a\x00b", "", "..\\x", "x" * 300])
def test_hostile_keys_are_refused_by_the_agent(pods: list[Pod], tmp_path: Path, key: str) -> None:
    """A key that could lead out of the organization's results is neither read nor written."""
    block = AgentResultStorage()
    with pytest.raises(wire.AgentError, match="is not allowed"):
        block.write_path(key, b"x")
    with pytest.raises(wire.AgentError, match="is not allowed"):
        block.read_path(key)
    assert not (tmp_path / "store").exists()


def test_content_that_is_no_content(pods: list[Pod]) -> None:
    """A request that no block of ours makes gets an error for an answer."""
    for arguments in ({"key": "a", "content": "?"}, {"key": "a"}, {"key": 3, "content": ""}):
        with pytest.raises(wire.AgentError):
            wire.request("write_result", **cast(Any, arguments))


def test_a_result_that_is_too_large(pods: list[Pod]) -> None:
    """It is refused before it is sent, with what to do; the largest that is allowed passes."""
    with pytest.raises(InvalidRequestError, match="Store it as a file"):
        AgentResultStorage().write_path("key", bytes(MAX_RESULT_BYTES + 1))
    AgentResultStorage().write_path("key", bytes(MAX_RESULT_BYTES))
    assert len(AgentResultStorage().read_path("key")) == MAX_RESULT_BYTES


calls: list[str] = []


@task(cache_policy=JobIdCachePolicy(), persist_result=True, result_serializer="json")
async def work(job_id: str, run: str) -> dict[str, str]:
    calls.append(run)
    return {"run": run}


@flow
async def job_flow(run: str) -> Any:
    """As `orchestration.job_flow` does it."""
    result = await work("job-1", run)
    results = await get_result_store().aupdate_for_task(work)
    return Completed(message=f"{result['run']} {await results.aexists('job-1')}")


@pytest.mark.usefixtures("prefect_api")
def test_a_later_run_on_another_pod_takes_the_result(
    pods: list[Pod], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is done once; the second run has its result from the store, and sees that it is there."""
    calls.clear()
    supervised = keep_results_in_store(cast(Flow[..., Any], job_flow))
    first = asyncio.run(cast(Any, supervised("first", return_state=True)))
    monkeypatch.setenv(wire.SOCKET_VARIABLE, str(pods[1].socket))
    second = asyncio.run(cast(Any, supervised("second", return_state=True)))
    assert (first.message, second.message) == ("first True", "first True")
    assert calls == ["first"]
    record = json.loads(kept(tmp_path)["job-1"])
    assert record["metadata"]["storage_block_id"] is None


@task(persist_result=True)
def add(left: int, right: int) -> int:
    calls.append("add")
    return left + right


@flow
def inner(number: int) -> int:
    return add(number, 1) + add.submit(number, 2).result()


@flow(persist_result=True)
def users_own(number: int) -> int:
    return inner(number)


@pytest.mark.usefixtures("prefect_api")
def test_a_flow_of_a_user(pods: list[Pod], tmp_path: Path) -> None:
    """Results of a sync flow, its subflows and their tasks, in threads too, all go to the store."""
    calls.clear()
    state = keep_results_in_store(cast(Flow[..., Any], users_own))(3, return_state=True)
    assert state.is_completed()
    assert len(kept(tmp_path)) == 4
    assert calls == ["add", "add"]
    assert state.data.metadata.storage_key in kept(tmp_path)
    assert state.result() == 9


def test_what_a_flow_says_itself_is_kept(tmp_path: Path) -> None:
    """A flow that names its storage, or does not want its result kept, is left as it is."""
    named = flow(result_storage=tmp_path, persist_result=False)(lambda: None)
    assert keep_results_in_store(cast(Flow[..., Any], named)).result_storage == tmp_path
    assert named.persist_result is False
    plain = cast(Flow[..., Any], flow(lambda: None))
    assert keep_results_in_store(plain).persist_result is False
    assert isinstance(plain.result_storage, AgentResultStorage)
