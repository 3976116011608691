"""The replay of a trace counts what it should, and nothing beats the lower bound."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fleet_optimum import _best_assignment, clairvoyant_usd, least_usd
from fleet_policies import NoReuse, OpenWeights, Ours, PodPerJob
from fleet_replay import Outcome, Policy, Replay
from fleet_trace import MEDIAN_BOOT_SECONDS, Boots, TraceJob, TraceShape, make_trace

from openweights_prefect.settings import Settings

SETTINGS = Settings()
POLICIES = [Ours(SETTINGS), OpenWeights(1), PodPerJob(), NoReuse()]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.slug)


def replayed(trace: Sequence[TraceJob], policy: Policy) -> Outcome:
    return Replay(trace, Boots(1), policy, max_pods=SETTINGS.max_workers).run()


def a_job(number: int = 0, at: float = 1000.0) -> TraceJob:
    """Runs for ten minutes."""
    return replace(make_trace(1, TraceShape(jobs=1))[0], number=number, at=at, run_seconds=600.0)


def seconds_paid(outcome: Outcome) -> float:
    return sum(pod.alive_seconds for pod in outcome.pods)


@every_policy
def test_every_job_runs_once_and_costs_at_least_the_bound(policy: Policy) -> None:
    """A pod is paid for all its runs, its boot and its idle time; the parts are the bill."""
    trace = make_trace(3, TraceShape(jobs=60))
    outcome = replayed(trace, policy)
    assert sum(pod.jobs for pod in outcome.pods) == len(trace) == len(outcome.waits)
    assert outcome.run_usd >= least_usd(trace) * 0.999999
    assert outcome.idle_usd >= -1e-9
    assert outcome.usd == pytest.approx(outcome.run_usd + outcome.boot_usd + outcome.idle_usd)


def test_the_same_seed_is_the_same_day() -> None:
    """200 jobs in the order in which they come; another seed is another day."""
    trace = make_trace(1, TraceShape())
    assert trace == make_trace(1, TraceShape())
    assert trace != make_trace(2, TraceShape())
    assert len(trace) == 200
    assert [job.at for job in trace] == sorted(job.at for job in trace)


def test_one_job_costs_a_boot_a_download_and_its_run() -> None:
    """Ours pays for the idle time at the end as well, no reuse for nothing else."""
    job = a_job()
    needed = Boots(1)[0] + job.download_seconds + job.run_seconds
    assert seconds_paid(replayed([job], NoReuse())) == pytest.approx(needed)
    ours = seconds_paid(replayed([job], Ours(SETTINGS)))
    assert ours == pytest.approx(needed + 0.5 + SETTINGS.pod_idle_seconds)


def test_a_warm_pod_takes_the_next_job() -> None:
    """Without a boot, and without a download of the model that is on its disk."""
    first = a_job()
    end = first.at + Boots(1)[0] + first.download_seconds + 600
    trace = [first, a_job(1, end + 60)]
    outcome = replayed(trace, Ours(SETTINGS))
    assert [pod.jobs for pod in outcome.pods] == [2]
    assert outcome.waits[1] == pytest.approx(0.5)
    assert len(replayed(trace, NoReuse()).pods) == 2


def test_the_clairvoyant_keeps_a_pod_only_over_short_gaps() -> None:
    """A gap that costs less than a boot is waited through, a longer one is not."""
    job = a_job()
    price = job.offer.price_per_hour / 3600
    for gap, seconds in [(100.0, 1200 + MEDIAN_BOOT_SECONDS + 100), (5000.0, 1200 + 2 * MEDIAN_BOOT_SECONDS)]:
        trace = [job, a_job(1, job.at + 600 + gap)]
        assert clairvoyant_usd(trace) == pytest.approx(seconds * price)


def test_the_assignment_is_the_best_one() -> None:
    """Compared with every permutation of small tables."""
    rng = random.Random(1)
    for size in (1, 2, 3, 5):
        gains = [[float(max(0, rng.randint(-5, 20))) for _ in range(size)] for _ in range(size)]
        best = max(
            sum(gains[row][column] for row, column in enumerate(order))
            for order in itertools.permutations(range(size))
        )
        assert _best_assignment(gains) == pytest.approx(best)
