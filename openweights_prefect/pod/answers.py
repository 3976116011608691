"""What a job and its flow may ask of their agent."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.pod import folder as folders
from openweights_prefect.pod.ending import Ending
from openweights_prefect.pod.library import Library
from openweights_prefect.pod.outage import upload_until_stored
from openweights_prefect.pod.redaction import Redaction
from openweights_prefect.pod.server import Answer
from openweights_prefect.pod.shipping import Shipper
from openweights_prefect.runtime.entrypoint import RunFolder

Finish = Callable[[str, str | None, dict[str, Any] | None], Awaitable[Row]]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers the requests of one run. A job may ask for less than its flow, which finishes the run."""

    job: Mapping[str, Any]
    folder: RunFolder
    library: Library
    ledger: Ledger
    shipper: Shipper
    ending: Ending
    finish: Finish
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    redaction: Redaction = field(default_factory=lambda: Redaction([]), repr=False)
    of_the_pod: Mapping[str, Answer] = field(default_factory=dict)
    """What a job may ask about its pod."""

    def for_job(self) -> dict[str, Answer]:
        """The calls of a job."""
        return {
            **self.of_the_pod,
            "flush": self._flush,
            "upload": self._upload,
            "fetch": self._fetch,
            "get_file": self._get_file,
            "events": self._events,
        }

    def for_flow(self) -> dict[str, Answer]:
        """The calls of its flow."""
        return {
            **self.for_job(),
            "started": self._started,
            "exited": self._exited,
            "secrets": self._secrets,
            "collect": self._collect,
            "finish": self._finish,
            "read_result": self._read_result,
            "write_result": self._write_result,
        }

    # A job's ------------------------------------------------------------------------------------

    async def _flush(self) -> dict[str, Any]:
        await self.shipper.drain()
        return {}

    async def _upload(self, path: str, purpose: str, name: str) -> dict[str, Any]:
        shown = self.redaction.text(name)
        return {"file": await upload_until_stored(self.library, path, purpose=purpose, name=shown)}

    async def _get_file(self, id: str) -> dict[str, Any]:
        return {"file": await asyncio.to_thread(self.library.describe, id)}

    async def _fetch(self, id: str) -> dict[str, Any]:
        await asyncio.to_thread(self.library.describe, id)
        target = self.folder.path / "fetched" / id.replace(":", "-")
        target.parent.mkdir(exist_ok=True)
        await asyncio.to_thread(self.library.fetch, id, target)
        return {"path": str(target)}

    async def _events(self, run_id: str | None = None) -> dict[str, Any]:
        events: list[Row] = []
        while page := await self._events_page(run_id, events[-1]["id"] if events else 0):
            events += page
        return {"events": events}

    async def _events_page(self, run_id: str | None, after: int) -> list[Row]:
        return await asyncio.to_thread(
            self.ledger.call,
            "list_events",
            for_job=self.job["id"],
            for_run=UUID(run_id) if run_id else None,
            after_id=after,
        )

    # Its flow's ---------------------------------------------------------------------------------

    async def _started(self, pid: int) -> dict[str, Any]:
        self.ending.started(pid)
        return {}

    async def _exited(self) -> dict[str, Any]:
        await self.ending.exited()
        return {}

    async def _secrets(self) -> dict[str, Any]:
        return {"values": dict(self.secrets)}

    async def _collect(self) -> dict[str, Any]:
        """Upload what the run left in `uploads/`; each file is an event."""
        try:
            uploads = await asyncio.to_thread(folders.left_files, self.folder)
        except InvalidParameterError as exc:  # The job's own fault: another attempt would end the same.
            why = self.redaction.text(f"A file in `uploads/`: {exc}")
            return {"files": [], "intent": self.ending.intent or ("failed", why)}
        files = []
        for found, path in uploads:
            name = self.redaction.text(found)
            row = await upload_until_stored(self.library, str(path), purpose="result", name=name)
            files.append({"path": name, "file": row["id"]})
        return {"files": files, "intent": self.ending.intent}

    async def _finish(
        self, result: str, why: str | None = None, outputs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        job = await self.finish(result, why, outputs)
        return {"status": job["status"], "outputs": job["outputs"]}

    async def _read_result(self, key: str) -> dict[str, Any]:
        data = await asyncio.to_thread(self.library.read_result, key)
        return {"content": None if data is None else base64.b64encode(data).decode("ascii")}

    async def _write_result(self, key: str, content: str) -> dict[str, Any]:
        data = base64.b64decode(content, validate=True)
        await asyncio.to_thread(self.library.write_result, key, data)
        return {}
