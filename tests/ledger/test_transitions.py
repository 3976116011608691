"""Every transition of jobs, runs and pods: who may make it, and what a stale or repeated call does."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from openweights_prefect.errors import InvalidRequestError
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.identity import LocalIdentity
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from openweights_prefect.stack.databases import create_organization
from tests.callers import Callers, bootstrap_hash

IMAGE = "openweights/test:latest"
POD = {"docker_image": IMAGE, "hardware": "1x L4", "gpu_type": "NVIDIA L4", "gpu_count": 1, "vram_gb": 19,
       "cloud": "SECURE", "price_per_hour": 0.4}  # fmt: skip


def a_job(job_id: str = "probe-1", **changes: Any) -> dict[str, Any]:
    return {
        "id": job_id,
        "type": "probe",
        "docker_image": IMAGE,
        "entrypoint": "true",
        "files": [],
        **changes,
    }


def submit(ledger: Ledger, job: dict[str, Any] | None = None) -> dict[str, Any]:
    return ledger.call("submit_job", job=job or a_job())[0]


def flow_run_for(ledger: Callers, job_id: str, attempt: int = 1) -> uuid.UUID:
    flow_run = uuid.uuid4()
    answer = ledger.call("record_flow_run", for_job=job_id, for_attempt=attempt, flow_run=flow_run)
    assert answer[0]["outcome"] == "recorded"
    return flow_run


def buy(ledger: Ledger, worker_id: str = "pod-1", *, limit: int = 8) -> str:
    return str(
        ledger.call(
            "intend_pod",
            pod={"id": worker_id, **POD},
            bootstrap_hash=bootstrap_hash(worker_id),
            ttl_seconds=3600,
            max_pods=limit,
        )[0]["outcome"]
    )


def boot(ledger: Callers, worker_id: str = "pod-1", *, lease_seconds: int = 60) -> uuid.UUID:
    process = uuid.uuid4()
    answer = ledger.call("register_pod", for_worker=worker_id, as_boot=process,
                         lease_seconds=lease_seconds, models=[])  # fmt: skip
    assert answer[0]["outcome"] == "registered"
    return process


def renew(ledger: Callers, process: uuid.UUID, worker_id: str = "pod-1") -> dict[str, Any]:
    return ledger.call("renew_lease", for_worker=worker_id, as_boot=process, lease_seconds=60, models=[])[0]


def open_run(ledger: Callers, run: uuid.UUID, process: uuid.UUID, worker_id: str = "pod-1") -> dict[str, Any]:
    return ledger.call("open_run", for_run=run, for_worker=worker_id, as_boot=process)[0]


def finish(
    ledger: Callers, run: uuid.UUID, process: uuid.UUID, result: str, why: str | None = None
) -> dict[str, Any]:
    return ledger.call("finish_run", for_run=run, as_boot=process, result=result, why=why)[0]


def job(ledger: Callers, job_id: str = "probe-1") -> dict[str, Any]:
    return ledger.call("get_job", job_id=job_id)[0]


@pytest.fixture
def running(ledger: Callers) -> tuple[uuid.UUID, uuid.UUID]:
    """A job that runs on a pod: its run and the pod's boot."""
    submit(ledger)
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger)
    assert open_run(ledger, run, process)["outcome"] == "opened"
    return run, process


def test_64_concurrent_submits_make_one_job(ledger_url: str) -> None:
    """Whoever submits, there is one row; exactly one caller is told that it is new."""
    ledger = PostgresLedger(ledger_url, identity=LocalIdentity(LOCAL_ORGANIZATION_ID), connections=16)
    with ThreadPoolExecutor(64) as pool:
        outcomes = list(pool.map(lambda _: submit(ledger)["outcome"], range(64)))
    assert sorted(outcomes) == ["joined"] * 63 + ["new"]
    assert len(ledger.call("list_jobs")) == 1
    ledger.close()


