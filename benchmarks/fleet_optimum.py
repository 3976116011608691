"""What no policy can beat, and what one could do that knew the future."""

from __future__ import annotations

from collections.abc import Sequence

from fleet_trace import MEDIAN_BOOT_SECONDS, TraceJob


def least_usd(trace: Sequence[TraceJob]) -> float:
    """A lower bound of the bill of every schedule that runs all jobs, however long it lets them wait.

    Proof. A pod runs one job at a time, so the seconds in which it runs jobs are disjoint parts of those that
    are paid for it. A job takes its `run_seconds` on whatever hardware, and only on a pod that fits, which
    costs at least the price of the cheapest offer that fits. So the bill is at least the sum over the jobs
    of `run_seconds` x that price. What this leaves out, boots, downloads and idle time, is not negative.
    """
    return sum(job.work_usd for job in trace)


def clairvoyant_usd(trace: Sequence[TraceJob]) -> float:
    """The least that a schedule can cost in which no job ever waits, made with knowledge of the future.

    Pods are bought a median boot before they are needed, without a limit; models are on every disk; each job
    runs on its own cheapest hardware. Then the runs of a pod are a chain in time, and a chain costs one boot,
    its runs and the gaps between them. To link two runs saves a boot and costs a gap; a run has at most one
    before and one after it. The links that save the most are an assignment, which is solved exactly. A policy
    that makes people wait may cost less than this, but never less than `least_usd`.
    """
    by_offer: dict[str, list[TraceJob]] = {}
    for job in trace:
        by_offer.setdefault(job.offer.key, []).append(job)
    return sum(_least_of_one_offer(jobs) for jobs in by_offer.values())


def _least_of_one_offer(jobs: Sequence[TraceJob]) -> float:
    price = jobs[0].offer.price_per_hour / 3600
    savings = [[max(0.0, _saved_seconds(one, other)) for other in jobs] for one in jobs]
    seconds = sum(job.run_seconds + MEDIAN_BOOT_SECONDS for job in jobs) - _best_assignment(savings)
    return seconds * price


def _saved_seconds(one: TraceJob, other: TraceJob) -> float:
    """What running `other` after `one` on the same pod saves: a boot, less the gap."""
    gap = other.at - (one.at + one.run_seconds)
    return MEDIAN_BOOT_SECONDS - gap if gap >= 0 else 0.0


def _best_assignment(gains: Sequence[Sequence[float]]) -> float:
    """The largest sum with at most one gain of each row and column (Hungarian method, O(n^3))."""
    size = len(gains)
    row_price, column_price = [0.0] * (size + 1), [0.0] * (size + 1)
    row_of = [0] * (size + 1)
    for row in range(1, size + 1):
        row_of[0], column = row, 0
        least, way, used = [float("inf")] * (size + 1), [0] * (size + 1), [False] * (size + 1)
        while row_of[column] != 0:
            used[column] = True
            current, delta, following = row_of[column], float("inf"), 0
            for other in range(1, size + 1):
                if used[other]:
                    continue
                reduced = -gains[current - 1][other - 1] - row_price[current] - column_price[other]
                if reduced < least[other]:
                    least[other], way[other] = reduced, column
                if least[other] < delta:
                    delta, following = least[other], other
            for other in range(size + 1):
                if used[other]:
                    row_price[row_of[other]] += delta
                    column_price[other] -= delta
                else:
                    least[other] -= delta
            column = following
        while column:
            row_of[column] = row_of[way[column]]
            column = way[column]
    return sum(gains[row_of[column] - 1][column - 1] for column in range(1, size + 1))
