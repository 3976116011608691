"""From submit to the first line of a job, and jobs per minute: this product beside Prefect's process worker.

For each number of pods both run on the same Prefect server, in a local stack that this script starts in a
temporary folder and removes at the end. `README.md` beside it says what each figure is. Exits with 0
when every goal is met.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import httpx
import psutil
from figures import Figure, Limit, Row, all_met, document, p50, p90, table, verdicts
from local_product import Submitter, Times, local_stack, repeat_finished
from scratch import say, temporary_folder
from stock_worker import StockTimes, StockWorker

from openweights_prefect import OpenWeightsError, StackError
from openweights_prefect.settings import Settings
from openweights_prefect.stack.environment import common_environment
from openweights_prefect.stack.service import Folders

SLOTS = (1, 8)
FULL_SLOTS = (*SLOTS, 50)
GOALS = (
    Limit("failed", "at_most", 0),
    Limit("import_cpu_seconds", "at_most", 0.25),
    Limit("help_cpu_seconds", "at_most", 0.35),
)
GOALS_PER_SLOTS = (
    Limit("first_line_p50_seconds", "at_most", 0.5),
    Limit("first_line_ratio", "at_least", 10),
    Limit("jobs_per_minute_ratio", "at_least", 5),
)
AIMS_PER_SLOTS = (
    Limit("first_line_ratio", "at_least", 20),
    Limit("jobs_per_minute_ratio", "at_least", 10),
)

_PEER_POLL_SECONDS = 10.0  # Prefect's default of PREFECT_WORKER_QUERY_SECONDS, which is left as it is.
_POD_MB, _REST_MB = 170, 2000  # What an agent needs, and the services and the peer.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    discarded: int = 5
    rounds: int = 4
    """Each has one run of the peer, then some jobs of ours."""
    jobs_per_round: int = 5
    half_burst: int = 30
    """Jobs at once, before the peer's burst and again after it; at least."""
    jobs_per_pod: int = 2
    peer_burst: int = 10
    """At most; four for each slot."""
    cpu_repeats: int = 7
    repeated_submits: int = 30


QUICK = Sizes(
    discarded=3, rounds=2, jobs_per_round=3, half_burst=10, jobs_per_pod=1, peer_burst=4, cpu_repeats=3
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--slots", type=int, nargs="+", metavar="PODS", help="how many pods; a stack for each"
    )
    parser.add_argument("--full", action="store_true", help="also with 50 pods, which need 10 GB of memory")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, for a first impression")
    given = parser.parse_args(arguments)
    slots = given.slots or (FULL_SLOTS if given.full else SLOTS)
    _heed_interrupts()
    try:
        with temporary_folder() as folder:
            figures = measure(QUICK if given.quick else Sizes(), slots, folder, os.environ)
    except (OpenWeightsError, httpx.HTTPError) as exc:
        print(f"The benchmark could not be done: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what had been started is stopped.", file=sys.stderr)
        return 130
    measured = [count for count in slots if of("first_line_ratio", count) in figures]
    goals = [*GOALS, *limits_of(GOALS_PER_SLOTS, measured)]
    aims = limits_of(AIMS_PER_SLOTS, measured)
    print(f"\n{summary(figures, measured)}\n")
    print(verdicts(goals, figures, word="goal"), verdicts(aims, figures, word="aim"), sep="\n")
    print(document("dispatch", figures | {"quick": given.quick}, goals=goals, aims=aims))
    return 0 if all_met(goals, figures) else 1


def of(name: str, slots: int) -> str:
    """The name of a figure with so many pods."""
    return f"{name}_{slots}_pod{'' if slots == 1 else 's'}"


def limits_of(limits: Sequence[Limit], measured: Sequence[int]) -> list[Limit]:
    """The limits for each number of pods."""
    return [limit._replace(figure=of(limit.figure, slots)) for slots in measured for limit in limits]


def measure(
    sizes: Sizes, slots: Sequence[int], folder: Path, environment: Mapping[str, str]
) -> dict[str, Figure]:
    """Every figure; stops what it starts, also when it fails or is interrupted."""
    # With the settings that everybody has: the user's own stay out.
    neutral = {name: value for name, value in environment.items() if not name.startswith("OW_")}
    figures = describe_machine()
    figures |= time_imports(common_environment(Folders(folder / "none"), neutral), sizes.cpu_repeats)
    for count in slots:
        if shortage := memory_shortage(count):
            say(f"Not with {count} pods: {shortage}")
            figures[of("not_run", count)] = shortage
            continue
        own = folder / f"{count}"
        stack = {**common_environment(Folders(own / "stack"), neutral), "OW_MAX_WORKERS": str(count)}
        try:
            found = measure_stack(sizes, count, own, stack)
        except (OpenWeightsError, httpx.HTTPError) as exc:
            say(f"It failed with {count} pods: {exc}")
            found = {"failure": str(exc)}
        figures |= {of(name, count): value for name, value in found.items()}
    return figures | {"failed": sum(of("failure", count) in figures for count in slots)}


