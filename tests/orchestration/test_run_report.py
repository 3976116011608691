"""What a person sees of a run in Prefect, as text and tables."""

from __future__ import annotations

from itertools import pairwise

from openweights_prefect.orchestration.progress import report_text, sampled


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