def test_missing_files_are_named_and_nothing_is_stored(ledger: Callers) -> None:
    answer = submit(ledger, a_job(files=["conversations:file-aaaaaaaaaaaa"]))
    assert answer == {"outcome": "missing_files", "missing": ["conversations:file-aaaaaaaaaaaa"]}
    assert ledger.call("list_jobs") == []


def test_a_run_is_opened_by_one_pod_only(ledger: Callers) -> None:
    """Eight pods race for one run: one opens it."""
    submit(ledger)
    run = flow_run_for(ledger, "probe-1")
    pods = {f"pod-{number}": None for number in range(8)}
    boots = {pod: (buy(ledger, pod), boot(ledger, pod))[1] for pod in pods}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pod: open_run(ledger, run, boots[pod], pod)["outcome"], pods))
    assert sorted(answers) == ["opened"] + ["refused"] * 7


def test_open_run_repeated_by_the_same_boot_is_not_a_second_opening(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    """The answer of the first call may have been lost on the way."""
    run, process = running
    assert open_run(ledger, run, process)["outcome"] == "opened"
    assert len(ledger.call("list_runs", for_job="probe-1")) == 1


def test_events_are_stored_once_and_in_order_whatever_is_repeated(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    run, process = running
    batch = [{"at": 1.0, "data": {"n": number}} for number in range(5)]
    for first, last in ((0, 2), (0, 3), (2, 5), (0, 5)):
        ledger.call(
            "append_events", for_run=run, as_boot=process, first_sequence=first, batch=batch[first:last]
        )
    assert [event["data"]["n"] for event in ledger.call("list_events", for_job="probe-1")] == [0, 1, 2, 3, 4]


def test_a_gap_in_the_events_is_refused(ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]) -> None:
    run, process = running
    answer = ledger.call(
        "append_events", for_run=run, as_boot=process, first_sequence=3, batch=[{"at": 1, "data": {}}]
    )
    assert answer[0] == {"outcome": "gap", "next_sequence": 0}


def test_a_lost_pod_changes_nothing_any_more(ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]) -> None:
    """After the lease was given away, events, logs and the end of the stale holder are refused."""
    run, process = running
    ledger.call("lose_pod", for_worker="pod-1", why="silent")
    batch = [{"at": 1, "data": {"stale": True}}]
    stored = ledger.call("append_events", for_run=run, as_boot=process, first_sequence=0, batch=batch)
    logged = ledger.call("append_log", for_run=run, as_boot=process, from_offset=0, to_offset=1, piece="x")
    assert [stored[0]["outcome"], logged[0]["outcome"]] == ["stale", "stale"]
    assert finish(ledger, run, process, "completed")["outcome"] == "stale"
    assert renew(ledger, process) == {"fenced": True}
    assert (job(ledger)["status"], job(ledger)["attempt"]) == ("pending", 2)


def test_an_expired_lease_gives_the_job_back(ledger: Callers) -> None:
    submit(ledger)
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger, lease_seconds=60)
    open_run(ledger, run, process)
    ledger.call("renew_lease", for_worker="pod-1", as_boot=process, lease_seconds=-1, models=[])
    assert [row["worker_id"] for row in ledger.call("expire_leases")] == ["pod-1"]
    assert [worker["status"] for worker in ledger.call("list_workers")] == ["lost"]
    assert job(ledger)["status"] == "pending"


def test_three_lost_pods_in_a_row_fail_the_job(ledger: Callers) -> None:
    submit(ledger)
    for attempt in (1, 2, 3):
        run = flow_run_for(ledger, "probe-1", attempt)
        buy(ledger, f"pod-{attempt}")
        process = boot(ledger, f"pod-{attempt}")
        open_run(ledger, run, process, f"pod-{attempt}")
        ledger.call("lose_pod", for_worker=f"pod-{attempt}", why="host gone")
    assert job(ledger)["status"] == "failed"
    assert "Lost 3 pods in a row" in job(ledger)["error"]