def measure_stack(
    sizes: Sizes, slots: int, folder: Path, environment: Mapping[str, str]
) -> dict[str, Figure]:
    """The figures with so many pods, and as many slots of the peer, in a stack of their own."""
    _heed_interrupts()  # The end of the stack before this one ignored them.
    with ExitStack() as cleanup:
        say(f"Starting a local stack in {environment['OW_HOME']!r}")
        settings = cleanup.enter_context(local_stack(environment, say))
        say("Starting the peer, `prefect worker start --type process`")
        peer = cleanup.enter_context(
            StockWorker(
                api_url=settings.prefect_api_url, folder=folder / "peer", environment=environment, slots=slots
            )
        )
        submitter = Submitter(settings)
        cleanup.callback(submitter.close)
        cleanup.callback(_ignore_interrupts)  # The first to be called: nothing cuts the stopping short.
        say(f"Warming up: {slots} pods, and {sizes.discarded} jobs that do not count")
        boot_seconds = submitter.boot_pods(slots)
        for _ in range(sizes.discarded):
            submitter.time_one()
        return {
            "boot_seconds": round(boot_seconds, 1),
            **time_first_lines(submitter, peer, sizes),
            **time_bursts(submitter, peer, sizes, slots),
            **time_repeated_submits(settings, sizes.repeated_submits),
            # Fewer would mean that some were given up under way.
            "pods_at_end": submitter.count_pods(),
            "load_average": round(os.getloadavg()[0], 2),
        }


