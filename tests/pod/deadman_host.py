"""A pod with a dead-man: `python deadman_host.py FOLDER GRACE`. Its agent starts two programs, and sleeps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from openweights_prefect.pod import deadman
from openweights_prefect.pod.deadline import Deadline


def main(folder: Path, grace: str) -> None:
    """Start everything, write down who is who, sleep."""
    deadline = Deadline.of_pod(folder, os.environ)
    guard = deadman.start(deadline, os.environ, grace_seconds=float(grace))
    ours = [subprocess.Popen(["sleep", "600"], start_new_session=session) for session in (False, True)]
    pids = [os.getpid(), guard, *(process.pid for process in ours)]
    (folder / "unfinished").write_text(" ".join(map(str, pids)))
    (folder / "unfinished").rename(folder / "pids")
    time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
