"""A Unix socket that answers JSON lines: how a job and its flow reach their agent."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.runtime.wire import MAX_LINE

logger = logging.getLogger(__name__)

Answer = Callable[..., Awaitable[dict[str, Any]]]


async def serve(path: Path, calls: Mapping[str, Answer]) -> asyncio.Server:
    """Serve the calls, each named as in `wire.request`, on a socket that only this user can open."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if line := await reader.readline():
                answer = await _answer(line, calls)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError) as exc:
            logger.warning("A local request was dropped: %s", exc)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(connected, path=str(path), limit=MAX_LINE)
    path.chmod(0o600)
    return server


async def _answer(line: bytes, calls: Mapping[str, Answer]) -> dict[str, Any]:
    try:
        request = json.loads(line)
        call = calls.get(request.pop("call", None))
        if call is None:
            return {"error": f"The agent has no such call; it has {', '.join(sorted(calls))}."}
        return await call(**request)
    except OpenWeightsError as exc:
        return {"error": str(exc)}
    except (TypeError, ValueError, AttributeError, OSError) as exc:
        return {"error": f"The request could not be answered: {type(exc).__name__}: {exc}"}
