"""Random interleavings of everything that changes jobs, runs and pods, against a model of the ledger.

Two organizations use the same names at the same time. Each call goes over one of several connections and must
be answered as the model says; of calls that run at the same moment, some order must explain all answers.
After each step the tables must be those of the model, and invariants that do not know the model hold in SQL.

`OW_TEST_EXAMPLES` says how many sequences are tried; the suite's default takes seconds.
"""

from __future__ import annotations

import copy
import itertools
import os
from functools import partial
from random import Random
from typing import Any, ClassVar

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from openweights_prefect.errors import AuthenticationError, PermissionDeniedError
from tests.ledger.ledger_model import Call, Model, live_runs
from tests.ledger.ledger_moves import (
    JOBS,
    MEETINGS,
    OF_CONTROL,
    OF_PEOPLE,
    OF_PODS,
    OF_RUNS,
    PODS,
    Chooser,
    a_job,
    idle_pods,
    intended,
    newest_boot,
    open_jobs,
    opened,
    redeemed,
    registered,
    stored_file,
    waiting_readers,
)
from tests.ledger.ledger_mutants import MUTANTS, Mutant
from tests.ledger.ledger_world import Focus, Site, World

EXAMPLES = int(os.environ.get("OW_TEST_EXAMPLES", "32"))
STEPS = 30
CALLS = 5
REFUSALS = {"refused", "stale", "fenced", "shutdown", "abandoned"}
# One choice of Hypothesis for each step: what it leads to may depend on how threads meet.
SEEDS = st.integers(0, 2**32)
NUMBERS = st.sampled_from([0, 0, 0, 1])
# Which table is locked while calls that meet are on their way, by what they are about.
LOCKED: dict[str, list[str | None]] = {
    "claim": ["worker", "worker", "runs", None],
    "work": ["worker", "worker", "jobs", "runs", None],
    "silence": ["worker", None],
    "files": ["audit_log", "audit_log", "files", None],
    "nothing": ["worker", "jobs", None],
}


