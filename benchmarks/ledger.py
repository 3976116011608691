"""How fast the ledger is: beside PostgreSQL's own statements on the same server, in the same run.

Starts an embedded PostgreSQL with `fsync` on in a temporary folder and removes it at the end. `README.md`
beside it says what each figure is. Exits with 0 when every goal is met.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
from figures import Figure, Limit, Row, all_met, document, table, verdicts
from ledger_events import time_ingestion, time_log
from ledger_pages import fill, time_pages
from ledger_rates import count_round_trips, time_claims, time_submits
from ledger_site import LedgerSite, temporary_ledger
from scratch import say, temporary_folder

from openweights_prefect import OpenWeightsError

GOALS = (
    Limit("submit_ratio", "at_least", 0.2),
    Limit("claim_ratio", "at_least", 0.2),
    Limit("ingest_ratio", "at_least", 0.2),
    Limit("log_p50_microseconds", "at_most", 50),
    Limit("slowest_page_p50_ms", "at_most", 50),
    Limit("construct_round_trips", "at_most", 1),
    Limit("new_fine_tune_round_trips", "at_most", 3),
    Limit("known_job_round_trips", "at_most", 1),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    seconds: float = 3.0
    """Of submits, ours and PostgreSQL's own, in each of the rounds."""
    rounds: int = 2
    claims: int = 400
    """In each round, ours and PostgreSQL's own."""
    logged: int = 40_000
    log_calls: int = 5_000
    jobs: int = 10_000
    events: int = 100_000


FULL = Sizes(jobs=100_000, events=1_000_000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="list pages with 100 k jobs and 1 M events")
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="measure only this part")
    given = parser.parse_args(arguments)
    only = given.only or sorted(PARTS)
    try:
        with temporary_folder() as folder:
            figures = measure(FULL if given.full else Sizes(), folder, only=only)
    except (OpenWeightsError, psycopg.Error) as exc:
        print(f"The benchmark could not be done: {exc}", file=sys.stderr)
        return 1
    goals = [goal for goal in GOALS if goal.figure in figures]
    print(f"\n{summary(figures)}\n")
    print(verdicts(goals, figures, word="goal"))
    print(document("ledger", figures | {"full": given.full}, goals=goals, aims=()))
    return 0 if all_met(goals, figures) else 1


def measure(sizes: Sizes, folder: Path, *, only: Sequence[str]) -> dict[str, Figure]:
    """Every figure of the parts named."""
    figures: dict[str, Figure] = {
        "cpus": os.cpu_count() or 0,
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    say("Starting PostgreSQL, with fsync")
    with temporary_ledger(folder) as site:
        figures["postgresql"] = site.version()
        for name, part in PARTS.items():
            if name in only:
                figures |= part(site, sizes, folder)
    return figures | {"load_average_after": round(os.getloadavg()[0], 2)}


def measure_rates(site: LedgerSite, sizes: Sizes, folder: Path) -> dict[str, Figure]:
    """Submits and claims by eight clients."""
    say("Submits by 8 clients, ours and bare inserts in turns")
    figures = time_submits(site, seconds=sizes.seconds, rounds=sizes.rounds)
    say("Claims by 8 pods, ours and bare FOR UPDATE SKIP LOCKED in turns")
    return figures | time_claims(site, claims=sizes.claims, rounds=sizes.rounds)


def measure_events(site: LedgerSite, sizes: Sizes, folder: Path) -> dict[str, Figure]:
    """From `log()` into the table, and what one call costs."""
    say(f"{sizes.logged} events through `log()` and the shipper, and as multi-row inserts")
    figures = time_ingestion(site, folder, count=sizes.logged)
    say("One `log()` in a job")
    return figures | time_log(folder, calls=sizes.log_calls)


def measure_trips(site: LedgerSite, sizes: Sizes, folder: Path) -> dict[str, Figure]:
    """Calls of the ledger by the SDK."""
    return count_round_trips(site, folder)


def measure_pages(site: LedgerSite, sizes: Sizes, folder: Path) -> dict[str, Figure]:
    """Every list page over large tables."""
    say(f"Making {sizes.jobs} jobs and {sizes.events} events")
    filled = fill(site, jobs=sizes.jobs, events=sizes.events)
    say("List pages, the median of five each")
    return time_pages(site, filled, say)


PARTS = {"rates": measure_rates, "events": measure_events, "trips": measure_trips, "pages": measure_pages}


def summary(figures: Mapping[str, Figure]) -> str:
    """The table."""

    def rate(what: str, name: str) -> list[Row]:
        if f"{name}_ratio" not in figures:
            return []
        ours, bare = figures[f"{name}_per_second"], figures[f"bare_{name}_per_second"]
        return [Row(what, f"{ours}/s", f"{bare}/s", f"{figures[f'{name}_ratio']}")]

    def plain(what: str, name: str, unit: str) -> list[Row]:
        return [Row(what, f"{figures[name]} {unit}")] if name in figures else []

    return table(
        [
            Row("", "ours", "bare", "ratio"),
            *rate("submits, 8 clients", "submit"),
            *rate("claims, 8 clients", "claim"),
            *rate("events from log() to table", "ingest"),
            *plain("one log(), median", "log_p50_microseconds", "us"),
            *plain("slowest list page, median", "slowest_page_p50_ms", "ms"),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
