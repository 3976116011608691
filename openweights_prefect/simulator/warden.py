"""Outlives the simulator by a moment: kills what its pods leave when it is killed itself.

A container dies with its parent by PR_SET_PDEATHSIG, but what it started does not. This process holds the
reading end of a pipe; when the simulator is gone, for whatever reason, the pipe ends and the sweep begins.
"""

from __future__ import annotations

import signal
import subprocess
import sys

from openweights_prefect.simulator.processes import sweep


def start_warden(instance: str) -> subprocess.Popen[bytes]:
    """Start the warden of this process; it ends after this process, or when its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, instance],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def _main(instance: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(instance)


if __name__ == "__main__":
    _main(sys.argv[1])