class Machine(RuleBasedStateMachine):
    """Two organizations on one ledger."""

    site: ClassVar[Site]

    def __init__(self) -> None:
        super().__init__()
        self.worlds = [World(self.site, "home"), World(self.site, "abroad")]
        self.history: list[str] = []
        self.completed: set[tuple[int, str]] = set()

    @initialize(seed=SEEDS)
    def begin(self, seed: int) -> None:
        """Two pods wait for work, and a job or two for pods."""
        draw = self._chance(seed)
        for world in self.worlds:
            for pod in PODS[:2]:
                self._bring_up(world, pod)
            for _ in range(2):
                self._wait_for_a_pod(world, a_job(draw, world, list(JOBS)))

    @rule(seed=SEEDS, number=NUMBERS)
    def anybody_calls(self, seed: int, number: int) -> None:
        self._make_some(self.worlds[number], OF_PEOPLE + OF_CONTROL, self._chance(seed))

    @rule(seed=SEEDS, number=NUMBERS)
    def pods_call(self, seed: int, number: int) -> None:
        world, draw = self.worlds[number], self._chance(seed)
        if not any(run.status == "pending" for run in world.model.runs.values()):
            self._prepare("claim", world, draw)
        self._make_some(world, OF_PODS, draw)

    @rule(seed=SEEDS, number=NUMBERS)
    def runs_call(self, seed: int, number: int) -> None:
        world, draw = self.worlds[number], self._chance(seed)
        if not any(run.status == "in_progress" for run in world.model.runs.values()):
            self._prepare("work", world, draw)
        self._make_some(world, OF_RUNS, draw)

    @rule(seed=SEEDS, number=NUMBERS)
    def calls_meet(self, seed: int, number: int) -> None:
        """Some order of the calls explains all answers and what is in the tables then."""
        world, draw = self.worlds[number], self._chance(seed)
        for scene, first, others in draw.sample(MEETINGS, 3):
            world.focus = self._prepare(scene, world, draw)
            met = draw.choices(others, k=draw.randint(1, 2))
            calls = [choose(draw, world) for choose in draw.sample([first, *met], len(met) + 1)]
            world.focus = Focus()
            self._make_at_once(world, calls, draw.choice(LOCKED[scene]))

    @rule(seed=SEEDS, number=NUMBERS, what=st.sampled_from(["lease", "lease", "script", "hints"]))
    def time_passes(self, seed: int, number: int, what: str) -> None:
        """A lease runs out, or hints grow old."""
        world, draw = self.worlds[number], self._chance(seed)
        pods = [name for name, pod in world.model.pods.items() if pod.boot is not None]
        scripts = [name for name, run in world.model.runs.items() if run.lease_is_over is not None]
        if what == "lease" and pods:
            self._let_lease_end(world, draw.choice(pods))
        elif what == "script" and scripts:
            script = draw.choice(scripts)
            self.history.append(f"{world}: the script of run {script} falls silent")
            self.site.let_scripts_end(script)
            world.model.runs[script].lease_is_over = True
        else:
            self.history.append(f"{world}: hints grow old")
            self.site.let_hints_age(world.organization_id)
            for run in world.model.runs.values():
                run.hint_is_fresh = False

    @invariant()
    def tables_are_as_the_model_says(self) -> None:
        for number, world in enumerate(self.worlds):
            self._expect(world.model.shown(), self.site.snapshot(world.organization_id), f"tables of {world}")
            status = {name: job.status for name, job in world.model.jobs.items()}
            self.completed |= {(number, name) for name in status if status[name] == "completed"}
        lost = [name for number, name in self.completed
                if self.worlds[number].model.jobs[name].status != "completed"]  # fmt: skip
        self._expect([], lost, "jobs that were completed once and are not any more")
        self._expect(
            [], self.site.broken([world.organization_id for world in self.worlds]), "broken invariants"
        )

    def teardown(self) -> None:
        """Through the functions, too, each organization sees its own rows and no others."""
        for world in self.worlds:
            claims = world.claims("person")
            shown = {
                "jobs": {row["id"] for row in self.site.call(claims, "list_jobs", max_rows=1000)},
                "runs": {row["id"] for row in self.site.call(claims, "list_runs", max_rows=1000)},
                "pods": {row["id"] for row in self.site.call(claims, "list_workers", max_rows=1000)},
                "events": len(self.site.call(claims, "list_events", max_rows=1000)),
            }
            model = world.model
            events = sum(len(run.events) for run in model.runs.values())
            runs = {str(name) for name in model.runs}
            wanted = {"jobs": set(model.jobs), "runs": runs, "pods": set(model.pods), "events": events}
            self._expect(wanted, shown, f"what {world} sees")

    def _chance(self, seed: int) -> Random:
        """Also where Hypothesis repeats itself, no step is like another."""
        return Random(f"{seed} {len(self.history)}")

    def _make_some(self, world: World, choosers: list[Chooser], draw: Random) -> None:
        for choose in draw.choices(choosers, k=CALLS):
            self._make(world, choose(draw, world))

    def _make_at_once(self, world: World, calls: list[Call], locked: str | None) -> None:
        self.history += [f"{world} at once ({locked}): {call}" for call in calls]
        words = self.site.at_once([partial(world.make, call) for call in calls], locked)
        self.history.append(f"    -> {words}")
        self.site.keep_hints_fresh(world.organization_id)
        found = self.site.snapshot(world.organization_id)
        world.model = self._explanation(world.model, calls, words, found)

    def _prepare(self, scene: str, world: World, draw: Random) -> Focus:
        """A job that waits, runs, or runs on a pod whose lease has run out; or files that nobody reads."""
        job = a_job(draw, world, (waiting_readers if scene == "files" else open_jobs)(world))
        if scene == "files":
            for file_id in job["files"]:
                self._make(world, stored_file(file_id))
        if scene in ("nothing", "files"):
            return Focus(job=job["id"], file=draw.choice(job["files"] or [None]))
        pod = draw.choice(idle_pods(world) or PODS)
        self._bring_up(world, pod)
        self._wait_for_a_pod(world, job)
        waiting = [name for name in live_runs(world.model) if world.model.runs[name].job == job["id"]]
        for run in waiting if scene != "claim" else []:
            self._make(world, opened(pod, pod, run, newest_boot(draw, world, pod)))
        if scene == "silence":
            self._let_lease_end(world, pod)
        return Focus(pod, waiting[0] if waiting else None, job["id"])

    def _let_lease_end(self, world: World, pod: str) -> None:
        known = world.model.pods.get(pod)
        if known is not None and known.boot is not None:
            self.history.append(f"{world}: the lease of {pod} runs out")
            self.site.let_leases_end(world.organization_id, pod)
            known.lease_is_over, known.is_heard = True, False

    def _wait_for_a_pod(self, world: World, job: dict[str, Any]) -> None:
        for file_id in job["files"]:
            self._make(world, stored_file(file_id))
        self._make(world, Call("person", "submit_job", {"job": job}))
        attempt = world.model.jobs[job["id"]].attempt
        arguments = {"for_job": job["id"], "for_attempt": attempt, "flow_run": world.new_id()}
        self._make(world, Call("control", "record_flow_run", arguments))

    def _bring_up(self, world: World, pod: str) -> None:
        self._make(world, intended(world, pod))
        known = world.model.pods.get(pod)
        if known is not None and known.status == "starting":
            self._make(world, redeemed(world, pod, world.secret(pod)))
            world.boots.setdefault(pod, []).append(world.new_id())
            self._make(world, registered(pod, pod, world.boots[pod][-1]))

    def _make(self, world: World, call: Call) -> None:
        self.history.append(f"{world}: {call}")
        expected = world.model.apply(call)
        found = world.make(call)
        if call.function in ("hint_runs", "renew_lease"):
            self.site.keep_hints_fresh(world.organization_id)
        self.history.append(f"    -> {found}")
        if not _explains(expected, found, call):
            self._expect(expected, found, f"answer to {call}")

    def _explanation(
        self, before: Model, calls: list[Call], words: list[str], found: dict[str, Any]
    ) -> Model:
        """The model after the calls in an order that leads to these answers and these tables."""
        for order in itertools.permutations(range(len(calls))):
            model = copy.deepcopy(before)
            explained = all([_explains(model.apply(calls[n]), words[n], calls[n]) for n in order])
            _take_advice(model, found)
            if explained and model.shown() == found:
                return model
        self._expect(
            f"what follows from {before.shown()}", (words, found), "calls at once that no order explains"
        )
        raise AssertionError("unreachable")

    def _expect(self, expected: object, found: object, what: str) -> None:
        if expected != found:
            history = "\n".join(self.history)
            raise AssertionError(f"{history}\n\n{what}:\nexpected {_difference(expected, found)}")


