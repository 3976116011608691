"""How fast a large file goes into the local store, beside `sha256sum` and `cp` of the same file.

`make bench-files`, or `python benchmarks/files.py` in the control environment. Needs no network, but two
minutes, and three times the size of the file on the disk. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from figures import Figure, Limit, Row, all_met, document, p50, table, verdicts
from scratch import say, temporary_folder

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.files.hashing import digest_path
from openweights_prefect.files.store import LocalFileStore
from openweights_prefect.types.identity import file_id

ORGANIZATION = "00000000-0000-0000-0000-000000000001"
GOALS = (
    Limit("upload_ratio", "at_least", 0.8),
    Limit("fetch_ratio", "at_least", 0.8),
    Limit("memory_growth_mb", "at_most", 50),
)
AIMS = (Limit("upload_ratio_to_fast_tools", "at_least", 0.8),)

_BLOCK = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2048, help="size of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to make it; the default is $TMPDIR")
    parser.add_argument("--child", nargs=3, metavar=("STEP", "SOURCE", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]), Path(options.child[2]))))
        return 0
    try:
        with temporary_folder(options.folder) as folder:
            figures = measure(folder, options.megabytes * _BLOCK, options.rounds)
    except (OpenWeightsError, OSError, subprocess.CalledProcessError) as exc:
        print(f"The benchmark could not be done: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"\n{summary(figures)}\n")
    print(verdicts(GOALS, figures, word="goal"), verdicts(AIMS, figures, word="aim"), sep="\n")
    print(document("files", figures, goals=GOALS, aims=AIMS))
    return 0 if all_met(GOALS, figures) else 1


def measure(folder: Path, size: int, rounds: int) -> dict[str, Figure]:
    """Medians of steps that take turns; every step finds the file in the page cache and a disk at rest."""
    source, copy, store, scratch = (folder / name for name in ("source", "copy", "store", "scratch"))
    say(f"Writing {size >> 20} MB to {str(source)!r}")
    fill(source, size)
    seconds: dict[str, list[float]] = {}
    growth: list[float] = []

    def step(name: str, work: Callable[[], float]) -> None:
        # A virtual machine may have to get memory from its host, which takes longer than a copy; after this,
        # every step finds as much of it as it needs.
        fill(scratch, size)
        scratch.unlink()
        os.sync()
        seconds.setdefault(name, []).append(work())

    def ours(name: str) -> float:
        command = [sys.executable, __file__, "--child", name, str(source), str(store)]
        answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        growth.append(answer["memory_growth_mb"])
        return float(answer["seconds"])

    for number in range(rounds):
        step("sha256sum", lambda: run("sha256sum", str(source)))
        step("upload", lambda: ours("upload"))
        step("cp", lambda: run("cp", str(source), str(copy)))
        copy.unlink()
        step("fetch", lambda: ours("fetch"))
        step("fast_hash", lambda: run(*fast_hash(), str(source)))
        shutil.rmtree(store)
        say(
            f"Round {number + 1} of {rounds}: "
            + ", ".join(f"{key} {all_[-1]:.2f} s" for key, all_ in seconds.items())
        )
    return summed_up({name: p50(values) for name, values in seconds.items()}, max(growth), size)


def child(name: str, source: Path, root: Path) -> dict[str, float]:
    """One step of ours in a process of its own: how long it took, and by how much its memory grew."""
    store = LocalFileStore(root)
    identity = file_id("benchmark", digest_path(source, ORGANIZATION).id_hex12) if name == "fetch" else ""
    before = peak_bytes()
    started = time.perf_counter()
    if name == "upload":
        identity = file_id("benchmark", digest_path(source, ORGANIZATION).id_hex12)
        store.put(identity, ORGANIZATION, source)
    else:
        store.fetch(identity, ORGANIZATION, root / "fetched")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory_growth_mb": (peak_bytes() - before) / 1e6}


def peak_bytes() -> int:
    """The most memory that this process has held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:  # Not Linux, whose own count would go on with that of the parent process.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def summed_up(seconds: dict[str, float], growth: float, size: int) -> dict[str, Figure]:
    """The figures."""
    tools = seconds["sha256sum"] + seconds["cp"]
    # The upload reads the file twice: its id must be known before anything is sent.
    return {
        "megabytes": size >> 20,
        **{f"{name}_p50_seconds": round(value, 3) for name, value in seconds.items()},
        "tools_p50_seconds": round(tools, 3),
        "upload_ratio": round(tools / seconds["upload"], 3),
        "fetch_ratio": round(tools / seconds["fetch"], 3),
        "upload_ratio_to_fast_tools": round((seconds["fast_hash"] + seconds["cp"]) / seconds["upload"], 3),
        "upload_mb_per_second": round((size >> 20) / seconds["upload"], 1),
        "memory_growth_mb": round(growth, 1),
        "cpus": os.cpu_count() or 0,
    }


def summary(figures: dict[str, Figure]) -> str:
    """The table."""

    def row(what: str, name: str, ratio: str) -> Row:
        ours, tools = f"{figures[f'{name}_p50_seconds']:.2f} s", f"{figures['tools_p50_seconds']:.2f} s"
        return Row(what, ours, tools, f"{figures[ratio]}x")

    return table(
        [
            Row(f"{figures['megabytes']} MB", "ours", "sha256sum + cp", "ratio"),
            row("hash and upload", "upload", "upload_ratio"),
            row("fetch and verify", "fetch", "fetch_ratio"),
            Row("memory that it took", f"{figures['memory_growth_mb']} MB"),
        ]
    )


def run(*command: str) -> float:
    """Seconds that a command takes."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def fast_hash() -> tuple[str, ...]:
    """The quickest program for the same digest: `sha256sum` is seldom built for the processor's own way."""
    return ("openssl", "dgst", "-sha256") if shutil.which("openssl") else ("sha256sum",)


def fill(path: Path, size: int) -> None:
    """Write a file that nothing can compress, and have it in the page cache."""
    block = os.urandom(_BLOCK)
    with path.open("wb") as file:
        for number in range(size // _BLOCK):
            file.write(number.to_bytes(8, "big") + block[8:])


if __name__ == "__main__":
    sys.exit(main())
