"""How long a step of training takes beside a bare script for TRL, and how soon a second job begins.

`make bench-training`, or `python benchmarks/training.py` in the control environment; `OW_JOB_PYTHON` is the
interpreter of the job environment. Needs no GPU and no network. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from figures import Figure, Limit, Row, all_met, document, p50, table, verdicts
from scratch import say, temporary_folder
from training_site import TrainingSite
from training_start import measure_start

from openweights_prefect.errors import ConfigurationError, OpenWeightsError
from openweights_prefect.settings import Settings

CASES = ("sft", "dpo", "orpo", "weighted")
PARTS = (*CASES, "start")
BLOCK = 5
SIDES = ("ours", "bare")
GOALS = (Limit("sft_step_ratio", "at_most", 1.02), Limit("warm_start_ratio", "at_most", 0.2))
AIMS = tuple(Limit(f"{case}_step_ratio", "at_most", 1.02) for case in CASES[1:])


class Spent(NamedTuple):
    """What a block of steps took."""

    seconds: float
    cpu_seconds: float


class Side:
    """A training that is told block by block to go on."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def answer(self) -> Spent:
        """What the last block took; the first answer means that it is ready."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OpenWeightsError(f"A training ended with exit code {self._process.wait()}.")
        return Spent(**json.loads(line))

    def go_on(self) -> Spent:
        """Train a block."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="measure a part")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; the default is $TMPDIR")
    options = parser.parse_args(arguments)
    try:
        with temporary_folder(options.folder) as folder:
            figures = measure(folder, options.only or PARTS, options.steps, options.starts)
    except (OpenWeightsError, OSError, subprocess.CalledProcessError) as exc:
        print(f"The benchmark could not be done: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    goals = [limit for limit in GOALS if limit.figure in figures]
    aims = [limit for limit in AIMS if limit.figure in figures]
    print(f"\n{summary(figures)}\n")
    print(verdicts(goals, figures, word="goal"), verdicts(aims, figures, word="aim"), sep="\n")
    print(document("training", figures, goals=goals, aims=aims))
    return 0 if all_met(goals, figures) else 1


def measure(folder: Path, parts: Sequence[str], steps: int, starts: int) -> dict[str, Figure]:
    """The figures of these parts."""
    job_python = Settings.load().job_python
    if not job_python:
        raise ConfigurationError("OW_JOB_PYTHON is not set. Give the interpreter of a job environment.")
    figures: dict[str, Figure] = {"load_average_before": round(os.getloadavg()[0], 2)}
    site = TrainingSite(folder, job_python)
    site.make_models()
    for case in CASES:
        if case in parts:
            figures |= measure_steps(site, case, steps)
    if "start" in parts:
        figures |= measure_start(site, rounds=starts)
    return {**figures, "load_average": round(os.getloadavg()[0], 2), "cpus": os.cpu_count() or 0}


def measure_steps(site: TrainingSite, case: str, steps: int) -> dict[str, Figure]:
    """Both sides train the same steps, a block at a time in turns; the first block does not count.

    The ratio is the median of those of the pairs of blocks, so that what else the machine does hits both.
    """
    # One step more than is measured: what happens after the last one is another matter.
    work = site.make_job(case, model="small", case=case, max_steps=steps + BLOCK + 1, **_PARAMETERS)
    pairs: list[dict[str, Spent]] = []
    with ExitStack() as stack:
        sides = {side: stack.enter_context(_started(site, side, case, work)) for side in SIDES}
        for number in range(steps // BLOCK + 1):
            order = SIDES if number % 2 else SIDES[::-1]
            spent = {side: sides[side].go_on() for side in order}
            if number:
                pairs.append(spent)
    ours, bare = ([pair[side].seconds for pair in pairs] for side in SIDES)
    ours_cpu, bare_cpu = (sum(pair[side].cpu_seconds for pair in pairs) for side in SIDES)
    figures: dict[str, Figure] = {
        f"{case}_step_p50_ms": round(1000 * p50(ours) / BLOCK, 2),
        f"{case}_bare_step_p50_ms": round(1000 * p50(bare) / BLOCK, 2),
        f"{case}_step_ratio": round(p50(mine / other for mine, other in zip(ours, bare, strict=True)), 4),
        f"{case}_step_cpu_ms": round(1000 * ours_cpu / len(pairs) / BLOCK, 2),
        f"{case}_cpu_ratio": round(ours_cpu / bare_cpu, 4),
        f"{case}_steps": len(pairs) * BLOCK,
    }
    say(", ".join(f"{name} {value}" for name, value in figures.items()))
    return figures


_PARAMETERS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "optim": "adamw_torch",
}


@contextmanager
def _started(site: TrainingSite, side: str, case: str, work: Path) -> Iterator[Side]:
    """A training that waits before its first step."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [site.job_python, str(Path(__file__).with_name("training_steps.py")), side, case, str(BLOCK)],
        cwd=work,
        env=site.environment(work) | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        started = Side(process)
        try:
            started.answer()
        except OpenWeightsError as exc:
            log = (work / f"{side}.log").read_text(encoding="utf-8", errors="replace")
            raise OpenWeightsError(f"{exc}\n{log[-2000:]}") from None
        say(f"{case}: {side} is ready after {time.perf_counter() - began:.0f} s")
        yield started
    finally:
        process.kill()
        process.wait()


def summary(figures: dict[str, Figure]) -> str:
    """The table."""
    rows = [Row("", "ours", "bare TRL", "ratio")]
    for case in CASES:
        if f"{case}_step_ratio" in figures:
            ours, bare = (f"{figures[f'{case}_{name}_p50_ms']:.1f} ms" for name in ("step", "bare_step"))
            rows.append(Row(f"a step, {case}", ours, bare, f"{figures[f'{case}_step_ratio']}x"))
    if "warm_start_ratio" in figures:
        warm, fresh = (f"{figures[f'{kind}_first_step_p50_seconds']:.2f} s" for kind in ("warm", "fresh"))
        rows.append(
            Row("start to first step, warm and fresh", warm, fresh, f"{figures['warm_start_ratio']}x")
        )
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