def _explains(expected: str, found: str, call: Call) -> bool:
    """A pod that has ended may hear that it is nobody any more, instead of that it is too late."""
    nobody = found.startswith((AuthenticationError.__name__, PermissionDeniedError.__name__))
    return expected == found or (nobody and expected in REFUSALS and call.speaker in PODS)


def _take_advice(model: Model, found: dict[str, Any]) -> None:
    """Which run a pod found first, and which job came first, no order of calls at the same moment decides."""
    if set(found["order"]) == set(model.jobs):
        model.jobs = {name: model.jobs[name] for name in found["order"]}
    for name, run in model.runs.items():
        shown = found["runs"].get(str(name))
        if shown is not None:
            run.hinted, run.hint_is_fresh = shown["hinted"], shown["hint_is_fresh"]


def _difference(expected: object, found: object) -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected.keys() | found.keys():
            if expected.get(key) != found.get(key):
                return f"{key}: " + _difference(expected.get(key), found.get(key))
    return f"{expected!r}\nfound    {found!r}"


def run_machine(url: str, examples: int) -> None:
    """The same sequences each time, as far as threads allow."""
    site = Site(url)
    machine = type("LedgerMachine", (Machine,), {"site": site})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=STEPS,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
                print_blob=False,
            ),
        )
    finally:
        site.close()


@pytest.fixture
def transport() -> str:
    """Transitions are the database's; the other transport has its own tests."""
    return "psycopg"


def test_the_ledger_does_what_the_model_says(ledger_url: str) -> None:
    """Whatever is called, in whatever order, by whom and at the same time."""
    run_machine(ledger_url, EXAMPLES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_ledger_is_found_out(ledger_url: str, mutant: Mutant) -> None:
    """What is seen above, would be: with one function broken, the same sequences fail."""
    mutant.apply(ledger_url.replace("authenticator@", "postgres@"))
    with pytest.raises((AssertionError, Flaky)):
        run_machine(ledger_url, 4 * EXAMPLES)


def test_another_organization_in_the_tables_is_found_out(ledger_url: str) -> None:
    """One policy that forgets whose row it is."""
    with psycopg.connect(ledger_url.replace("authenticator@", "postgres@")) as connection:
        connection.execute("alter policy select_authenticated_ow_worker on ledger.jobs using (true)")
    with pytest.raises((AssertionError, Flaky)):
        run_machine(ledger_url, EXAMPLES)
