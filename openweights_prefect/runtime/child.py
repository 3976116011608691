"""Becomes the given command, but dies with its parent: `python -I -S child.py COMMAND [ARG ...]`.

A run whose flow process was killed must not leave its entrypoint behind. Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask Linux for SIGKILL when the parent ends; elsewhere the agent's sweep does it."""
    if sys.platform != "linux":
        return
    import ctypes  # costs milliseconds that other platforms need not pay

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(os.getppid())
    os.execvp(sys.argv[1], sys.argv[1:])
