"""The programs of the built-in images; run as a file, with the standard library alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn


def _sleep() -> NoReturn:
    while True:
        time.sleep(3600)


def _ignore_term() -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ignoring SIGTERM", flush=True)
    _sleep()


def _env_dump() -> NoReturn:
    print(json.dumps(dict(os.environ)), flush=True)
    _sleep()


def _fork() -> NoReturn:
    """Start a child in the group, one in a session of its own, and an orphan; write down their ids."""
    sleeper = [sys.executable, "-I", "-S", __file__, "ignore-term"]
    child = subprocess.Popen(sleeper)
    session = subprocess.Popen(sleeper, start_new_session=True)
    orphan = [sys.executable, "-I", "-S", __file__, "orphan"]
    subprocess.run(orphan, check=True, start_new_session=True)
    orphan_pid = int(Path("orphan").read_text(encoding="utf-8"))
    # Written whole, then renamed: a reader never sees half of it.
    Path("pids.new").write_text(
        json.dumps([os.getpid(), child.pid, session.pid, orphan_pid]), encoding="utf-8"
    )
    Path("pids.new").rename("pids.json")
    _sleep()


def _orphan() -> None:
    orphan = subprocess.Popen([sys.executable, "-I", "-S", __file__, "ignore-term"], start_new_session=True)
    Path("orphan").write_text(str(orphan.pid), encoding="utf-8")
    orphan.returncode = 0  # Left behind on purpose: no warning that it still runs.


def main(name: str) -> None:
    """Run the program of the built-in image `sim/<name>`."""
    if name.startswith("exit:"):
        print(f"exiting with {name}", flush=True)
        sys.exit(int(name.removeprefix("exit:")))
    programs = {
        "sleep": _sleep,
        "ignore-term": _ignore_term,
        "env-dump": _env_dump,
        "fork": _fork,
        "orphan": _orphan,
    }
    programs[name]()


if __name__ == "__main__":
    main(sys.argv[1])
