"""What `job.wait()` shows: a live bar on a terminal, else a line for every change."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from openweights_prefect.types.job import FINAL_STATUSES, JobColumns

_LONGEST_REASON = 200


class View(NamedTuple):
    """The state of a job in words and one number."""

    state: str
    """Such as `pending: no capacity` or `running on w-1 (2x A100)`."""
    share: float | None
    """How much is done, from 0 to 1."""
    detail: str
    """Such as `step 5/20, loss 1.2340`."""
    elapsed: str
    """Since it started, or since it was submitted."""


class Display(Protocol):
    """Shows one job."""

    def update(self, job: JobColumns, pod: str | None, latest: Mapping[str, Any]) -> None:
        """Show the state that was just read."""

    def say(self, text: str) -> None:
        """Print a line of its own."""


@contextmanager
def show_progress(job_id: str, *, enabled: bool, stream: TextIO | None = None) -> Iterator[Display | None]:
    """A display on stderr for the time of a wait; None when not enabled."""
    stream = stream or sys.stderr
    if not enabled:
        yield None
    elif not stream.isatty():
        yield Lines(job_id, stream)
    else:
        console = Console(file=stream)
        columns = (
            TextColumn("{task.fields[job]}", markup=False),
            # A long reason is cut before anything else is.
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            TextColumn("{task.fields[elapsed]}", markup=False),
        )
        with RichProgress(*columns, console=console, expand=True) as bar:
            yield Bar(job_id, bar)


class Bar:
    """One live line on a terminal."""

    def __init__(self, job_id: str, bar: RichProgress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, job=job_id, detail="", elapsed="")

    def update(self, job: JobColumns, pod: str | None, latest: Mapping[str, Any]) -> None:
        """Show the state that was just read."""
        view = describe(job, pod, latest, now=datetime.now(UTC))
        self._bar.update(
            self._task,
            description=view.state,
            total=None if view.share is None else 1.0,
            completed=view.share or 0.0,
            detail=view.detail,
            elapsed=view.elapsed,
        )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)


class Lines:
    """A line for every change, for files and notebooks."""

    def __init__(self, job_id: str, stream: TextIO) -> None:
        self._job_id = job_id
        self._stream = stream
        self._shown: tuple[str, int | None] | None = None

    def update(self, job: JobColumns, pod: str | None, latest: Mapping[str, Any]) -> None:
        """Print the state if it is another one: other words, or five percent more."""
        view = describe(job, pod, latest, now=datetime.now(UTC))
        shown = (view.state, None if view.share is None else int(view.share * 20))
        if shown == self._shown:
            return
        self._shown = shown
        share = "" if view.share is None else f"{view.share:.0%}"
        self.say(
            " ".join(filter(None, [f"{self._job_id}:", view.state, share, view.detail, f"({view.elapsed})"]))
        )

    def say(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)


def describe(job: JobColumns, pod: str | None, latest: Mapping[str, Any], *, now: datetime) -> View:
    """Say in words how a job is doing; `latest` has the newest values that it logged, of any type."""
    step, total = _number(latest.get("step")), _number(latest.get("total", latest.get("total_steps")))
    share = _number(latest.get("progress"))
    if share is None and step is not None and total:
        share = step / total
    if job.status in FINAL_STATUSES:
        share = 1.0 if job.status == "completed" else share
    loss = _number(latest.get("loss"))
    parts = [
        "" if step is None else f"step {step:g}" + (f"/{total:g}" if total else ""),
        "" if loss is None else f"loss {loss:.4f}",
    ]
    return View(
        state=_state(job, pod),
        share=None if share is None else min(1.0, max(0.0, share)),
        detail=", ".join(filter(None, parts)),
        elapsed=_elapsed((job.finished_at or now) - (job.started_at or job.created_at)),
    )


def _state(job: JobColumns, pod: str | None) -> str:
    if job.status == "pending":
        again = f" (attempt {job.attempt})" if job.attempt > 1 else ""
        return f"pending{again}: {_one_line(job.pending_reason or 'waiting for a pod')}"
    if job.status == "in_progress":
        return f"running on {pod}" if pod else "running"
    return f"{job.status}: {_one_line(job.error)}" if job.error else job.status


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST_REASON else words[: _LONGEST_REASON - 3] + "..."


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _elapsed(duration: timedelta) -> str:
    seconds = max(0, int(duration.total_seconds()))
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}"
