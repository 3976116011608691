"""`ow.costs` and `job.cost`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import ConfigurationError, InvalidParameterError, PermissionDeniedError
from openweights_prefect.resources.costs import Costs, total_of
from openweights_prefect.settings import Settings
from tests.ledger.bills import START, Bills, open_bills
from tests.sdk.conftest import RecordingLedger


@pytest.fixture
def bills(settings: Settings) -> Iterator[Bills]:
    """Two jobs on one pod at 1 USD/h: an hour of `a`, half an hour of `b`, a boot of half an hour."""
    with open_bills(settings.database_url) as opened:
        pod = opened.pod("pod-1", price=1)
        opened.spell(pod, "boot", 0, 30)
        opened.spell(pod, "run", 30, 90, run=opened.run(opened.job("a"), pod))
        opened.spell(pod, "run", 90, 120, run=opened.run(opened.job("b"), pod))
        yield opened


def test_rows_come_the_dearest_first(ow: OpenWeights, bills: Bills) -> None:
    """With everything that a bill needs."""
    a, b = ow.costs.rows("job")
    assert (a["key"], b["key"]) == ("a", "b")
    assert (a["direct_usd"], a["overhead_usd"], a["total_usd"]) == pytest.approx((1, 1 / 3, 4 / 3))
    assert b["saved_usd"] == pytest.approx(0.5)
    assert total_of([a, b])["total_usd"] == pytest.approx(2)
    assert [row["key"] for row in ow.costs.rows("day")] == ["2026-03-01"]
    assert [row["key"] for row in ow.costs.rows("worker")] == ["pod-1"]


def test_a_time_is_absolute_or_ago(ow: OpenWeights, bills: Bills) -> None:
    """Pods that ran across are counted for the part between."""
    half = START + timedelta(minutes=60)
    assert total_of(ow.costs.rows(since=half))["total_usd"] == pytest.approx(1)
    assert total_of(ow.costs.rows(until=datetime.now(UTC) - half))["total_usd"] == pytest.approx(1, abs=0.01)


def test_the_report_is_a_frame(ow: OpenWeights, bills: Bills) -> None:
    """With its columns even when it is empty."""
    pytest.importorskip("pandas")
    frame = ow.costs.report(by="job")
    assert list(frame["key"]) == ["a", "b"]
    assert frame["total_usd"].sum() == pytest.approx(2)
    assert list(ow.costs.report(since=timedelta(seconds=1)).columns) == list(frame.columns)


def test_without_pandas_the_error_says_what_to_do(ow: OpenWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigurationError, match=r"pip install pandas.*ow\.costs\.rows"):
        ow.costs.report()


def test_more_rows_than_a_page_come_all(
    ow: OpenWeights, bills: Bills, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openweights_prefect.resources.costs.MAX_ROWS", 2)
    for number in range(4):
        bills.spell(bills.pod(f"vain-{number}", bought_for=bills.job(f"job-{number}")), "boot", 0, 60)
    bills.spell(bills.pod("nobody"), "boot", 0, 60)
    rows = ow.costs.rows()
    assert {row["key"] for row in rows} == {"a", "b", "job-0", "job-1", "job-2", "job-3", None}
    assert total_of(rows)["total_usd"] == pytest.approx(7)


def test_a_job_knows_its_cost(ow: OpenWeights, bills: Bills) -> None:
    """None before anything was spent."""
    assert ow.jobs.retrieve("a").cost == pytest.approx(4 / 3)
    assert ow.jobs.retrieve("a")["cost"] == pytest.approx(4 / 3)
    bills.job("waiting", status="pending")
    assert ow.jobs.retrieve("waiting").cost is None


def test_the_budget_is_set_and_removed(ow: OpenWeights, bills: Bills) -> None:
    """By admins."""
    assert ow.costs.budget().limit_usd is None
    held = ow.costs.set_budget(5)
    assert (held.limit_usd, held.spent_usd, held.remaining_usd) == pytest.approx((5, 2, 3))
    assert ow.costs.set_budget(None).remaining_usd is None
    token = ow.tokens.create("user")
    with (
        OpenWeights(auth_token=token.token, settings=ow.settings) as user,
        pytest.raises(PermissionDeniedError),
    ):
        user.costs.set_budget(1)


def test_a_token_s_limit_can_be_set_here_too(ow: OpenWeights) -> None:
    made = ow.tokens.create("ci")
    assert ow.costs.set_limit(made.id, 3).spend_limit_usd == 3
    assert ow.costs.set_limit(made.id, None).spend_limit_usd is None


@pytest.mark.parametrize(
    "arguments",
    [{"by": "color"}, {"since": datetime(2026, 3, 1)}, {"since": "7d"}, {"until": 3}],  # noqa: DTZ001  # refused
)
def test_bad_arguments_are_refused_without_a_request(
    ledger: RecordingLedger, arguments: dict[str, Any]
) -> None:
    """The message names the argument and the value."""
    with pytest.raises(InvalidParameterError, match=next(iter(arguments))):
        Costs(ledger).rows(**arguments)
    with pytest.raises(InvalidParameterError, match="usd=-1"):
        Costs(ledger).set_budget(-1)
    assert ledger.calls == []
