"""From submit to the first line of a job, and jobs per minute: this product beside Prefect's process worker.

Both run on the same Prefect server, in one local stack that this script starts in a temporary folder and
removes at the end. `README.md` beside it says what each figure is. Exits with 0 when every goal is met.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import httpx
from figures import Figure, Limit, Row, all_met, document, p50, p90, table, verdicts
from local_product import Submitter, Times, await_pods, local_stack, repeat_finished
from stock_worker import StockTimes, StockWorker

from openweights_prefect import OpenWeightsError, StackError
from openweights_prefect.settings import Settings
from openweights_prefect.stack.environment import common_environment
from openweights_prefect.stack.service import Folders

SLOTS = 2
GOALS = (
    Limit("first_line_ratio", "at_least", 10),
    Limit("jobs_per_minute_ratio", "at_least", 5),
    Limit("import_cpu_seconds", "at_most", 0.25),
    Limit("help_cpu_seconds", "at_most", 0.35),
)
AIMS = (
    Limit("first_line_ratio", "at_least", 20),
    Limit("first_line_p50_seconds", "at_most", 0.5),
    Limit("jobs_per_minute_ratio", "at_least", 10),
)

_PEER_POLL_SECONDS = 10.0  # Prefect's default of PREFECT_WORKER_QUERY_SECONDS, which is left as it is.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    discarded: int = 5
    rounds: int = 5
    """Each has one run of the peer, then some jobs of ours."""
    jobs_per_round: int = 4
    half_burst: int = 30
    """Jobs at once, before the peer's burst and again after it."""
    peer_burst: int = 10
    cpu_repeats: int = 7
    repeated_submits: int = 30