def describe_machine() -> dict[str, Figure]:
    """What the other figures depend on."""
    return {
        "cpus": os.cpu_count() or 0,
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "prefect": version("prefect"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def memory_shortage(slots: int) -> str:
    """Why so many pods do not fit into memory; empty when they do."""
    needed, free = slots * _POD_MB + _REST_MB, psutil.virtual_memory().available >> 20
    return f"{needed} MB of memory are needed, {free} MB are free" if free < needed else ""


def time_imports(environment: Mapping[str, str], repeats: int) -> dict[str, Figure]:
    """CPU seconds of whole processes, the interpreter's own start included."""
    say("CPU of `import openweights_prefect` and of `ow --help`")
    commands = {
        "import": [sys.executable, "-c", "import openweights_prefect"],
        "help": [str(Path(sys.executable).with_name("ow")), "--help"],
    }
    figures: dict[str, Figure] = {}
    for name, command in commands.items():
        cpu_seconds(command, environment)  # The first one compiles.
        figures[f"{name}_cpu_seconds"] = round(
            p50(cpu_seconds(command, environment) for _ in range(repeats)), 3
        )
    return figures


def cpu_seconds(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """User and system time of one process, as the operating system counts it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise StackError(f"{command!r} ended with exit code {process.returncode}; its message is above.")
    return usage.ru_utime + usage.ru_stime


def time_first_lines(submitter: Submitter, peer: StockWorker, sizes: Sizes) -> dict[str, Figure]:
    """Submit to first line, one run at a time, ours and the peer's in turns: noise hits both."""
    ours: list[Times] = []
    theirs: list[StockTimes] = []
    for number in range(sizes.rounds):
        # The peer polls, and the end of its last run is a fixed time after a poll. Spread over one interval,
        # its submits wait for the poll as long as any would on average, whatever our own pace is.
        time.sleep(_PEER_POLL_SECONDS * (number + 0.5) / sizes.rounds)
        theirs.append(peer.wait(peer.submit()))
        latest = [submitter.time_one() for _ in range(sizes.jobs_per_round)]
        ours += latest
        lines = ", ".join(f"{times.first_line:.2f}" for times in latest)
        say(
            f"Round {number + 1} of {sizes.rounds}, seconds to the first line: "
            f"stock {theirs[-1].first_line:.2f}; ours {lines}"
        )
    return first_line_figures(ours, theirs)


def first_line_figures(ours: Sequence[Times], theirs: Sequence[StockTimes]) -> dict[str, Figure]:
    """Medians, and how the time divides."""
    first_lines = [times.first_line for times in ours]
    peer_first_lines = [times.first_line for times in theirs]
    after_claim = p50(times.first_line - times.claimed for times in theirs)
    return {
        "first_line_p50_seconds": round(p50(first_lines), 3),
        "first_line_p90_seconds": round(p90(first_lines), 3),
        "first_line_samples": len(ours),
        "peer_first_line_p50_seconds": round(p50(peer_first_lines), 3),
        "peer_first_line_p90_seconds": round(p90(peer_first_lines), 3),
        "peer_first_line_samples": len(theirs),
        "first_line_ratio": round(p50(peer_first_lines) / p50(first_lines), 2),
        "peer_claim_to_first_line_p50_seconds": round(after_claim, 3),
        "first_line_ratio_without_peer_polling": round(after_claim / p50(first_lines), 2),
        "flow_run_p50_seconds": round(p50(times.flow_run for times in ours), 3),
        "opened_p50_seconds": round(p50(times.opened for times in ours), 3),
        "finished_p50_seconds": round(p50(times.finished for times in ours), 3),
        "peer_finished_p50_seconds": round(p50(times.finished for times in theirs), 3),
    }


def time_bursts(submitter: Submitter, peer: StockWorker, sizes: Sizes, slots: int) -> dict[str, Figure]:
    """No-op jobs per minute, many submitted at once, with the same number of slots."""
    half, runs = max(sizes.half_burst, sizes.jobs_per_pod * slots), min(sizes.peer_burst, 4 * slots)
    say(f"Each at once: {half} jobs, {runs} runs of the stock worker, {half} jobs")
    seconds = submitter.time_burst(half)
    submitted = [peer.submit() for _ in range(runs)]
    last_end = max(run.submitted_at + peer.wait(run).finished for run in submitted)
    peer_seconds = last_end - submitted[0].submitted_at
    again = submitter.time_burst(half)
    say(f"They took {seconds:.1f} s, {peer_seconds:.1f} s, {again:.1f} s")
    rate, peer_rate = 120 * half / (seconds + again), 60 * runs / peer_seconds
    return {
        "jobs_per_minute": round(rate, 1),
        "burst_jobs": 2 * half,
        "peer_jobs_per_minute": round(peer_rate, 1),
        "peer_burst_jobs": runs,
        "jobs_per_minute_ratio": round(rate / peer_rate, 2),
    }


def time_repeated_submits(settings: Settings, count: int) -> dict[str, Figure]:
    """What a user pays for running a script again whose job has finished."""
    repeated = repeat_finished(settings, count)
    return {
        "repeated_submit_p50_ms": round(1000 * p50(repeated.seconds), 2),
        "repeated_submit_ledger_calls": repeated.calls / count,
    }


def summary(figures: Mapping[str, Figure], measured: Sequence[int]) -> str:
    """The table."""
    rows = [
        Row("", "ours", "stock", "ratio"),
        Row("CPU of `import openweights_prefect`", f"{figures['import_cpu_seconds']:.2f} s"),
        Row("CPU of `ow --help`", f"{figures['help_cpu_seconds']:.2f} s"),
    ]
    for slots in measured:
        rows += rows_of(figures, slots)
    return table(rows)


def rows_of(figures: Mapping[str, Figure], slots: int) -> list[Row]:
    """The table's rows for one number of pods."""

    def row(what: str, name: str, unit: str, ratio: str = "") -> Row:
        ours, theirs = (f"{figures[of(side + name, slots)]}{unit}" for side in ("", "peer_"))
        return Row(what, ours, theirs, f"{figures[of(ratio, slots)]}x" if ratio else "")

    return [
        Row(f"with {slots} pod{'' if slots == 1 else 's'}", ""),
        row("  submit to first line, median", "first_line_p50_seconds", " s", "first_line_ratio"),
        row("  submit to first line, p90", "first_line_p90_seconds", " s"),
        row("  submit to finished, median", "finished_p50_seconds", " s"),
        row("  no-op jobs per minute", "jobs_per_minute", "", "jobs_per_minute_ratio"),
        Row("  submit of a finished job, median", f"{figures[of('repeated_submit_p50_ms', slots)]} ms"),
    ]


def _heed_interrupts() -> None:
    for number in _INTERRUPTS:
        signal.signal(number, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    # Unlike Python's own handler: a second Ctrl-C does not stop the stopping.
    _ignore_interrupts()
    raise KeyboardInterrupt


def _ignore_interrupts() -> None:
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
