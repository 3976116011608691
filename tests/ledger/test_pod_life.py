"""What the ledger decides about pods: who is served first, what fits, who is to blame, and what was paid."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from openweights_prefect.errors import InvalidRequestError
from openweights_prefect.ledger.identity import LocalIdentity, hash_secret
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from tests.callers import Callers, bootstrap_hash

IMAGE = "openweights/test:latest"
POD = {
    "docker_image": IMAGE,
    "hardware": "1x L4",
    "gpu_type": "NVIDIA L4",
    "gpu_count": 1,
    "vram_gb": 19,
    "cloud": "SECURE",
    "price_per_hour": 0.5,
}
Sql = Callable[..., Any]


@pytest.fixture
def sql(ledger: Callers) -> Sql:
    """Runs a statement as the owner of the tables; gives the first value, if there is one."""

    def run(statement: str, *values: Any) -> Any:
        url = ledger.url.replace("authenticator@", "postgres@")
        with psycopg.connect(url) as connection:
            cursor = connection.execute(statement, values)
            row = cursor.fetchone() if cursor.description else None
        return row and row[0]

    return run


def submit(ledger: Callers, job_id: str, **changes: Any) -> None:
    job = {"id": job_id, "type": "probe", "docker_image": IMAGE, "entrypoint": "true", "files": []}
    assert ledger.call("submit_job", job={**job, **changes})[0]["outcome"] == "new"


def flow_run_for(ledger: Callers, job_id: str, attempt: int = 1) -> uuid.UUID:
    run = uuid.uuid4()
    answer = ledger.call("record_flow_run", for_job=job_id, for_attempt=attempt, flow_run=run)
    assert answer == [{"outcome": "recorded"}]
    return run


def buy(ledger: Callers, worker: str = "pod-1", **changes: Any) -> None:
    pod = {"id": worker, **POD, **changes}
    arguments = {"bootstrap_hash": bootstrap_hash(worker), "ttl_seconds": 3600, "max_pods": 20}
    assert ledger.call("intend_pod", pod=pod, **arguments)[0]["outcome"] == "intended"


def boot(ledger: Callers, worker: str = "pod-1", **arguments: Any) -> uuid.UUID:
    process = uuid.uuid4()
    ledger.call("register_pod", for_worker=worker, as_boot=process, lease_seconds=60, models=[], **arguments)
    return process


def run_on(ledger: Callers, worker: str, process: uuid.UUID, job_id: str, result: str) -> None:
    submit(ledger, job_id)
    run = flow_run_for(ledger, job_id)
    opened = ledger.call("open_run", for_run=run, for_worker=worker, as_boot=process)[0]
    assert opened["outcome"] == "opened", opened
    ledger.call("finish_run", for_run=run, as_boot=process, result=result, why="x")


def snapshot(ledger: Callers, **arguments: Any) -> Row:
    return ledger.call("control_snapshot", **arguments)[0]


def order(ledger: Callers, **arguments: Any) -> list[str]:
    return [row["job_id"] for row in snapshot(ledger, **arguments)["waiting"]]


def pod(ledger: Callers, worker: str = "pod-1") -> Row:
    return next(row for row in ledger.call("list_workers") if row["id"] == worker)


def job(ledger: Callers, job_id: str) -> Row:
    return ledger.call("get_job", job_id=job_id)[0]


def as_user(ledger: Callers, user: str) -> Any:
    claims = LocalIdentity(LOCAL_ORGANIZATION_ID).claims()
    return ledger.open_as({**claims, "sub": user})


# Who is served first ----------------------------------------------------------------------------


def test_users_take_turns_and_priority_goes_first(ledger: Callers, sql: Sql) -> None:
    """One user's many jobs do not stand before another's first; a higher priority stands before all."""
    for number in range(3):
        submit(ledger, f"many-{number}")
    submit(ledger, "other-1")
    submit(ledger, "urgent-1", priority=5)
    sql("update ledger.jobs set created_by = %s where id = 'other-1'", uuid.uuid4())
    assert order(ledger) == ["urgent-1", "other-1", "many-0", "many-1", "many-2"]


def test_running_jobs_count_as_a_users_turn(ledger: Callers, sql: Sql) -> None:
    """Who has a job running waits for those who have none."""
    buy(ledger)
    process = boot(ledger)
    submit(ledger, "busy-1")
    run = flow_run_for(ledger, "busy-1")
    ledger.call("open_run", for_run=run, for_worker="pod-1", as_boot=process)
    submit(ledger, "busy-2")
    submit(ledger, "patient-1")
    sql("update ledger.jobs set created_by = %s where id = 'patient-1'", uuid.uuid4())
    assert order(ledger) == ["patient-1", "busy-2"]


def test_a_kind_of_need_that_waits_does_not_hide_the_others(ledger: Callers) -> None:
    """Of many jobs that nothing can run now only the first ten come before those of another kind."""
    for number in range(15):
        submit(ledger, f"huge-{number:02}", requires_vram_gb=900)
    submit(ledger, "small-1", requires_vram_gb=10)
    found = snapshot(ledger, max_waiting=11)
    assert "small-1" in [row["job_id"] for row in found["waiting"]]
    assert len(found["waiting"]) == 11
    assert found["waiting_total"] == 16


# What fits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "fits"),
    [
        ({}, True),
        ({"requires_vram_gb": 20}, False),
        ({"allowed_hardware": ["1x L4"], "requires_vram_gb": 900}, True),
        ({"allowed_hardware": ["2x L4"]}, False),
        ({"max_price_per_hour": 0.49}, False),
        ({"cloud": "SECURE"}, True),
        ({"cloud": "COMMUNITY"}, False),
        ({"min_cuda": "12.4"}, True),
        ({"min_cuda": "12.11"}, False),
        ({"min_vcpu": 8, "min_ram_gb": 32}, True),
        ({"min_vcpu": 9}, False),
        ({"min_ram_gb": 33}, False),
        ({"docker_image": "other/image"}, False),
    ],
)
def test_what_fits(ledger: Callers, wish: dict[str, Any], fits: bool) -> None:
    """One function of the ledger decides; the snapshot names the pods, and the gate agrees."""
    submit(ledger, "probe-1", **wish)
    run = flow_run_for(ledger, "probe-1")
    buy(ledger, cuda="12.8", vcpu=8, ram_gb=32)
    process = boot(ledger)
    found = snapshot(ledger)
    [row] = found["waiting"]
    assert found["fitting"].get(row["needs_class"], []) == (["pod-1"] if fits else [])
    opened = ledger.call("open_run", for_run=run, for_worker="pod-1", as_boot=process)[0]
    assert opened["outcome"] == ("opened" if fits else "refused")


def test_a_pod_takes_by_itself_no_run_that_it_is_too_dear_for(ledger: Callers) -> None:
    """Until somebody says that nothing cheaper is to be had."""
    submit(ledger, "probe-1")
    run = uuid.uuid4()
    ledger.call("record_flow_run", for_job="probe-1", for_attempt=1, flow_run=run, ceiling=0.49)
    assert snapshot(ledger)["waiting"][0]["ceiling_per_hour"] == 0.49
    buy(ledger)
    process = boot(ledger)
    arguments = {"for_worker": "pod-1", "as_boot": process, "lease_seconds": 60, "models": []}
    assert ledger.call("renew_lease", **arguments)[0]["next_run"] is None
    ledger.call("set_ceilings", ceilings={str(run): None})
    assert ledger.call("renew_lease", **arguments)[0]["next_run"] == str(run)


def test_the_machine_replaces_what_was_asked_for(ledger: Callers) -> None:
    """What the provider tells of the machine counts from then on."""
    buy(ledger, cuda="12.8")
    details = {"host": "6441abcd", "cuda": "13.0", "vcpu": 16, "ram_gb": 64}
    ledger.call("record_pod", for_worker="pod-1", provider_id="abc", price=0.5, details=details)
    held = pod(ledger)
    assert {name: held[name] for name in details} == details
    ledger.call("record_pod", for_worker="pod-1", provider_id="abc", price=0.5)
    assert pod(ledger)["host"] == "6441abcd"


# Who is to blame --------------------------------------------------------------------------------


def test_five_failures_in_a_row_retire_a_pod_while_others_succeed(ledger: Callers) -> None:
    """The pod gets no further run, and says why; a pod that fails as everybody does goes on."""
    for worker in ("pod-1", "pod-2"):
        buy(ledger, worker)
    bad, good = boot(ledger, "pod-1"), boot(ledger, "pod-2")
    for number in range(4):
        run_on(ledger, "pod-1", bad, f"bad-{number}", "failed")
    run_on(ledger, "pod-2", good, "good-1", "completed")
    assert pod(ledger)["status"] == "active"
    run_on(ledger, "pod-1", bad, "bad-4", "failed")
    assert (pod(ledger)["status"], pod(ledger)["reason"]) == ("draining", "five failed runs in a row")


def test_failures_without_a_success_elsewhere_blame_no_pod(ledger: Callers) -> None:
    buy(ledger)
    process = boot(ledger)
    for number in range(6):
        run_on(ledger, "pod-1", process, f"bad-{number}", "failed")
    assert pod(ledger)["status"] == "active"


def test_one_bad_job_blames_no_pod(ledger: Callers) -> None:
    """A job that fails on each of its attempts is itself the reason."""
    for worker in ("pod-1", "pod-2"):
        buy(ledger, worker)
    process, other = boot(ledger, "pod-1"), boot(ledger, "pod-2")
    submit(ledger, "bad-1", retries=6)
    for attempt in range(1, 7):
        run = flow_run_for(ledger, "bad-1", attempt)
        ledger.call("open_run", for_run=run, for_worker="pod-1", as_boot=process)
        ledger.call("finish_run", for_run=run, as_boot=process, result="failed", why="x")
        if attempt == 2:
            run_on(ledger, "pod-2", other, "good-1", "completed")
    assert pod(ledger)["status"] == "active"


def test_an_agent_that_restarts_again_and_again_loses_its_pod(ledger: Callers) -> None:
    buy(ledger)
    for _ in range(5):
        boot(ledger)
        assert pod(ledger)["status"] == "active"
    boot(ledger)
    assert pod(ledger)["status"] == "lost"
    assert "restarted 5 times" in pod(ledger)["reason"]


def test_a_pod_may_reject_its_machine(ledger: Callers) -> None:
    """Before it has taken the lease or after; what it runs is given to another pod."""
    buy(ledger)
    assert ledger.call("reject_pod", for_worker="pod-1", why="1 of 2 GPUs")[0]["outcome"] == "rejected"
    assert pod(ledger)["reason"] == "unusable host: 1 of 2 GPUs"
    buy(ledger, "pod-2")
    process = boot(ledger, "pod-2")
    submit(ledger, "probe-1")
    run = flow_run_for(ledger, "probe-1")
    ledger.call("open_run", for_run=run, for_worker="pod-2", as_boot=process)
    ledger.call("reject_pod", for_worker="pod-2", why="ECC errors")
    assert (job(ledger, "probe-1")["status"], job(ledger, "probe-1")["attempt"]) == ("pending", 2)


def test_three_pods_that_never_reported_fail_the_job_that_they_were_for(ledger: Callers) -> None:
    """Neither a pod that took work nor one that was given up for its host counts."""
    submit(ledger, "probe-1")
    flow_run_for(ledger, "probe-1")
    for number, counts in enumerate([True, False, True]):
        buy(ledger, f"pod-{number}", bought_for="probe-1")
        ledger.call("lose_pod", for_worker=f"pod-{number}", why="no machine", counts=counts)
    buy(ledger, "pod-8", bought_for="probe-1")
    boot(ledger, "pod-8")
    ledger.call("lose_pod", for_worker="pod-8", why="gone")
    assert job(ledger, "probe-1")["status"] == "pending"
    buy(ledger, "pod-9", bought_for="probe-1")
    ledger.call("lose_pod", for_worker="pod-9", why="no machine")
    assert job(ledger, "probe-1")["status"] == "failed"
    assert job(ledger, "probe-1")["error"] == "Lost 3 pods in a row; the last one: no machine"


def test_a_job_that_can_never_run_fails_at_once(ledger: Callers) -> None:
    """Its waiting run fails with it and is shown so in Prefect; a running job is not touched."""
    submit(ledger, "probe-1")
    run = flow_run_for(ledger, "probe-1")
    assert ledger.call("fail_job", for_job="probe-1", why="no such image") == [{"outcome": "failed"}]
    assert job(ledger, "probe-1")["error"] == "no such image"
    assert snapshot(ledger)["unmirrored"] == [
        {"run_id": str(run), "job_id": "probe-1", "status": "failed", "error": "no such image"}
    ]
    assert ledger.call("fail_job", for_job="probe-1", why="again") == [{"outcome": "refused"}]


# Silence ----------------------------------------------------------------------------------------


def test_a_run_that_logs_keeps_its_pod(ledger: Callers, sql: Sql) -> None:
    """A lease that ran out is not enough while output comes; and only pods that were named are expired."""
    buy(ledger)
    process = boot(ledger)
    submit(ledger, "probe-1")
    run = flow_run_for(ledger, "probe-1")
    ledger.call("open_run", for_run=run, for_worker="pod-1", as_boot=process)
    ledger.call("append_log", for_run=run, as_boot=process, from_offset=0, to_offset=2, piece="x\n")
    sql("update ledger.worker set lease_expires_at = now() - interval '30 seconds', lease_seconds = 60")
    assert ledger.call("expire_leases") == []
    assert snapshot(ledger)["pods"][0]["silent_seconds"] < 0
    sql("update ledger.runs set logged_at = now() - interval '65 seconds'")
    assert 4 < snapshot(ledger)["pods"][0]["silent_seconds"] < 8
    assert ledger.call("expire_leases", silent=["pod-7"]) == []
    assert ledger.call("expire_leases", silent=["pod-1"]) == [{"worker_id": "pod-1"}]
    assert job(ledger, "probe-1")["status"] == "pending"


# Deadline and money -----------------------------------------------------------------------------


def test_a_deadline_is_moved_and_reserved_for(ledger: Callers) -> None:
    """By a person or by the pod itself; what it may cost is reserved, and a budget may forbid it."""
    buy(ledger)
    boot(ledger)
    assert ledger.call("get_budget")[0]["reserved_usd"] == pytest.approx(0.5, abs=0.01)
    answer = ledger.pod("pod-1").call("extend_pod", for_worker="pod-1", deadline_seconds=7200)[0]
    assert answer == {"outcome": "extended", "deadline_seconds": 7200}
    assert ledger.call("get_budget")[0]["reserved_usd"] == pytest.approx(1.0, abs=0.01)
    ledger.person.call("set_budget", limit_usd=1.2)
    answer = ledger.person.call("extend_pod", for_worker="pod-1", deadline_seconds=36000)[0]
    assert answer["outcome"] == "budget"
    assert 7000 < answer["deadline_seconds"] <= 7200
    assert (
        ledger.person.call("extend_pod", for_worker="pod-1", deadline_seconds=60)[0]["outcome"] == "extended"
    )
    assert ledger.call("get_budget")[0]["reserved_usd"] < 0.1
    with pytest.raises(InvalidRequestError, match="30 days"):
        ledger.person.call("extend_pod", for_worker="pod-1", deadline_seconds=1e9)


def test_a_pod_moves_no_deadline_but_its_own(ledger: Callers) -> None:
    for worker in ("pod-1", "pod-2"):
        buy(ledger, worker)
    boot(ledger, "pod-1")
    answer = ledger.pod("pod-1").call("extend_pod", for_worker="pod-2", deadline_seconds=60)
    assert answer == [{"outcome": "not_found"}]


def test_the_bill_begins_and_ends_where_the_provider_says(ledger: Callers, sql: Sql) -> None:
    """Intervals are the bill, not the life of a row; a wrong clock of the provider is bounded."""
    buy(ledger)
    sql(
        "update ledger.worker set created_at = now() - interval '100 seconds';"
        "update ledger.pod_intervals set started_at = now() - interval '100 seconds'"
    )
    began = (datetime.now(UTC) - timedelta(seconds=90)).isoformat()
    ledger.call("record_pod", for_worker="pod-1", provider_id="abc", price=3.6, details={"created_at": began})
    boot(ledger)
    sql("update ledger.worker set heartbeat_at = now() - interval '40 seconds'")
    ledger.call("lose_pod", for_worker="pod-1", why="x")
    ledger.call("end_pod", for_worker="pod-1", why="x", billed_seconds_ago=30)
    spent = "select sum(extract(epoch from ended_at - started_at)) from ledger.pod_intervals"
    assert float(sql(spent)) == pytest.approx(60, abs=2)
    buy(ledger, "pod-3")
    ledger.call("record_pod", for_worker="pod-3", provider_id="ghi", price=1)
    boot(ledger, "pod-3")
    ledger.call("end_pod", for_worker="pod-3", why="x", billed_seconds_ago=600)
    alive = "select max(ended_at) from ledger.pod_intervals where worker_id = 'pod-3'"
    assert datetime.now(UTC) - sql(alive) < timedelta(seconds=30), "its heartbeat was seen later"
    skewed = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    buy(ledger, "pod-2")
    ledger.call("record_pod", for_worker="pod-2", provider_id="def", price=1, details={"created_at": skewed})
    assert sql("select count(*) from ledger.pod_intervals where started_at > now()") == 0


def test_a_pod_that_was_given_up_and_exists_is_back_on_the_bill(ledger: Callers) -> None:
    buy(ledger)
    ledger.call("end_pod", for_worker="pod-1", why="never created")
    [known] = ledger.call("known_pods", worker_ids=["pod-1", "pod-2"])
    assert known.pop("age_seconds") < 60
    assert known == {
        "worker_id": "pod-1",
        "pod_id": None,
        "status": "terminated",
        "docker_image": IMAGE,
    }
    answer = ledger.call("record_pod", for_worker="pod-1", provider_id="abc", price=1.0)
    assert answer == [{"outcome": "recorded"}]
    assert (pod(ledger)["status"], pod(ledger)["pod_id"]) == ("lost", "abc")
    ledger.call("end_pod", for_worker="pod-1", why="ended")
    assert ledger.call("record_pod", for_worker="pod-1", provider_id="abc", price=1.0) == [
        {"outcome": "refused"}
    ]


def test_a_second_pod_of_one_create_is_on_the_bill(ledger: Callers, sql: Sql) -> None:
    buy(ledger)
    ledger.call("record_pod", for_worker="pod-1", provider_id="abc", price=1.0)
    for _ in range(2):  # The first answer was lost.
        ledger.call("record_duplicate", for_worker="pod-1", provider_id="def", price=2.0, seconds=36)
    cost = "select sum(private.cost_usd(i)) from ledger.pod_intervals i where kind = 'teardown'"
    assert float(sql(cost)) == pytest.approx(0.02)


def test_the_pod_that_works_is_the_one_that_registered(ledger: Callers, sql: Sql) -> None:
    """The answer to the create named its twin, which is on the bill as well."""
    buy(ledger)
    ledger.call("record_pod", for_worker="pod-1", provider_id="abc", price=1.0)
    boot(ledger, provider_id="def")
    assert pod(ledger)["pod_id"] == "def"
    boot(ledger, provider_id="def")
    boot(ledger)  # An older release does not say it.
    assert pod(ledger)["pod_id"] == "def"
    [twin] = sql("select array_agg(duplicate) from ledger.pod_intervals where duplicate is not null")
    assert twin == "abc"
    assert ledger.call("record_pod", for_worker="pod-1", provider_id="abc", price=1.0) == [
        {"outcome": "refused"}
    ]


# Refusals and the proxy -------------------------------------------------------------------------


def test_refusals_are_counted_until_something_is_sold(ledger: Callers) -> None:
    """They last, also beyond their time, because the next one is longer."""
    for _ in range(2):
        ledger.call("note_refusal", subject="L4|1|SECURE", why="no capacity", seconds=15)
    ledger.call("note_refusal", subject="host:6441abcd", why="bad", seconds=0)
    found = snapshot(ledger)["refusals"]
    assert found["L4|1|SECURE"]["failures"] == 2
    assert 10 < found["L4|1|SECURE"]["seconds_left"] <= 15
    assert found["host:6441abcd"]["seconds_left"] < 0
    ledger.call("clear_refusal", subject="L4|1|SECURE")
    assert set(snapshot(ledger)["refusals"]) == {"host:6441abcd"}


def test_the_proxy_finds_a_pod_by_what_it_shows(ledger: Callers) -> None:
    """With the runs that it holds, until it has ended."""
    buy(ledger)
    shown = hash_secret("owx_secret")
    process = boot(ledger, proxy_hash=shown)
    submit(ledger, "probe-1")
    run = flow_run_for(ledger, "probe-1")
    assert ledger.call("pod_of_proxy", hash=shown)[0]["run_ids"] == []
    ledger.call("open_run", for_run=run, for_worker="pod-1", as_boot=process)
    [found] = ledger.call("pod_of_proxy", hash=shown)
    assert (found["worker_id"], found["run_ids"]) == ("pod-1", [str(run)])
    assert ledger.call("pod_of_proxy", hash=hash_secret("owx_other")) == []
    ledger.call("lose_pod", for_worker="pod-1", why="x")
    assert ledger.call("pod_of_proxy", hash=shown) == []
    assert "proxy_hash" not in pod(ledger)
