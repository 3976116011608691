"""Shows a run on its Prefect page: log lines, a progress bar, a table of metrics, a report.

All of it is for the eye: the ledger holds the record. A slow or dead Prefect server never delays a run.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

from openweights_prefect.orchestration.curves import Curve, finite, plot
from openweights_prefect.orchestration.flow_runs import FlowRuns

logger = logging.getLogger(__name__)

_UPDATE_SECONDS = 3.0
_MAX_LINES = 5000
_TABLE_ROWS = 200
_MAX_ROWS = 20 * _TABLE_ROWS
_MAX_COLUMNS = 60
_MAX_FILES = 200
_MAX_OUTPUTS = 100
_MAX_NAME = 80
_MAX_CELL = 500
_CURVES = ("loss", "eval_loss")


class RunReport:
    """Collects what a run ships and shows it in the background."""

    def __init__(self, flow_runs: FlowRuns, run_id: UUID, job_id: str) -> None:
        self._flow_runs = flow_runs
        self._run_id = run_id
        self._job_id = job_id
        self._lines: list[str] = []
        self._shown_lines = 0
        self._metrics: list[dict[str, Any]] = []
        self._columns: dict[str, None] = {}
        self._curves = {name: Curve() for name in _CURVES}
        self._files: list[tuple[str, str]] = []
        self._progress: float | None = None
        self._progress_id: UUID | None = None
        self._shown_at = time.monotonic()
        self._showing: asyncio.Task[None] | None = None
        self._warned = False

    async def observe(self, events: Sequence[Mapping[str, Any]], log_text: str) -> None:
        """Take note of what was just stored; returns at once."""
        self._lines += [line.rpartition("\r")[2] for line in log_text.splitlines()]
        self._lines = self._lines[-_MAX_LINES:]
        for event in events:
            self._note(event["data"], event.get("file"))
        due = time.monotonic() - self._shown_at >= _UPDATE_SECONDS
        if due and (self._showing is None or self._showing.done()):
            self._shown_at = time.monotonic()
            self._showing = asyncio.create_task(self._show())

    def _note(self, data: Mapping[str, Any], file: Any) -> None:
        for name, curve in self._curves.items():
            if name in data:
                curve.add(data.get("step"), data[name])
        # Blocks are as many as the data has, and have a file of their own.
        row = self._row(data) if data.get("type") != "logprob_block" else {}
        if len(row) > 1 or ("step" not in row and row):
            self._metrics.append(row)
            if len(self._metrics) > _MAX_ROWS:
                self._metrics = sampled(self._metrics, _MAX_ROWS // 2)
        share = finite(data.get("progress"))
        if share is not None:
            self._progress = 100.0 * min(1.0, max(0.0, share))
        if file and data.get("path") and len(self._files) <= _MAX_FILES:
            self._files.append((str(data["path"])[:_MAX_CELL], str(file)[:_MAX_CELL]))

    def _row(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of an event, as far as the table has columns for them."""
        row = {}
        for name, value in data.items():
            if finite(value) is None:
                continue
            column = name[:_MAX_NAME]
            if column in self._columns or len(self._columns) < _MAX_COLUMNS:
                self._columns[column] = None
                row[column] = value if isinstance(value, float) or abs(value) < 2**53 else float(value)
        return row

    async def close(self, outputs: Mapping[str, Any] | None) -> None:
        """Show the rest, the metrics and the report, in the background."""
        self._flow_runs.spawn(self._finish(outputs))

    async def _finish(self, outputs: Mapping[str, Any] | None) -> None:
        if self._showing is not None:
            await asyncio.wait([self._showing])
        await self._show()
        if self._metrics:
            await self._try(self._create("table", "metrics", sampled(self._metrics, _TABLE_ROWS)))
        curves = plot(self._curves)
        if outputs or self._files or curves:
            text = report_text(self._job_id, outputs or {}, self._files, curves)
            await self._try(self._create("markdown", "report", text))

    async def _show(self) -> None:
        lines, self._lines = self._lines, []
        room = _MAX_LINES - self._shown_lines
        if room > 0 and len(lines) > room:
            lines = [
                *lines[:room],
                f"(further lines are not shown here; `ow logs {self._job_id}` has them all)",
            ]
        if room > 0 and lines:
            self._shown_lines += len(lines)
            await self._try(self._flow_runs.log_lines(self._run_id, lines, datetime.now(UTC)))
        if self._progress is not None:
            await self._try(self._show_progress(self._progress))

    async def _show_progress(self, percent: float) -> None:
        if self._progress_id is None:
            self._progress_id = await self._create("progress", "progress", percent)
        else:
            await self._flow_runs.client.update_artifact(self._progress_id, ArtifactUpdate(data=percent))

    async def _create(self, kind: str, name: str, data: Any) -> UUID:
        key = f"{re.sub('[^a-z0-9]+', '-', self._job_id.lower()).strip('-')}-{name}"
        artifact = await self._flow_runs.client.create_artifact(
            ArtifactCreate(
                key=key,
                type=kind,
                data=data,
                description=f"{name.capitalize()} of job {self._job_id}",
                flow_run_id=self._run_id,
            )
        )
        return artifact.id

    async def _try(self, work: Any) -> None:
        try:
            await work
        except Exception as exc:
            # Telemetry never breaks the work: say so once, go on.
            if not self._warned:
                self._warned = True
                logger.warning("Run %s cannot be shown in Prefect: %s", self._run_id, exc)


def sampled(rows: Sequence[Mapping[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows, evenly spread, the last one included; the same columns in each."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stride = max(1, -(-len(rows) // limit))
    kept = list(rows[stride - 1 :: stride])
    if rows and kept[-1:] != [rows[-1]]:
        kept.append(rows[-1])
    return [{name: row.get(name) for name in columns} for row in kept]


def report_text(
    job_id: str,
    outputs: Mapping[str, Any],
    files: Sequence[tuple[str, str]],
    curves: Sequence[str] = (),
) -> str:
    """Markdown with the curves, outputs and files of a job; what came from the job is quoted.

    The curves are a block of text: Prefect shows no SVG, and not every version of its pages draws diagrams.
    """
    lines = [f"## Job `{job_id}`"]
    if curves:
        lines += ["", "```text", *curves, "```"]
    values = sorted((name, value) for name, value in outputs.items() if name not in ("file", "path"))
    lines += ["", "| output | value |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in values[:_MAX_OUTPUTS]]
    if files:
        lines += ["", "| file | fetch it with |", "| --- | --- |"]
        lines += [
            f"| {_cell(path)} | {_cell(f'ow fetch {file_id}')} |" for path, file_id in files[:_MAX_FILES]
        ]
    if len(values) > _MAX_OUTPUTS or len(files) > _MAX_FILES:
        lines += ["", "Not all of them are shown here."]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = str(value)[:_MAX_CELL].replace("`", "'").replace("|", "\u00a6")
    return f"`{' '.join(text.split()) or ' '}`"
