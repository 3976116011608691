"""What pods cost and for whom: every second is charged once, however it is looked at."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from openweights_prefect.errors import InvalidRequestError
from openweights_prefect.stack.databases import create_organization
from tests.callers import Callers, bootstrap_hash
from tests.conftest import OpenLedger
from tests.ledger.bills import START, Bills, open_bills

GROUPINGS = ("job", "worker", "token", "user", "day")
POD = {
    "docker_image": "i",
    "hardware": "1x L4",
    "gpu_type": "L4",
    "gpu_count": 1,
    "vram_gb": 9,
    "cloud": "SECURE",
}
OTHERS = "00000000-0000-0000-0000-0000000000b0"


@pytest.fixture
def bills(ledger_url: str) -> Iterator[Bills]:
    with open_bills(ledger_url) as opened:
        yield opened


def costs(ledger: Callers, by: str, **window: datetime) -> dict[str | None, dict[str, Any]]:
    times: dict[str, Any] = {name: moment.isoformat() for name, moment in window.items()}
    return {row["key"]: row for row in ledger.person.call("list_costs", group_by=by, **times)}


def total(ledger: Callers, by: str, **window: datetime) -> float:
    return float(sum(row["total_usd"] for row in costs(ledger, by, **window).values()))


def warm_pod(bills: Bills) -> tuple[str, str]:
    """A pod at 0.1 USD a minute: boot 10, a runs 30, idle 10, b runs 10 over midnight, idle 5, teardown 5."""
    first, second = bills.job("a"), bills.job("b")
    pod = bills.pod("pod-1", price=6, bought_for="a")
    a, b = bills.run("a", pod), bills.run("b", pod)
    bills.spell(pod, "boot", 65, 75, price=6)
    bills.spell(pod, "run", 75, 105, run=a, price=6)
    bills.spell(pod, "idle", 105, 115, price=6)
    bills.spell(pod, "run", 115, 125, run=b, price=6)
    bills.spell(pod, "idle", 125, 130, price=6)
    bills.spell(pod, "teardown", 130, 135, price=6)
    return first, second


def test_what_a_pod_did_besides_is_shared_by_run_time(ledger: Callers, bills: Bills) -> None:
    """Boot, idle and teardown go to the runs of the pod in proportion to their seconds."""
    warm_pod(bills)
    rows = costs(ledger, "job")
    a, b = rows["a"], rows["b"]
    assert (a["direct_usd"], b["direct_usd"]) == pytest.approx((3, 1))
    assert (a["overhead_usd"], b["overhead_usd"]) == pytest.approx((3 * 0.75, 3 * 0.25))
    assert (a["boot_usd"], a["idle_usd"], a["teardown_usd"]) == pytest.approx((0.75, 1.125, 0.375))
    assert (a["run_seconds"], b["run_seconds"]) == (1800, 600)
    assert (a["runs"], b["runs"]) == (1, 1)
    assert a["label"] == "probe"
    [pod] = costs(ledger, "worker").values()
    assert (pod["key"], pod["label"], pod["runs"]) == ("pod-1", "1x L4", 2)
    assert (pod["direct_usd"], pod["overhead_usd"]) == pytest.approx((4, 3))


def test_reuse_saves_a_boot(ledger: Callers, bills: Bills) -> None:
    """The run that finds its pod warm saves what the pod's boot has cost; the pod's first run does not."""
    warm_pod(bills)
    rows = costs(ledger, "job")
    assert (rows["a"]["saved_usd"], rows["b"]["saved_usd"]) == pytest.approx((0, 1))
    day = costs(ledger, "day")
    assert [row["saved_usd"] for row in day.values()] == pytest.approx([1, 0])


def test_days_are_cut_at_midnight(ledger: Callers, bills: Bills) -> None:
    """In UTC; the second run is of both days."""
    warm_pod(bills)
    days = costs(ledger, "day")
    assert list(days) == ["2026-03-01", "2026-03-02"]
    assert [row["total_usd"] for row in days.values()] == pytest.approx([5.5, 1.5])
    assert [row["run_seconds"] for row in days.values()] == [2100, 300]
    assert [row["runs"] for row in days.values()] == [2, 1]


def test_a_pod_that_ran_nothing_is_the_job_s_for_which_it_was_bought(ledger: Callers, bills: Bills) -> None:
    """One that was bought for nobody has no key, and comes last."""
    token = bills.token("ci")
    bills.job("wanted", token, status="canceled")
    bills.spell(bills.pod("vain", bought_for="wanted"), "boot", 0, 60)
    bills.spell(bills.pod("nobody"), "boot", 0, 30)
    rows = costs(ledger, "job")
    assert list(rows) == ["wanted", None]
    assert (rows["wanted"]["total_usd"], rows["wanted"]["runs"]) == (1, 0)
    assert rows[None]["total_usd"] == 0.5
    assert {key: row["label"] for key, row in costs(ledger, "token").items()} == {token: "ci", None: None}
    assert ledger.person.call("job_cost", job_id="wanted")[0]["overhead_usd"] == 1
    [held] = ledger.person.call("list_tokens")
    assert held["spent_usd"] == 1


def test_an_attempt_is_paid_by_who_asked_for_it(ledger: Callers, bills: Bills) -> None:
    """By token with its name, by user with the e-mail address."""
    ada = bills.member("ada@example.org")
    first, second = bills.token("ci"), bills.token("notebook", ada)
    bills.job("a", second)
    pod = bills.pod("pod-1")
    bills.spell(pod, "run", 0, 60, run=bills.run("a", pod, token_id=first))
    bills.spell(pod, "run", 60, 90, run=bills.run("a", pod, attempt=2, token_id=second))
    tokens = costs(ledger, "token")
    assert {row["label"]: row["total_usd"] for row in tokens.values()} == {"ci": 1, "notebook": 0.5}
    users = costs(ledger, "user")
    assert (users[ada]["label"], users[ada]["total_usd"]) == ("ada@example.org", 0.5)
    assert ledger.person.call("job_cost", job_id="a")[0]["total_usd"] == 1.5
    spent = {row["name"]: row["spent_usd"] for row in ledger.person.call("list_tokens")}
    assert spent == pytest.approx({"ci": 1, "notebook": 0.5})


def test_runs_without_a_second_share_alike(ledger: Callers, bills: Bills) -> None:
    """Nothing is divided by zero, and nothing is lost."""
    pod = bills.pod("pod-1")
    bills.spell(pod, "boot", 0, 60)
    for name in "ab":
        bills.spell(pod, "run", 60, 60, run=bills.run(bills.job(name), pod))
    rows = costs(ledger, "job")
    assert {key: row["total_usd"] for key, row in rows.items()} == pytest.approx({"a": 0.5, "b": 0.5})
    assert {row["runs"] for row in rows.values()} == {1}


@pytest.mark.parametrize("seed", range(4))
def test_every_grouping_adds_up_to_the_bill(ledger: Callers, bills: Bills, seed: int) -> None:
    """Whatever the history, for the whole time and for any part of it; parts add up to the whole."""
    chance = random.Random(seed)
    bill = random_history(bills, chance)
    cuts = sorted(START + timedelta(minutes=chance.uniform(-100, 4000)) for _ in range(2))
    windows: list[dict[str, datetime]] = [
        {},
        {"since": cuts[0]},
        {"until": cuts[0]},
        {"since": cuts[0], "until": cuts[1]},
    ]
    for window in windows:
        expected = sum(clipped(part, window) for part in bill)
        for by in GROUPINGS:
            assert total(ledger, by, **window) == pytest.approx(expected, abs=1e-9), (by, window)
    whole = costs(ledger, "job")
    for key, row in whole.items():
        parts = [costs(ledger, "job", until=cuts[0]), costs(ledger, "job", since=cuts[0])]
        summed = sum(part[key]["total_usd"] for part in parts if key in part)
        assert summed == pytest.approx(row["total_usd"], abs=1e-9)
        if key is not None:
            [alone] = ledger.person.call("job_cost", job_id=key)
            assert alone["total_usd"] == pytest.approx(row["total_usd"], abs=1e-9)


Part = tuple[float, datetime, datetime]


def random_history(bills: Bills, chance: random.Random) -> list[Part]:
    """Twenty pods with any intervals; some ran nothing, some were bought for nobody."""
    tokens = [bills.token(f"t{number}") for number in range(3)]
    jobs = [bills.job(f"job-{number}", chance.choice([None, *tokens])) for number in range(8)]
    attempts = dict.fromkeys(jobs, 0)
    bill: list[Part] = []
    for number in range(20):
        price = round(chance.uniform(0, 9), 2)
        pod = bills.pod(f"pod-{number}", price=price, bought_for=chance.choice([None, *jobs]))
        minute = chance.uniform(0, 2000)
        kinds = ["boot", *chance.choices(["run", "idle"], k=chance.randrange(6)), "teardown"]
        for kind in kinds:
            end = minute + chance.choice([0, chance.uniform(0, 900)])
            run = None
            if kind == "run":
                job = chance.choice(jobs)
                attempts[job] += 1
                run = bills.run(job, pod, attempt=attempts[job], token_id=chance.choice([None, *tokens]))
            bills.spell(pod, kind, minute, end, run=run, price=price)
            bill.append((price, START + timedelta(minutes=minute), START + timedelta(minutes=end)))
            minute = end
    return bill


def clipped(part: Part, window: dict[str, datetime]) -> float:
    price, begin, end = part
    begin, end = max(begin, window.get("since", begin)), min(end, window.get("until", end))
    return price * max(0.0, (end - begin).total_seconds()) / 3600


def test_live_pods_count_until_now(ledger: Callers, bills: Bills) -> None:
    """What runs now is charged so far."""
    pod = bills.pod("pod-1", alive=True)
    now = datetime.now(UTC)
    bills.spell(pod, "boot", -60, -30, start=now)
    bills.spell(pod, "run", -30, None, run=bills.run(bills.job("a", status="in_progress"), pod), start=now)
    [row] = costs(ledger, "job").values()
    assert row["total_usd"] == pytest.approx(1, abs=0.01)
    assert row["direct_usd"] == pytest.approx(0.5, abs=0.01)


def test_a_pod_that_lived_through_the_functions_is_charged(ledger: Callers) -> None:
    """By the calls of a real pod and its control plane: direct, and overhead."""
    ledger.call("submit_job", job={"id": "a", "type": "probe", "docker_image": "i", "entrypoint": "true"})
    run, boot = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
    ledger.call("record_flow_run", for_job="a", for_attempt=1, flow_run=run)
    wanted = {**POD, "id": "p", "price_per_hour": 3600, "bought_for": "a"}
    ledger.call("intend_pod", pod=wanted, bootstrap_hash=bootstrap_hash("p"), ttl_seconds=3600, max_pods=1)
    ledger.call("record_pod", for_worker="p", provider_id="provider-p", price=3600)
    [before] = ledger.person.call("job_cost", job_id="a")
    assert before["direct_usd"] == 0
    assert before["overhead_usd"] > 0
    ledger.call("register_pod", for_worker="p", as_boot=boot, lease_seconds=60, models=[])
    ledger.call("open_run", for_run=run, for_worker="p", as_boot=boot)
    ledger.call("finish_run", for_run=run, as_boot=boot, result="completed")
    ledger.call("end_pod", for_worker="p")
    [after] = ledger.person.call("job_cost", job_id="a")
    assert after["direct_usd"] > 0
    assert after["overhead_usd"] > before["overhead_usd"]
    [budget] = ledger.person.call("get_budget")
    assert after["total_usd"] == pytest.approx(budget["spent_usd"]) == pytest.approx(total(ledger, "user"))


def test_pages_go_by_key(ledger: Callers, bills: Bills) -> None:
    """All rows come once, the one without a key last."""
    for number in range(5):
        name = bills.job(f"job-{number}")
        bills.spell(bills.pod(f"pod-{number}", bought_for=name), "boot", 0, 60)
    bills.spell(bills.pod("nobody"), "boot", 0, 60)
    keys: list[str | None] = []
    while not keys or keys[-1] is not None:
        after: dict[str, Any] = {"after_key": keys[-1]} if keys else {}
        keys += [row["key"] for row in ledger.person.call("list_costs", group_by="job", max_rows=2, **after)]
    assert keys == [*(f"job-{number}" for number in range(5)), None]


def test_an_unknown_grouping_is_refused(ledger: Callers) -> None:
    """With the ones that exist."""
    with pytest.raises(InvalidRequestError, match="job, worker, token, user, day"):
        ledger.person.call("list_costs", group_by="color")


def test_others_are_not_seen(ledger: Callers, ledger_url: str, open_ledger: OpenLedger, bills: Bills) -> None:
    """An organization sees its own costs, also of a job that has the same id."""
    create_organization(ledger_url, OTHERS)
    warm_pod(bills)
    with open_bills(ledger_url, OTHERS) as theirs:
        theirs.spell(theirs.pod("pod-1", bought_for=theirs.job("a")), "boot", 0, 60)
    others = open_ledger(OTHERS)
    for by in GROUPINGS:
        assert total(ledger, by) == pytest.approx(7)
        assert total(others, by) == pytest.approx(1)
    assert others.person.call("job_cost", job_id="a")[0]["total_usd"] == 1
    assert others.person.call("job_cost", job_id="b") == []


def test_the_rest_of_a_budget_counts_live_pods_with_all_that_they_may_cost(
    ledger: Callers, bills: Bills
) -> None:
    """And without a limit there is no rest."""
    assert ledger.person.call("get_budget")[0]["remaining_usd"] is None
    warm_pod(bills)
    ledger.person.call("set_budget", limit_usd=10)
    wanted = {**POD, "id": "p", "price_per_hour": 1}
    ledger.call("intend_pod", pod=wanted, bootstrap_hash=bootstrap_hash("p"), ttl_seconds=7200, max_pods=9)
    [budget] = ledger.person.call("get_budget")
    assert (budget["reserved_usd"], budget["remaining_usd"]) == pytest.approx((2, 1))
    assert budget["spent_usd"] == pytest.approx(7, abs=0.01)
    ledger.person.call("set_budget", limit_usd=1)
    assert ledger.person.call("get_budget")[0]["remaining_usd"] == 0


MANY = (
    """
    insert into ledger.jobs (organization_id, id, type, entrypoint, docker_image)
    select %(org)s, 'job-' || n, 'probe', 'true', 'i' from generate_series(0, 999) n
    """,
    """
    insert into ledger.runs (id, organization_id, job_id, attempt, status, worker_id)
    select md5(n::text)::uuid, %(org)s, 'job-' || n %% 1000, n, 'completed', 'pod-' || n %% 250
    from generate_series(0, 4999) n
    """,
    """
    insert into ledger.pod_intervals
        (organization_id, worker_id, kind, run_id, price_per_hour, started_at, ended_at)
    select %(org)s, 'pod-' || n %% 250, k.kind, case k.kind when 'run' then md5(n::text)::uuid end, 2.5,
           %(start)s::timestamptz + (n / 250 * 10 + k.at) * interval '1 minute',
           %(start)s::timestamptz + (n / 250 * 10 + k.at + 5) * interval '1 minute'
    from generate_series(0, 4999) n, (values ('idle', 0), ('run', 5)) as k (kind, at)
    """,
    "analyze ledger.pod_intervals, ledger.runs, ledger.jobs, ledger.worker",
)


def test_ten_thousand_intervals_are_summed_at_once(ledger: Callers, bills: Bills, transport: str) -> None:
    """A page that people look at: well below a second for each grouping, also on a machine that is busy."""
    if transport != "psycopg":
        pytest.skip("the time of the query, not of HTTP")
    for number in range(250):
        bills.pod(f"pod-{number}")
    for statement in MANY:
        bills.connection.execute(statement, {"org": bills.organization_id, "start": START})
    for by in GROUPINGS:
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            rows = ledger.person.call("list_costs", group_by=by)
            seconds.append(time.perf_counter() - began)
        assert sum(row["total_usd"] for row in rows) == pytest.approx(10_000 * 2.5 / 12)
        print(by, len(rows), f"{min(seconds) * 1000:.0f} ms")
        assert min(seconds) < 1