def test_a_restarted_agent_gives_its_run_back_at_once(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    """A new process of the same pod registers: what the old one held is lost, the pod is usable."""
    boot(ledger)
    assert (job(ledger)["status"], job(ledger)["attempt"]) == ("pending", 2)
    assert ledger.call("list_workers")[0]["status"] == "active"


def test_users_failures_and_lost_pods_have_separate_budgets(ledger: Callers) -> None:
    submit(ledger, a_job(retries=1))
    buy(ledger)
    process = boot(ledger)
    open_run(ledger, flow_run_for(ledger, "probe-1"), process)
    run = uuid.UUID(ledger.call("list_runs", for_job="probe-1")[0]["id"])
    finish(ledger, run, process, "lost", "flow process died")
    open_run(ledger, second := flow_run_for(ledger, "probe-1", 2), process)
    finish(ledger, second, process, "failed", "exit code 1")
    assert (job(ledger)["status"], job(ledger)["attempt"]) == ("pending", 3)
    open_run(ledger, third := flow_run_for(ledger, "probe-1", 3), process)
    finish(ledger, third, process, "failed", "exit code 2")
    assert (job(ledger)["status"], job(ledger)["error"]) == ("failed", "exit code 2")


def test_outputs_are_the_newest_non_null_values_of_the_run(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    run, process = running
    batch = [{"at": 1, "data": data} for data in ({"loss": 3, "lr": 1}, {"loss": 2, "lr": None}, {"loss": 1})]
    ledger.call("append_events", for_run=run, as_boot=process, first_sequence=0, batch=batch)
    finish(ledger, run, process, "completed")
    assert job(ledger)["outputs"] == {"loss": 1, "lr": 1}


def test_cancel_of_a_waiting_job_is_immediate_and_its_run_never_opens(ledger: Callers) -> None:
    submit(ledger)
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger)
    assert ledger.call("cancel_job", job_id="probe-1")[0]["outcome"] == "canceled"
    assert open_run(ledger, run, process)["outcome"] == "refused"


def test_cancel_of_a_running_job_reaches_its_pod(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    run, process = running
    assert ledger.call("cancel_job", job_id="probe-1")[0]["outcome"] == "canceling"
    assert renew(ledger, process)["cancel"] is True
    finish(ledger, run, process, "canceled")
    assert job(ledger)["status"] == "canceled"


def test_a_canceled_job_that_loses_its_pod_is_canceled(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    ledger.call("cancel_job", job_id="probe-1")
    ledger.call("lose_pod", for_worker="pod-1", why="gone")
    assert job(ledger)["status"] == "canceled"


@pytest.mark.parametrize(("status", "outcome"), [("completed", "refused"), ("failed", "reset")])
def test_restart_is_for_failed_and_canceled_jobs(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID], status: str, outcome: str
) -> None:
    run, process = running
    assert ledger.call("restart_job", job_id="probe-1")[0]["outcome"] == "refused"
    finish(ledger, run, process, status)
    assert ledger.call("restart_job", job_id="probe-1")[0]["outcome"] == outcome


def test_an_end_that_is_reported_twice_is_one_end(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    """The answer to the first report may have been lost on the way."""
    run, process = running
    assert finish(ledger, run, process, "completed")["outcome"] == "finished"
    assert finish(ledger, run, process, "completed")["outcome"] == "finished"
    assert finish(ledger, run, process, "failed", "too late")["outcome"] == "stale"
    assert job(ledger)["status"] == "completed"


def test_only_jobs_of_ours_are_restarted(ledger: Callers) -> None:
    """A flow of a user's own and a script are started again by who started them."""
    submit(ledger, a_job("flow-1", type="flow", entrypoint=None))
    ledger.call("cancel_job", job_id="flow-1")
    assert ledger.call("restart_job", job_id="flow-1")[0]["outcome"] == "refused"


def test_submitting_a_failed_job_again_resets_it(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    run, process = running
    finish(ledger, run, process, "failed", "no luck")
    answer = submit(ledger)
    assert answer["outcome"] == "reset"
    assert {name: answer["job"][name] for name in ("status", "attempt", "error")} == {
        "status": "pending",
        "attempt": 2,
        "error": None,
    }


def stored_file(ledger: Callers, name: str) -> str:
    row = {"id": f"mount:file-{name}", "purpose": "mount", "filename": "f", "bytes": 1, "sha256": "0" * 64}
    return str(ledger.call("register_file", file=row)[0]["id"])


@pytest.mark.parametrize("end", ["failed", "canceled"])
def test_a_job_whose_files_were_deleted_is_not_run_again(ledger: Callers, end: str) -> None:
    """A second submit and a restart name the missing file and change nothing; with the file they reset."""
    kept, gone = stored_file(ledger, "aaaaaaaaaaaa"), stored_file(ledger, "bbbbbbbbbbbb")
    wanted = a_job(files=[kept, gone])
    assert submit(ledger, wanted)["outcome"] == "new"
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger)
    assert open_run(ledger, run, process)["outcome"] == "opened"
    assert ledger.call("delete_file", file_id=gone)[0]["outcome"] == "in_use"
    finish(ledger, run, process, end)
    assert ledger.call("delete_file", file_id=gone)[0]["outcome"] == "deleted"
    before = job(ledger)
    missing = {"outcome": "missing_files", "missing": [gone]}
    assert submit(ledger, wanted) == missing
    assert ledger.call("restart_job", job_id="probe-1") == [missing]
    assert job(ledger) == before
    stored_file(ledger, "bbbbbbbbbbbb")
    assert submit(ledger, wanted)["outcome"] == "reset"
    assert (job(ledger)["status"], job(ledger)["attempt"]) == ("pending", 2)


def test_deleted_files_do_not_bring_a_completed_job_back(
    ledger: Callers, running: tuple[uuid.UUID, uuid.UUID]
) -> None:
    """It is answered with its result: nothing has to be read for that."""
    finish(ledger, *running, "completed")
    assert submit(ledger, a_job(files=["mount:file-cccccccccccc"]))["outcome"] == "completed"


def test_a_pod_without_a_hint_finds_waiting_work_by_itself(ledger: Callers) -> None:
    """A lost hint costs one heartbeat, never a run."""
    submit(ledger)
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger)
    assert renew(ledger, process)["next_run"] == str(run)


@pytest.mark.parametrize(
    "needs",
    [
        {"requires_vram_gb": 20},
        {"allowed_hardware": ["1x A100"]},
        {"max_price_per_hour": 0.3},
        {"docker_image": "other"},
    ],
)
def test_a_pod_never_opens_what_does_not_fit(ledger: Callers, needs: dict[str, Any]) -> None:
    submit(ledger, a_job(**needs))
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger)
    assert renew(ledger, process)["next_run"] is None
    assert open_run(ledger, run, process) == {"outcome": "refused", "reason": "the pod does not fit"}


def test_the_pod_limit_holds_under_concurrency(ledger_url: str) -> None:
    ledger = PostgresLedger(
        ledger_url, identity=LocalIdentity(LOCAL_ORGANIZATION_ID, "ow_worker"), connections=12
    )
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda number: buy(ledger, f"pod-{number}", limit=3), range(12)))
    assert sorted(answers) == ["intended"] * 3 + ["limit"] * 9
    ledger.close()


