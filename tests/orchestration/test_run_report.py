"""What a person sees of a run in Prefect, as text and tables."""

from __future__ import annotations

import asyncio
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from openweights_prefect.orchestration.curves import HEIGHT, WIDTH, Curve, plot
from openweights_prefect.orchestration.progress import RunReport, report_text, sampled
from openweights_prefect.types.canonical import encode_event


def test_a_table_is_thinned_evenly_and_keeps_the_last_row() -> None:
    rows = [{"step": step, "loss": 1 / (step + 1)} for step in range(1003)]
    kept = sampled(rows, 200)
    assert len(kept) <= 201
    assert kept[-1] == rows[-1]
    gaps = [after["step"] - before["step"] for before, after in pairwise(kept)]
    assert set(gaps[:-1]) == {6}


def test_rows_of_a_table_have_the_same_columns() -> None:
    assert sampled([{"a": 1}, {"b": 2}], 10) == [{"a": 1, "b": None}, {"a": None, "b": 2}]


def test_no_rows_make_no_table() -> None:
    assert sampled([], 10) == []


def test_a_report_quotes_whatever_a_job_says() -> None:
    """Names and values come from the job: they stay text, in their cell."""
    outputs = {"<script>": "a|b\n`c`", "loss": 0.5, "file": "shown below"}
    text = report_text("ftjob-1", outputs, [("adapter/x.bin", "result:file-0123456789ab")])
    assert "| `<script>` | `a\u00a6b 'c'` |" in text
    assert "| `loss` | `0.5` |" in text
    assert "| `adapter/x.bin` | `ow fetch result:file-0123456789ab` |" in text
    assert "shown below" not in text


def curve(*points: tuple[Any, Any]) -> Curve:
    made = Curve()
    for step, value in points:
        made.add(step, value)
    return made


def test_a_curve_is_drawn() -> None:
    """A falling loss falls, from the first step to the last, with the figures below."""
    loss = curve(*((step, 4.0 - step / 25) for step in range(1, 101)))
    lines = plot({"loss": loss, "eval_loss": curve((0, 4.0), (100, 1.0))})
    assert lines[0].startswith("         4 |o*")
    assert lines[HEIGHT - 1].endswith("*")
    assert lines[HEIGHT - 1].lstrip().startswith("0 |")
    assert lines[HEIGHT + 1].split() == ["0", "100"]
    assert lines[-2:] == [
        "* loss: first 3.96, last 0, least 0",
        "o eval_loss: first 4, last 1, least 1",
    ]
    depth = [
        next(row for row in range(HEIGHT) if lines[row][12 + at : 13 + at] in ("*", "o"))
        for at in (1, 30, 62)
    ]
    assert depth == sorted(depth)


def test_a_long_curve_keeps_its_ends() -> None:
    """Whatever its length, and in little memory."""
    long = curve(*((step, float(step)) for step in range(1_000_001)))
    assert len(long.points) <= 4096
    assert long.all()[0] == (0, 0)
    assert long.all()[-1] == (1_000_000, 1_000_000)
    assert "last 1e+06" in plot({"loss": long})[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 10**400, "9", None, True, [1], {"a": 1}])
def test_only_numbers_get_into_a_curve(value: Any) -> None:
    assert curve((1, value), (value, 1)).points == []


def test_a_flat_curve_and_a_single_point() -> None:
    assert plot({"loss": curve((1, 2.0))}) == []
    assert plot({"loss": curve()}) == []
    assert len(plot({"loss": curve((1, 2.0), (1, 2.0))})) == HEIGHT + 3


def test_values_that_are_not_finite_are_counted() -> None:
    lines = plot({"loss": curve((1, 2.0), (2, {"$float": "NaN"}), (3, 1.0))})
    assert lines[-1] == "* loss: first 2, last 1, least 1, 1 not finite"


class Page:
    """Stands for a run's page in Prefect: keeps what is put there."""

    def __init__(self) -> None:
        self.client = self
        self.artifacts: dict[str, Any] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def create_artifact(self, artifact: Any) -> Any:
        self.artifacts[artifact.type] = artifact.data
        return SimpleNamespace(id=uuid4())

    async def update_artifact(self, artifact_id: Any, artifact: Any) -> None:
        self.artifacts["progress"] = artifact.data

    async def log_lines(self, *_: Any) -> None: ...

    def spawn(self, work: Any) -> None:
        self.tasks.append(asyncio.create_task(work))


def shown(data: list[dict[str, Any]], outputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """The artifacts of a run that logged these events."""

    async def scenario() -> dict[str, Any]:
        page = Page()
        report = RunReport(page, uuid4(), "ftjob-1")  # type: ignore[arg-type]
        events = [{"data": encode_event(values), "file": values.get("file")} for values in data]
        await report.observe(events, "")
        await report.close(outputs)
        await asyncio.gather(*page.tasks)
        return page.artifacts

    return asyncio.run(scenario())


def test_the_report_of_a_training_shows_its_curve() -> None:
    """As text, which every version of Prefect's pages shows."""
    events: list[dict[str, Any]] = [
        {"tag": "train", "step": step, "loss": 1 / step, "progress": step / 50} for step in range(1, 51)
    ]
    events += [{"tag": "eval", "step": 50, "eval_loss": 0.5}, {"tag": "train", "step": 51, "loss": math.nan}]
    found = shown(events)
    text = found["markdown"]
    assert "```text\n" in text
    assert "* loss: first 1, last 0.02, least 0.02, 1 not finite" in text
    assert "o eval_loss: first 0.5, last 0.5, least 0.5" in text
    assert found["progress"] == 100.0
    assert len(found["table"]) == 51  # A step without a number has no row.


def test_whatever_a_job_says_the_page_stays_small_and_text() -> None:
    """Names, figures and files of any size and number; nothing of theirs is outside of a quotation."""
    hostile = "```\n# <script>alert(1)</script> | `x`\u2028## y"
    events: list[dict[str, Any]] = [{f"{hostile}{n}": n, "step": n, "loss": n, "b": 1} for n in range(3000)]
    events += [{"step": hostile, "loss": hostile, "progress": 10**400}, {"step": 10**400, "loss": 1e308}]
    events += [{"path": hostile * 1000, "file": f"result:{hostile}"} for _ in range(3000)]
    events += [{"type": "logprob_block", "step": n, "logprobs": -1.0, "weight": 1} for n in range(3000)]
    found = shown(events, {f"{hostile}{n}": hostile * 1000 for n in range(3000)})
    assert len(found["markdown"]) < 500_000
    assert len(found["table"]) <= 201
    assert len(found["table"][0]) <= 60
    fences = [line for line in found["markdown"].splitlines() if "```" in line]
    assert fences == ["```text", "```"]
    outside = found["markdown"].split("```")[2]
    for line in outside.splitlines():
        parts = line.split("`")
        assert len(parts) % 2 == 1
        assert not any("script" in part or "#" in part for part in parts[::2]), line
    drawn = found["markdown"].split("```")[1]
    assert "script" not in drawn
    assert max(map(len, drawn.splitlines())) <= WIDTH + 12
