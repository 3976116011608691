"""`ow costs` and `ow explain`, on a ledger with a past."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from openweights_prefect.cli.main import main
from openweights_prefect.ledger.identity import LOCAL_USER_ID
from tests.callers import Callers
from tests.ledger.bills import Bills, open_bills


@pytest.fixture(autouse=True)
def home(tmp_path: Path, ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("OW_", "PREFECT_", "RUNPOD_", "SUPABASE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OW_DATABASE_URL", ledger_url)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bills(ledger_url: str) -> Iterator[Bills]:
    with open_bills(ledger_url) as opened:
        yield opened


@pytest.fixture
def spent(bills: Bills) -> Bills:
    """Ten days ago: a pod at 6 USD/h boots for 10 minutes, runs `a` for 30 and `b` for 20, and ends in 10."""
    pod, start = bills.pod("pod-1", price=6), datetime.now(UTC) - timedelta(days=10)
    token = bills.token("ci", bills.member("ada@example.org"))
    a = bills.run(bills.job("a"), pod, token_id=token)
    b = bills.run(bills.job("b"), pod)
    for kind, begin, end, run in (("boot", 0, 10, None), ("run", 10, 40, a), ("run", 40, 60, b)):
        bills.spell(pod, kind, begin, end, run=run, price=6, start=start)
    bills.spell(pod, "teardown", 60, 70, price=6, start=start)
    return bills


def ow(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def answer(*arguments: str) -> Any:
    result = ow(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def lines(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines() if "\t" in line]


def test_the_bill_is_a_table_with_a_total(spent: Bills) -> None:
    """The dearest first; what reuse saved, and the budget."""
    done = ow("costs")
    assert done.exit_code == 0, done.output
    assert lines(done.stdout) == [
        ["JOB", "", "RUNS", "HOURS", "RUNNING", "OVERHEAD", "TOTAL USD"],
        ["a", "probe", "1", "0.5", "3.00", "1.20", "4.20"],
        ["b", "probe", "1", "0.3", "2.00", "0.80", "2.80"],
        ["total", "", "2", "0.8", "5.00", "2.00", "7.00"],
    ]
    assert "Of the overhead: 1.00 booting, 0.00 waiting, 1.00 ending." in done.stdout
    assert "Saved by reuse: 1.00 USD" in done.stdout
    assert "Budget: no limit; 7.00 USD spent in all." in done.stdout


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("worker", ["pod-1", "total"]),
        ("token", ["ci", "(no token)", "total"]),
        ("user", ["ada@example.org", LOCAL_USER_ID, "total"]),
    ],
)
def test_the_bill_by_others(spent: Bills, by: str, names: list[str]) -> None:
    """Users by their address, tokens by their name."""
    done = ow("costs", "--by", by)
    assert [line[0] for line in lines(done.stdout)[1:]] == names
    assert lines(done.stdout)[-1][-1] == "7.00"


def test_the_lines_can_be_limited(spent: Bills) -> None:
    """What is left out is one line, and in the total."""
    table = lines(ow("costs", "--limit", "1").stdout)
    assert [line[0] for line in table[1:]] == ["a", "1 more", "total"]
    assert table[-1][-1] == "7.00"


def test_the_time_can_be_limited(spent: Bills) -> None:
    """By how long ago, or by a date."""
    assert "Nothing was spent in that time." in ow("costs", "--since", "7d").stdout
    assert answer("costs", "--since", "11d")["total"]["total_usd"] == pytest.approx(7)
    date = f"{datetime.now(UTC) - timedelta(days=12):%Y-%m-%d}"
    assert answer("costs", "--since", date)["total"]["total_usd"] == pytest.approx(7)
    assert answer("costs", "--until", date)["rows"] == []


@pytest.mark.parametrize("text", ["yesterday", "7x", "", "never", "2026-13-01"])
def test_a_wrong_time_is_a_wrong_command_line(text: str) -> None:
    assert ow("costs", "--since", text).exit_code == 2


def test_the_budget_is_set_shown_and_removed(spent: Bills) -> None:
    assert ow("costs", "budget", "10").stdout == (
        "Budget: 7.00 of 10.00 USD spent, 0.00 set aside for the pods that live, 3.00 left for new ones.\n"
    )
    assert answer("costs", "budget")["remaining_usd"] == pytest.approx(3)
    assert answer("costs", "budget", "none")["limit_usd"] is None
    assert ow("costs", "budget", "much").exit_code == 2
    refused = ow("costs", "budget", "-1")
    assert refused.exit_code == 2 or "is not an amount of USD" in refused.output


def test_a_waiting_job_is_explained(ledger: Callers) -> None:
    """As text, and as JSON."""
    ledger.call(
        "submit_job",
        job={"id": "a", "type": "probe", "docker_image": "i", "entrypoint": "true", "requires_vram_gb": 20},
    )
    done = ow("explain", "a")
    assert done.exit_code == 0, done.output
    assert "waiting, next in line" in done.stdout
    assert "No worker has reported yet" in done.stdout
    assert answer("explain", "a")["position"] == 1
    missing = ow("explain", "b")
    assert missing.exit_code == 1
    assert "No job 'b'" in missing.output
