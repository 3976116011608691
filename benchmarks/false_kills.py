"""How many simulated fault hours pass without a false kill, and how soon a dead pod is noticed: prints JSON.

python benchmarks/false_kills.py --pod-hours 10000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.simulation.fault_hours import Measured, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pod-hours", type=float, default=10_000)
    parser.add_argument("--pods", type=int, default=25)
    parser.add_argument("--hours", type=float, default=8.0, help="of one stretch")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    total = Measured()
    seed = 0
    with multiprocessing.Pool(given.processes) as pool:
        while total.pod_hours < given.pod_hours:
            stretch = partial(measure, pods=given.pods, hours=given.hours)
            for found in pool.map(stretch, range(seed, seed + given.processes)):
                _add(total, found)
            seed += given.processes
            print(f"{total.pod_hours:.0f} pod-hours, {total.false_kills} false kills", file=sys.stderr)
    print(json.dumps(total.summary()))


def _add(total: Measured, found: Measured) -> None:
    total.pod_hours += found.pod_hours
    total.false_kills += found.false_kills
    total.deaths += found.deaths
    total.noticed_seconds += found.noticed_seconds
    total.why += found.why
    for name, count in found.faults.items():
        total.faults[name] = total.faults.get(name, 0) + count


if __name__ == "__main__":
    main()