QUICK = Sizes(discarded=3, rounds=2, jobs_per_round=3, half_burst=10, peer_burst=4, cpu_repeats=3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, for a first impression")
    quick = parser.parse_args(arguments).quick
    for number in _INTERRUPTS:
        signal.signal(number, _interrupt)
    try:
        with temporary_folder() as folder:
            figures = measure(QUICK if quick else Sizes(), folder, os.environ)
    except (OpenWeightsError, httpx.HTTPError) as exc:
        print(f"The benchmark could not be done: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what had been started is stopped.", file=sys.stderr)
        return 130
    print(f"\n{summary(figures)}\n")
    print(verdicts(GOALS, figures, word="goal"), verdicts(AIMS, figures, word="aim"), sep="\n")
    print(document("dispatch", figures | {"quick": quick}, goals=GOALS, aims=AIMS))
    return 0 if all_met(GOALS, figures) else 1


def measure(sizes: Sizes, folder: Path, environment: Mapping[str, str]) -> dict[str, Figure]:
    """Every figure; stops what it starts, also when it fails or is interrupted."""
    # With the settings that everybody has: the user's own stay out.
    neutral = {name: value for name, value in environment.items() if not name.startswith("OW_")}
    neutral = {**common_environment(Folders(folder / "stack"), neutral), "OW_MAX_WORKERS": str(SLOTS)}
    machine = describe_machine()
    cpu = time_imports(neutral, sizes.cpu_repeats)
    with ExitStack() as cleanup:
        say(f"Starting a local stack in {neutral['OW_HOME']!r}")
        settings = cleanup.enter_context(local_stack(neutral, say))
        say("Starting the peer, `prefect worker start --type process`")
        peer = cleanup.enter_context(
            StockWorker(
                api_url=settings.prefect_api_url, folder=folder / "peer", environment=neutral, slots=SLOTS
            )
        )
        submitter = Submitter(settings)
        cleanup.callback(submitter.close)
        cleanup.callback(_ignore_interrupts)  # The first to be called: nothing cuts the stopping short.
        warm_up(submitter, settings, sizes.discarded)
        latency = time_first_lines(submitter, peer, sizes)
        throughput = time_bursts(submitter, peer, sizes)
        repeated = time_repeated_submits(settings, sizes.repeated_submits)
        load: dict[str, Figure] = {"load_average_after": round(os.getloadavg()[0], 2)}
    return {**latency, **throughput, **cpu, **repeated, **machine, **load}


def describe_machine() -> dict[str, Figure]:
    """What the other figures depend on."""
    return {
        "slots": SLOTS,
        "cpus": os.cpu_count() or 0,
        "python": platform.python_version(),
        "prefect": version("prefect"),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


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


def warm_up(submitter: Submitter, settings: Settings, discarded: int) -> None:
    """Have a booted pod in every slot of ours, and discard the first jobs; the peer is warm when online."""
    say(f"Warming up: {SLOTS} pods, and {discarded} jobs that do not count")
    submitter.time_burst(SLOTS)
    await_pods(settings, SLOTS)
    for _ in range(discarded):
        submitter.time_one()


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


def time_bursts(submitter: Submitter, peer: StockWorker, sizes: Sizes) -> dict[str, Figure]:
    """No-op jobs per minute, many submitted at once, with the same number of slots."""
    half = sizes.half_burst
    say(f"Each at once: {half} jobs, {sizes.peer_burst} runs of the stock worker, {half} jobs")
    seconds = submitter.time_burst(half)
    submitted = [peer.submit() for _ in range(sizes.peer_burst)]
    last_end = max(run.submitted_at + peer.wait(run).finished for run in submitted)
    peer_seconds = last_end - submitted[0].submitted_at
    again = submitter.time_burst(half)
    say(f"They took {seconds:.1f} s, {peer_seconds:.1f} s, {again:.1f} s")
    rate, peer_rate = 120 * half / (seconds + again), 60 * sizes.peer_burst / peer_seconds
    return {
        "jobs_per_minute": round(rate, 1),
        "burst_jobs": 2 * half,
        "peer_jobs_per_minute": round(peer_rate, 1),
        "peer_burst_jobs": sizes.peer_burst,
        "jobs_per_minute_ratio": round(rate / peer_rate, 2),
    }


def time_repeated_submits(settings: Settings, count: int) -> dict[str, Figure]:
    """What a user pays for running a script again whose job has finished."""
    repeated = repeat_finished(settings, count)
    return {
        "repeated_submit_p50_ms": round(1000 * p50(repeated.seconds), 2),
        "repeated_submit_ledger_calls": repeated.calls / count,
    }


def summary(figures: Mapping[str, Figure]) -> str:
    """The table."""

    def seconds(name: str) -> str:
        return f"{figures[f'{name}_seconds']:.2f} s"

    def row(what: str, name: str, ratio: str = "") -> Row:
        return Row(what, seconds(name), seconds(f"peer_{name}"), ratio)

    first_line_ratio, rate_ratio = figures["first_line_ratio"], figures["jobs_per_minute_ratio"]
    rates = f"{figures['jobs_per_minute']}", f"{figures['peer_jobs_per_minute']}"
    return table(
        [
            Row("", "ours", "stock", "ratio"),
            row("submit to first line, median", "first_line_p50", f"{first_line_ratio}x"),
            row("submit to first line, p90", "first_line_p90"),
            row("submit to finished, median", "finished_p50"),
            Row(f"no-op jobs per minute, {SLOTS} slots", *rates, f"{rate_ratio}x"),
            Row("CPU of `import openweights_prefect`", seconds("import_cpu")),
            Row("CPU of `ow --help`", seconds("help_cpu")),
            Row("submit of a finished job, median", f"{figures['repeated_submit_p50_ms']} ms"),
        ]
    )


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ow-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, flush=True)


def _interrupt(*_: object) -> NoReturn:
    # Unlike Python's own handler: a second Ctrl-C does not stop the stopping.
    _ignore_interrupts()
    raise KeyboardInterrupt


def _ignore_interrupts() -> None:
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
