"""Where flows on a pod keep their results: the file store, through the agent, without a credential."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from prefect import Flow
from prefect.filesystems import WritableFileSystem
from prefect.results import get_default_persist_setting

from openweights_prefect.errors import InvalidRequestError
from openweights_prefect.runtime import wire

MAX_RESULT_BYTES = 32 << 20


class AgentResultStorage(WritableFileSystem):
    """Results in the file store of the pod's organization, read and written by the agent.

    It works only in a flow run on a pod, which needs no block document of it: it holds nothing.
    """

    _block_type_name = "OpenWeights Result Storage"
    _block_type_slug = "openweights-result-storage"

    async def aread_path(self, path: str) -> bytes:
        """The result with this key; raises `FileNotFoundError`."""
        return await asyncio.to_thread(_read, path)

    async def awrite_path(self, path: str, content: bytes) -> None:
        """Keep a result in place of what was there; raises `InvalidRequestError` for more than 32 MiB."""
        await asyncio.to_thread(_write, path, content)

    def _resolve_path(self, path: str) -> None:
        """Tell Prefect that keys are no paths: it would look for them below the current folder."""

    # Prefect calls these two, with `_sync`, from flows that are not async.
    def read_path(self, path: str, _sync: bool = True) -> bytes:  # type: ignore[override]
        """The result with this key; raises `FileNotFoundError`."""
        return _read(path)

    def write_path(self, path: str, content: bytes, _sync: bool = True) -> None:  # type: ignore[override]
        """Keep a result in place of what was there; raises `InvalidRequestError` for more than 32 MiB."""
        _write(path, content)


def keep_results_in_store(flow: Flow[..., Any]) -> Flow[..., Any]:
    """Make the store the flow's result storage, unless it names one of its own.

    Tasks and subflows without a storage of their own inherit it. `Flow(result_storage=...)` takes no block
    that was not saved in Prefect, hence the assignment. Says whether to keep results, too, when the flow does
    not: Prefect would ask its server for both defaults in every run.
    """
    if flow.result_storage is None:
        flow.result_storage = AgentResultStorage()
    if flow.persist_result is None:
        flow.persist_result = get_default_persist_setting()
    return flow


def _read(key: str) -> bytes:
    answer = wire.request("read_result", key=key)
    if answer["content"] is None:
        raise FileNotFoundError(f"There is no result {key!r} in the file store.")
    return base64.b64decode(answer["content"])


def _write(key: str, content: bytes) -> None:
    if len(content) > MAX_RESULT_BYTES:
        raise InvalidRequestError(
            f"The result {key!r} has {len(content)} bytes; the most is {MAX_RESULT_BYTES}. "
            "Store it as a file and return the file's id."
        )
    wire.request("write_result", key=key, content=base64.b64encode(content).decode("ascii"))
