"""The fleet: the scheduler at scale, what a day of jobs costs, silent pods, canceled jobs.

`make bench-fleet`, or `python benchmarks/fleet.py` in the control environment. `README.md` beside it says
what each figure is. Exits with 0 when every goal is met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
from figures import Figure, Limit, Row, all_met, document, p50, table, verdicts
from fleet_optimum import clairvoyant_usd, least_usd
from fleet_plot import draw, markdown
from fleet_pods import time_pods
from fleet_policies import NoReuse, OpenWeights, Ours, PodPerJob
from fleet_replay import Outcome, Policy, Replay
from fleet_scheduler import time_passes
from fleet_trace import Boots, TraceJob, TraceShape, make_trace
from scratch import say, temporary_folder

from openweights_prefect import OpenWeightsError
from openweights_prefect.settings import Settings

PEERS = ("pod_per_pending_job", "pod_per_job", "no_reuse")
GOALS = (
    Limit("pass_p50_seconds", "at_most", 1),
    Limit("scheduler_memory_mb", "at_most", 500),
    *(Limit(f"cost_to_{peer}", "at_most", 1) for peer in PEERS),
    *(Limit(f"wait_p50_to_{peer}", "at_most", 1) for peer in PEERS),
    Limit("dead_pod_noticed_max_seconds", "at_most", 45),
    Limit("false_kills", "at_most", 0),
    Limit("cancel_p95_beyond_grace_seconds", "at_most", 2),
)
AIMS = (
    Limit("pass_max_seconds", "at_most", 1),
    *(Limit(f"worst_cost_to_{peer}", "at_most", 1) for peer in PEERS),
    Limit("first_line_p50_seconds_1_pod", "at_most", 0.5),
    Limit("first_line_p50_seconds_8_pods", "at_most", 0.5),
)

_FALSE_KILLS = Path(__file__).with_name("false_kills.py")
_FIRST_SEED = 1


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    traces: int = 20
    pods: tuple[int, ...] = (8,)
    cancels: int = 20
    pod_hours: int = 200


FULL = Sizes(traces=100, pods=(8, 50), pod_hours=10_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="100 traces, 50 pods, 10,000 pod-hours")
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="measure only this part")
    parser.add_argument(
        "--write", action="store_true", help="also write the table and the plot beside this file"
    )
    given = parser.parse_args(arguments)
    only = given.only or sorted(PARTS)
    try:
        with temporary_folder() as folder:
            figures = measure(FULL if given.full else Sizes(), folder, only=only, write=given.write)
    except (OpenWeightsError, psycopg.Error, httpx.HTTPError, subprocess.SubprocessError) as exc:
        print(f"The benchmark could not be done: {exc}", file=sys.stderr)
        return 1
    goals, aims = ([limit for limit in limits if limit.figure in figures] for limits in (GOALS, AIMS))
    print(f"\n{summary(figures)}\n")
    print(verdicts(goals, figures, word="goal"), verdicts(aims, figures, word="aim"), sep="\n")
    print(document("fleet", figures | {"full": given.full}, goals=goals, aims=aims))
    return 0 if all_met(goals, figures) else 1


def measure(sizes: Sizes, folder: Path, *, only: Sequence[str], write: bool) -> dict[str, Figure]:
    """Every figure of the parts named."""
    figures: dict[str, Figure] = {
        "cpus": os.cpu_count() or 0,
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    for name, part in PARTS.items():
        if name in only:
            own = folder / name
            own.mkdir()
            own.chmod(0o755)
            figures |= part(sizes, own, write)
    return figures | {"load_average_after": round(os.getloadavg()[0], 2)}


def measure_scheduler(sizes: Sizes, folder: Path, write: bool) -> dict[str, Figure]:
    """Placement passes with a large backlog."""
    say("Placement passes with 10,000 waiting jobs and 1,000 pods")
    return time_passes(folder)


def measure_policies(sizes: Sizes, folder: Path, write: bool) -> dict[str, Figure]:
    """One day of jobs through four policies; then the ratios over many such days."""
    say(f"A day of 200 jobs through four policies, {sizes.traces} days")
    days = [replay_day(seed) for seed in range(_FIRST_SEED, _FIRST_SEED + sizes.traces)]
    # The one in the middle: neither side's best.
    shown = sorted(days, key=lambda day: day.outcomes[0].usd / day.outcomes[-1].usd)[len(days) // 2]
    bounds = {"least_usd": least_usd(shown.trace), "clairvoyant_usd": clairvoyant_usd(shown.trace)}
    page = markdown(shown.outcomes, **bounds)
    print(f"\n{page}")
    if write:
        here = Path(__file__)
        here.with_name("fleet_policies.md").write_text(page, encoding="utf-8")
        draw(here.with_name("fleet_policies.svg"), shown.outcomes, **bounds)
    figures: dict[str, Figure] = {name: round(usd, 2) for name, usd in bounds.items()}
    figures["traces"] = sizes.traces
    for outcome in shown.outcomes:
        figures |= {
            f"{outcome.slug}_usd": round(outcome.usd, 2),
            f"{outcome.slug}_idle_share": round(outcome.idle_usd / outcome.usd, 3),
            f"{outcome.slug}_boot_share": round(outcome.boot_usd / outcome.usd, 3),
            f"{outcome.slug}_wait_p50_seconds": round(outcome.wait_p50, 1),
            f"{outcome.slug}_wait_p95_seconds": round(outcome.wait_p95, 1),
            f"{outcome.slug}_pods": len(outcome.pods),
        }
    sparse = TraceShape(days=3)
    say(f"The same 200 jobs spread over three days, {sizes.traces // 4} times")
    spread = [replay_day(day, sparse) for day in range(_FIRST_SEED, _FIRST_SEED + sizes.traces // 4)]
    return figures | ratios(days) | {f"spread_{name}": value for name, value in ratios(spread).items()}


@dataclass(frozen=True)
class Day:
    """One trace, and what each policy made of it; ours is the first."""

    trace: Sequence[TraceJob]
    outcomes: Sequence[Outcome]


def replay_day(seed: int, shape: TraceShape | None = None) -> Day:
    """The default settings, of this product and of OpenWeights: at most 8 pods."""
    trace, settings = make_trace(seed, shape or TraceShape()), Settings()
    policies: tuple[Policy, ...] = (Ours(settings), OpenWeights(seed), PodPerJob(), NoReuse())
    return Day(
        trace,
        [Replay(trace, Boots(seed), each, max_pods=settings.max_workers).run() for each in policies],
    )


def ratios(days: Sequence[Day]) -> dict[str, Figure]:
    """Ours over each of the others: the median of the days, and the worst of them."""
    figures: dict[str, Figure] = {
        "cost_to_bound": round(p50(day.outcomes[0].usd / least_usd(day.trace) for day in days), 3)
    }
    for number, peer in enumerate(PEERS, 1):
        cost = [day.outcomes[0].usd / day.outcomes[number].usd for day in days]
        wait = [day.outcomes[0].wait_p50 / day.outcomes[number].wait_p50 for day in days]
        tail = [day.outcomes[0].wait_p95 / day.outcomes[number].wait_p95 for day in days]
        figures |= {
            f"cost_to_{peer}": round(p50(cost), 3),
            f"worst_cost_to_{peer}": round(max(cost), 3),
            f"wait_p50_to_{peer}": round(p50(wait), 3),
            f"wait_p95_to_{peer}": round(p50(tail), 3),
        }
    return figures


def measure_faults(sizes: Sizes, folder: Path, write: bool) -> dict[str, Figure]:
    """How fast a dead pod is noticed, and whether a live one is ever killed, in simulated hours."""
    say(f"{sizes.pod_hours} simulated pod-hours full of faults")
    command = [sys.executable, str(_FALSE_KILLS), "--pod-hours", str(sizes.pod_hours)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "fault_hours": round(found["pod_hours"]),
        "false_kills": found["false_kills"],
        "dead_pod_noticed_p50_seconds": round(found["noticed_median_s"], 1),
        "dead_pod_noticed_p95_seconds": round(found["noticed_p95_s"], 1),
        "dead_pod_noticed_max_seconds": round(found["noticed_max_s"], 1),
    }


def measure_pods(sizes: Sizes, folder: Path, write: bool) -> dict[str, Figure]:
    """Real agents: first lines and cancellations."""
    figures: dict[str, Figure] = {}
    for pods in sizes.pods:
        own = folder / f"{pods}"
        # The first stack measures the cancellations.
        figures = time_pods(own, os.environ, pods=pods, cancels=sizes.cancels, say=say) | figures
    return figures


PARTS = {
    "scheduler": measure_scheduler,
    "policies": measure_policies,
    "faults": measure_faults,
    "pods": measure_pods,
}


def summary(figures: Mapping[str, Figure]) -> str:
    """The table."""
    rows = (
        ("placement pass, median", "pass_p50_seconds", "s"),
        ("placement pass, longest", "pass_max_seconds", "s"),
        ("memory of the scheduler", "scheduler_memory_mb", "MB"),
        *((f"cost, ours to {peer}", f"cost_to_{peer}", "x") for peer in PEERS),
        *((f"median wait, ours to {peer}", f"wait_p50_to_{peer}", "x") for peer in PEERS),
        ("cost, ours to no_reuse, spread over 3 days", "spread_cost_to_no_reuse", "x"),
        ("cost, ours to the lower bound", "cost_to_bound", "x"),
        ("dead pod noticed, longest", "dead_pod_noticed_max_seconds", "s"),
        ("first line, 1 pod, median", "first_line_p50_seconds_1_pod", "s"),
        ("first line, 8 pods, median", "first_line_p50_seconds_8_pods", "s"),
        ("jobs per minute, 8 pods", "jobs_per_minute_8_pods", ""),
        ("first line, 50 pods, median", "first_line_p50_seconds_50_pods", "s"),
        ("jobs per minute, 50 pods", "jobs_per_minute_50_pods", ""),
        ("cancel to dead process, p95", "cancel_p95_seconds", "s"),
        ("the same, SIGTERM ignored, longest", "stubborn_cancel_max_seconds", "s"),
    )
    return table(
        [
            Row("", "seen"),
            *(Row(what, f"{figures[key]} {unit}") for what, key, unit in rows if key in figures),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