def test_a_pod_with_a_fresh_hint_may_not_end(ledger: Callers) -> None:
    submit(ledger)
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger)
    ledger.call("hint_runs", hints={str(run): "pod-1"})
    assert (
        ledger.call("release_pod", for_worker="pod-1", as_boot=process, why="idle")[0]["outcome"] == "refused"
    )


def test_a_pod_is_lost_and_ended_once(ledger: Callers) -> None:
    """Repeating either, or asking for an unknown pod, changes nothing and says so."""
    buy(ledger)
    boot(ledger)

    def outcome(function: str, pod: str = "pod-1") -> str:
        why = {} if function == "request_shutdown" else {"why": "test"}
        return str(ledger.call(function, for_worker=pod, **why)[0]["outcome"])

    assert [outcome("lose_pod"), outcome("lose_pod"), outcome("lose_pod", "pod-x")] == [
        "lost",
        "refused",
        "refused",
    ]
    assert [outcome("end_pod"), outcome("end_pod")] == ["terminated", "refused"]
    assert [outcome("request_shutdown"), outcome("request_shutdown", "pod-x")] == ["not_found", "not_found"]


def test_a_pod_that_is_to_end_takes_no_run(ledger: Callers) -> None:
    """It finishes what it has; the next heartbeat tells it, and nothing is opened on it any more."""
    submit(ledger)
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger)
    assert ledger.call("request_shutdown", for_worker="pod-1")[0]["outcome"] == "requested"
    answer = renew(ledger, process)
    assert (answer["shutdown"], answer["next_run"]) == (True, None)
    assert open_run(ledger, run, process)["outcome"] == "refused"


