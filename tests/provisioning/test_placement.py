from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from openweights_prefect.provisioning.placement import Plan, Pod, WaitingRun, place
from openweights_prefect.types.hardware import Needs


def run(name: str, needs_class: str = "a", **changes: Any) -> WaitingRun:
    values: dict[str, Any] = {
        "job_id": name,
        "run_id": f"run of {name}",
        "attempt": 1,
        "model": None,
        "needs_class": needs_class,
        "needs": Needs(),
    }
    return WaitingRun(**{**values, **changes})


def pod(name: str, status: str = "active", **changes: Any) -> Pod:
    values: dict[str, Any] = {
        "id": name,
        "pod_id": f"provider {name}",
        "status": status,
        "docker_image": "image",
        "hardware": "1x L4",
        "price_per_hour": 1.0,
    }
    return Pod(**{**values, **changes})


def plan(waiting: list[WaitingRun], pods: list[Pod], max_workers: int = 4, **changes: Any) -> Plan:
    fitting = {"a": [each.id for each in pods if each.hardware == "1x L4"]}
    arguments: dict[str, Any] = {"fitting": fitting, "being_bought": 0, "max_workers": max_workers}
    return place(waiting, pods, **{**arguments, **changes})


def bought(decided: Plan) -> list[str]:
    return [each.job_id for each in decided.purchases]


def test_the_idle_pod_with_the_model_on_its_disk_is_taken_then_the_cheapest() -> None:
    pods = [pod("cheap", price_per_hour=0.5), pod("warm", price_per_hour=2, cached_models=("m",))]
    assert plan([run("1", model="m")], pods).hints == {"run of 1": "warm"}
    assert plan([run("1", model="other")], pods).hints == {"run of 1": "cheap"}


def test_starting_pods_are_counted_before_others_are_bought() -> None:
    """One for each run, the oldest first; the run says which pod it waits for."""
    pods = [pod("new", "starting", age_seconds=1), pod("old", "starting", age_seconds=9)]
    decided = plan([run("1"), run("2"), run("3")], pods)
    assert decided.reasons == {"1": "pod old (1x L4) is starting", "2": "pod new (1x L4) is starting"}
    assert bought(decided) == ["3"]


def test_what_is_being_bought_counts_against_the_limit() -> None:
    decided = plan([run("1"), run("2")], [pod("busy", "busy", run_id="x")], 3, being_bought=1)
    assert bought(decided) == ["1"]
    assert decided.reasons == {"2": "pod limit: all 3 pods of the organization are in use"}


def test_a_run_that_was_hinted_just_now_keeps_its_pod() -> None:
    """Neither is the pod given to another run, nor another pod to the run."""
    hinted = run("1", hinted_worker_id="idle", hinted_seconds_ago=2.0)
    decided = plan([hinted, run("2")], [pod("idle"), pod("other")])
    assert decided.hints == {"run of 2": "other"}
    old = run("1", hinted_worker_id="idle", hinted_seconds_ago=11.0)
    assert plan([old], [pod("idle")]).hints == {"run of 1": "idle"}


def test_nothing_is_done_for_a_run_that_prefect_does_not_know_yet() -> None:
    decided = plan([run("1", run_id=None)], [pod("idle")])
    assert decided == Plan()


def test_a_pod_that_was_told_to_end_gets_nothing() -> None:
    decided = plan([run("1")], [pod("ending", shutdown_requested=True)])
    assert decided.hints == {}
    assert bought(decided) == ["1"]


def test_at_the_limit_a_pod_that_nothing_can_use_makes_room() -> None:
    """The dearest first, one for each run that waits; what something waiting could use is kept."""
    small = [pod("s1", hardware="1x A40", price_per_hour=0.5), pod("s2", hardware="1x A40", price_per_hour=3)]
    decided = plan([run("1")], small, 2)
    assert decided.retire == ["s2"]
    assert decided.reasons["1"].startswith("pod limit")
    useful = plan([run("1"), run("2", "b")], small, 2, fitting={"b": ["s1", "s2"]})
    assert useful.retire == []


def test_a_warm_pod_that_costs_too_much_is_not_taken() -> None:
    """A cheaper one is bought, and at the limit the dear one makes room for it."""
    dear = [pod("dear", price_per_hour=9)]
    cheap_job = run("1", ceiling_per_hour=2.0)
    assert bought(plan([cheap_job], dear)) == ["1"]
    assert plan([cheap_job], dear, 1).retire == ["dear"]
    assert plan([cheap_job, run("2")], dear, 1).hints == {"run of 2": "dear"}


def test_a_job_that_nothing_could_be_bought_for_leaves_its_place_to_the_next() -> None:
    decided = plan([run("1"), run("2")], [], 1, later={"1"})
    assert bought(decided) == ["2"]
    assert decided.reasons == {}
    assert plan([run("1")], [pod("idle")], later={"1"}).hints == {"run of 1": "idle"}


def test_while_purchases_are_paused_idle_pods_go_on_working() -> None:
    decided = plan([run("1"), run("2")], [pod("idle")], paused="no funds")
    assert decided.hints == {"run of 1": "idle"}
    assert decided.reasons == {"2": "no funds"}
    assert decided.purchases == []


def test_a_need_that_nothing_meets_does_not_block_what_comes_after_it() -> None:
    decided = plan([run("huge", "b"), run("small", "a")], [pod("idle")], 1)
    assert decided.hints == {"run of small": "idle"}


_PODS = st.lists(
    st.tuples(
        st.sampled_from(["starting", "active", "busy", "draining", "lost"]),
        st.booleans(),
        st.floats(0.1, 9),
    ),
    max_size=8,
)
_RUNS = st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=12)


@given(_PODS, _RUNS, st.integers(0, 9), st.integers(0, 3), st.data())
def test_whatever_there_is(
    drawn_pods: list[tuple[str, bool, float]],
    drawn_runs: list[tuple[str, bool, bool]],
    max_workers: int,
    being_bought: int,
    data: st.DataObject,
) -> None:
    """Each pod and run is used once, only what fits, within the limit; each run has an answer."""
    pods = [
        pod(f"p{number}", status, shutdown_requested=ending, price_per_hour=price)
        for number, (status, ending, price) in enumerate(drawn_pods)
    ]
    names = [each.id for each in pods if each.status in ("starting", "active")]
    fitting = {
        name: frozenset(data.draw(st.lists(st.sampled_from(names), unique=True)) if names else [])
        for name in "abc"
    }
    runs = [
        run(
            f"{number}",
            kind,
            run_id=f"run of {number}" if known else None,
            hinted_worker_id=names[0] if hinted and names else None,
            hinted_seconds_ago=1.0 if hinted and names else None,
        )
        for number, (kind, known, hinted) in enumerate(drawn_runs)
    ]
    decided = place(runs, pods, fitting=fitting, being_bought=being_bought, max_workers=max_workers)
    by_id = {each.id: each for each in pods}
    by_run = {each.run_id: each for each in runs}
    assert len(set(decided.hints.values())) == len(decided.hints)
    for run_id, worker in decided.hints.items():
        assert by_id[worker].is_idle
        assert worker in fitting[by_run[run_id].needs_class]
    assert len(pods) + being_bought + len(decided.purchases) <= max(max_workers, len(pods) + being_bought)
    assert not set(decided.retire) & set(decided.hints.values())
    assert all(by_id[worker].is_idle for worker in decided.retire)
    answered = (
        {by_run[run_id].job_id for run_id in decided.hints} | set(bought(decided)) | set(decided.reasons)
    )
    ready = {each.job_id for each in runs if each.run_id is not None and not each.freshly_hinted}
    assert answered == ready
