"""Lets one process at a time start or stop the stack of a home."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import filelock

from openweights_prefect.errors import StackError
from openweights_prefect.stack.service import Folders

_PATIENCE_SECONDS = 400.0  # Longer than any start takes.


@contextlib.contextmanager
def exclusive(folders: Folders, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the home; waits for another `ow up` or `ow down`, and says so."""
    lock = filelock.FileLock(folders.lock, mode=0o600)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress("Another `ow up` or `ow down` is at work; waiting for it")
        try:
            lock.acquire(timeout=_PATIENCE_SECONDS)
        except filelock.Timeout as exc:
            raise StackError(
                f"Another process has held {str(folders.lock)!r} for {_PATIENCE_SECONDS:.0f} s. "
                "End it and try again."
            ) from exc
    try:
        yield
    finally:
        lock.release()