def test_a_pod_is_nobody_but_itself(ledger: Callers) -> None:
    buy(ledger)
    buy(ledger, "pod-2")
    answer = ledger.pod("pod-2").call(
        "register_pod", for_worker="pod-1", as_boot=uuid.uuid4(), lease_seconds=9, models=[]
    )
    assert answer == [{"outcome": "refused"}]


def test_a_flow_run_of_somebody_else_is_adopted_once(ledger: Callers) -> None:
    """The first one becomes the attempt, a second one follows it, and after the end both are answered."""
    first, second = uuid.uuid4(), uuid.uuid4()
    created = datetime.now(UTC).isoformat()

    def adopt(flow_run: uuid.UUID) -> str:
        return str(
            ledger.call("adopt_flow_run", job=a_job(), flow_run=flow_run, created=created)[0]["outcome"]
        )

    assert [adopt(first), adopt(second)] == ["adopted", "following"]
    buy(ledger)
    process = boot(ledger)
    open_run(ledger, first, process)
    finish(ledger, first, process, "completed")
    assert adopt(second) == "completed"


def test_a_follower_shares_the_failure_but_a_later_flow_run_tries_again(ledger: Callers) -> None:
    submit(ledger)
    run = flow_run_for(ledger, "probe-1")
    buy(ledger)
    process = boot(ledger)
    open_run(ledger, run, process)
    finish(ledger, run, process, "failed", "no luck")
    now = datetime.now(UTC)
    for created, outcome in ((now - timedelta(minutes=1), "failed"), (now + timedelta(minutes=1), "adopted")):
        answer = ledger.call(
            "adopt_flow_run", job=a_job(), flow_run=uuid.uuid4(), created=created.isoformat()
        )
        assert answer[0]["outcome"] == outcome


def test_one_organization_sees_nothing_of_another(ledger: Callers, ledger_url: str) -> None:
    submit(ledger)
    theirs = str(uuid.uuid4())
    create_organization(ledger_url, theirs)
    stranger = Callers(ledger_url, theirs)
    assert stranger.call("list_jobs") == []
    assert stranger.call("cancel_job", job_id="probe-1") == [{"outcome": "not_found"}]
    assert job(ledger)["status"] == "pending"
    stranger.close()


def test_without_a_role_nothing_is_allowed(ledger_url: str) -> None:
    """Forgetting to take the caller's role fails closed."""
    with psycopg.connect(ledger_url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("select * from public.list_jobs()")


def test_every_table_has_forced_row_level_security(postgres: EmbeddedPostgres, ledger_url: str) -> None:
    url = ledger_url.replace("authenticator@", "postgres@")
    query = ("select relname from pg_class where relnamespace = 'ledger'::regnamespace and relkind = 'r' "
             "and not (relrowsecurity and relforcerowsecurity)")  # fmt: skip
    with psycopg.connect(url) as connection:
        assert connection.execute(query).fetchall() == []


def test_bad_arguments_are_a_clear_error(ledger: Callers) -> None:
    with pytest.raises(InvalidRequestError, match="get_run"):
        ledger.call("get_run", run_id="not-a-uuid")
