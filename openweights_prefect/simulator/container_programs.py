"""The programs of the built-in images; run as a file, with the standard library alone."""

from __future__ import annotations

import http.server
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


def _serve(port: str) -> NoReturn:
    listen = int(os.environ.get(f"RUNPOD_SIM_LISTEN_{port}", port))
    handler = http.server.SimpleHTTPRequestHandler
    http.server.ThreadingHTTPServer(("127.0.0.1", listen), handler).serve_forever()
    raise AssertionError("unreachable: it serves until it is killed")


def _exit(name: str) -> NoReturn:
    """`exit:<code>` or `exit-after:<seconds>:<code>`."""
    words = name.split(":")
    if words[0] == "exit-after":
        time.sleep(float(words[1]))
    print(f"exiting with {name}", flush=True)
    sys.exit(int(words[-1]))


def _out_of_memory() -> NoReturn:
    """Die as by the kernel's out-of-memory killer, without taking the memory."""
    print("Killed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    _sleep()


def main(name: str) -> None:
    """Run the program of the built-in image `sim/<name>`."""
    if name.startswith("exit"):
        _exit(name)
    if name.startswith("http:"):
        _serve(name.removeprefix("http:"))
    programs = {
        "sleep": _sleep,
        "ignore-term": _ignore_term,
        "env-dump": _env_dump,
        "fork": _fork,
        "oom": _out_of_memory,
        "orphan": _orphan,
    }
    programs[name]()


if __name__ == "__main__":
    main(sys.argv[1])
