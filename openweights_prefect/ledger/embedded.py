"""Runs a private PostgreSQL server for the local stack: a folder in, a running server out.

The server outlives the process that started it, listens on a Unix socket only, and lets in nobody but the
account that started it (`peer` authentication).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import filelock

from openweights_prefect.errors import StackError
from openweights_prefect.ledger import embedded_layout
from openweights_prefect.ledger.binaries import PostgresBinaries, find_binaries
from openweights_prefect.ledger.embedded_layout import PORT, Layout
from openweights_prefect.ledger.postmaster import clear_stale_files, find_postmaster

_POLL_SECONDS = 0.05
_NEW_DATA_BYTES = 150_000_000  # An empty cluster takes 39 MB and its write-ahead log grows at once.
_CROWDED_DISK_BYTES = 100_000_000
_LONGEST_LOG_BYTES = 10_000_000


@dataclass(frozen=True)
class EmbeddedPostgres:
    """The server of one folder, as `start()` returns it."""

    folder: Path

    def url(self, *, database: str = "openweights", user: str = "postgres") -> str:
        """A libpq URL over the Unix socket; `user` is `postgres`, `authenticator` or `prefect`."""
        socket_folder = embedded_layout.locate(self.folder).socket_folder
        address = f"host={quote(str(socket_folder))}&port={PORT}"  # Without the port, PGPORT would count.
        return f"postgresql://{quote(user, safe='')}@/{quote(database, safe='')}?{address}"


def start(
    folder: Path, *, timeout_seconds: float = 60, fsync: bool = True, binaries: PostgresBinaries | None = None
) -> EmbeddedPostgres:
    """Start the server of `folder`, creating its data if there is none; returns when it accepts connections.

    Idempotent, also for concurrent callers: a running server is adopted as it is. `fsync=False` is for tests:
    it is faster and loses data with the machine. Raises `StackError`. Where the data lies:
    `embedded_layout.locate()`.
    """
    deadline = time.monotonic() + timeout_seconds
    with _os_errors_as_stack_errors(folder):
        folder.expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
        layout = embedded_layout.locate(folder)
        with _exclusive(layout, deadline):
            _await_end_of_shutdown(layout, deadline)
            if find_postmaster(layout) is None:
                _prepare_and_launch(layout, binaries or find_binaries(), deadline, fsync=fsync)
            _await_ready(layout, deadline)
    return EmbeddedPostgres(layout.folder)


def stop(folder: Path, *, timeout_seconds: float = 30) -> bool:
    """Shut the server of `folder` down, ending its connections; False when it was not running."""
    deadline = time.monotonic() + timeout_seconds
    with _os_errors_as_stack_errors(folder):
        layout = embedded_layout.locate(folder)
        if not layout.folder.is_dir():
            return False
        with _exclusive(layout, deadline):
            return _shut_down(layout, deadline)


def is_running(folder: Path) -> bool:
    """Whether the server of `folder` has a live process, ready or not."""
    with _os_errors_as_stack_errors(folder):
        return find_postmaster(embedded_layout.locate(folder)) is not None


def remove(folder: Path, *, timeout_seconds: float = 30) -> None:
    """Stop the server of `folder` and delete everything it has, wherever that lies; idempotent."""
    deadline = time.monotonic() + timeout_seconds
    with _os_errors_as_stack_errors(folder):
        layout = embedded_layout.locate(folder)
        if layout.folder.is_dir():
            with _exclusive(layout, deadline):
                _shut_down(layout, deadline)
                for place in (layout.socket_folder, layout.base, layout.folder):
                    if place.is_dir():
                        shutil.rmtree(place)


def _prepare_and_launch(layout: Layout, binaries: PostgresBinaries, deadline: float, *, fsync: bool) -> None:
    data = layout.data(binaries.major)
    others = sorted(set(layout.data_folders()) - {binaries.major})
    if others and not data.is_dir():
        raise StackError(
            f"{str(layout.data(others[-1]))!r} was made by PostgreSQL {others[-1]}, but "
            f"{str(binaries.folder)!r} is PostgreSQL {binaries.major}, which cannot read it. Install the "
            f"programs of version {others[-1]}, or dump the data with those and restore it into a new "
            "folder (`pg_dumpall`)."
        )
    embedded_layout.prepare(layout)
    binaries = _runnable(binaries, layout)
    if not data.is_dir():
        _initialize(data, layout, binaries, deadline, fsync=fsync)
    clear_stale_files(layout, data, deadline)
    _launch(data, layout, binaries, deadline, fsync=fsync)


def _runnable(binaries: PostgresBinaries, layout: Layout) -> PostgresBinaries:
    """The same programs in a place from which the server's account may run them."""
    if not layout.shared:
        return binaries
    if _can_run(binaries, layout):
        return binaries
    copy = binaries.copy_to(layout.base / f"postgresql-{binaries.version}")
    if _can_run(copy, layout):
        return copy
    raise StackError(
        f"The account {layout.account.name!r} cannot run {str(binaries.postgres)!r}, and PostgreSQL refuses "
        "to run as root. Run as an ordinary user, or set `OW_DATABASE_URL` to a PostgreSQL server of your "
        "own."
    )


def _can_run(binaries: PostgresBinaries, layout: Layout) -> bool:
    try:
        probe = layout.account.spawn([binaries.initdb, "--version"], output=subprocess.DEVNULL)
    except PermissionError:
        return False
    return probe.wait(timeout=30) == 0


def _initialize(
    data: Path, layout: Layout, binaries: PostgresBinaries, deadline: float, *, fsync: bool
) -> None:
    free = shutil.disk_usage(layout.base).free
    if free < _NEW_DATA_BYTES:
        raise StackError(
            f"A new PostgreSQL data folder needs {_NEW_DATA_BYTES // 10**6} MB, but {str(layout.base)!r} "
            f"has only {free // 10**6} MB free. Make room, or set `OW_HOME` to a folder on another disk."
        )
    for unfinished in layout.base.glob("new-data-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    # Created under another name: a data folder that exists is complete.
    new = Path(tempfile.mkdtemp(prefix="new-data-", dir=layout.base))
    if layout.shared:
        os.chown(new, layout.account.uid, layout.account.gid)
    options = ["--username=postgres", "--auth=reject", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    log_start = _log_size(layout)
    with _open_log(layout) as log:
        process = layout.account.spawn(
            [binaries.initdb, f"--pgdata={new}", *options, *([] if fsync else ["--no-sync"])], output=log
        )
    try:
        code = process.wait(timeout=max(deadline - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if code != 0:
        raise _failure(layout, f"`initdb` could not create {str(data)!r} (exit code {code})", log_start)
    new.rename(data)


def _launch(data: Path, layout: Layout, binaries: PostgresBinaries, deadline: float, *, fsync: bool) -> None:
    settings = {
        "listen_addresses": "",
        "port": str(PORT),
        "unix_socket_directories": str(layout.socket_folder),
        "hba_file": str(layout.access_rules),
        "ident_file": str(layout.account_map),
        "shared_buffers": "64MB",
        "max_connections": "400",  # a pod of the stack holds two, and up to five at its busiest
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_checkpoints": "off",
        "fsync": "on" if fsync else "off",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    if _log_size(layout) > _LONGEST_LOG_BYTES:
        layout.log.replace(layout.log.with_suffix(".log.1"))
    log_start = _log_size(layout)
    with _open_log(layout) as log:
        process = layout.account.spawn([binaries.postgres, "-D", data, *options], output=log)
    # Reaps the server if it ends before us; a zombie would look alive to others.
    threading.Thread(target=process.wait, name="embedded-postgres-reaper", daemon=True).start()
    while find_postmaster(layout) is None:
        if process.poll() is not None:
            raise _failure(layout, f"PostgreSQL ended at once (exit code {process.returncode})", log_start)
        if time.monotonic() > deadline:
            raise _failure(layout, "PostgreSQL did not come up in time", log_start)
        time.sleep(_POLL_SECONDS)


def _await_ready(layout: Layout, deadline: float) -> None:
    while True:
        postmaster = find_postmaster(layout)
        if postmaster is None:
            raise _failure(layout, "PostgreSQL ended while it was starting", 0)
        if postmaster.status == "ready":
            return
        if time.monotonic() > deadline:
            what = f"PostgreSQL (process {postmaster.pid}) is still starting; wait and start again"
            raise _failure(layout, what, 0)
        time.sleep(_POLL_SECONDS)


def _shut_down(layout: Layout, deadline: float) -> bool:
    postmaster = find_postmaster(layout)
    if postmaster is None:
        return False
    os.kill(postmaster.pid, signal.SIGINT)  # PostgreSQL's fast shutdown: rolls back, writes all, ends.
    while find_postmaster(layout) is not None:  # Our lock keeps others from starting the next one.
        if time.monotonic() > deadline:
            raise _failure(layout, f"PostgreSQL (process {postmaster.pid}) did not shut down in time", 0)
        time.sleep(_POLL_SECONDS)
    return True


def _await_end_of_shutdown(layout: Layout, deadline: float) -> None:
    """A server that somebody else is stopping can neither be adopted nor replaced before it has ended."""
    while (postmaster := find_postmaster(layout)) is not None and postmaster.status == "stopping":
        if time.monotonic() > deadline:
            raise _failure(
                layout, f"PostgreSQL (process {postmaster.pid}) is shutting down and does not end", 0
            )
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _exclusive(layout: Layout, deadline: float) -> Iterator[None]:
    path = layout.folder / "postgres.lock"
    try:
        with filelock.FileLock(path, timeout=max(deadline - time.monotonic(), 0), mode=0o600):
            yield
    except filelock.Timeout as exc:
        raise StackError(
            f"Another process has been starting or stopping the server of {str(layout.folder)!r} all the "
            f"time: it holds {str(path)!r}. Try again, or end that process."
        ) from exc


@contextlib.contextmanager
def _os_errors_as_stack_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StackError(
            f"The embedded PostgreSQL server of {str(folder)!r} cannot be used: {exc}. Set `OW_HOME` to a "
            "folder that you can write to, with free space, or `OW_DATABASE_URL` to a PostgreSQL server of "
            "your own."
        ) from exc


def _open_log(layout: Layout) -> BinaryIO:
    layout.log.touch(mode=0o600)  # It may quote what users wrote.
    return layout.log.open("ab")


def _log_size(layout: Layout) -> int:
    return layout.log.stat().st_size if layout.log.exists() else 0


def _failure(layout: Layout, what: str, log_start: int) -> StackError:
    """A `StackError` that carries the end of what the log has said since `log_start`."""
    _open_log(layout).close()
    with layout.log.open("rb") as log:
        log.seek(max(log_start, _log_size(layout) - 4000))
        lines = log.read().decode("utf-8", "replace").splitlines()[-10:]
    free = shutil.disk_usage(layout.base).free
    disk = f" The disk has only {free // 10**6} MB free: make room." if free < _CROWDED_DISK_BYTES else ""
    tail = "\n".join(f"    {line}" for line in lines)
    return StackError(f"{what}.{disk} The end of {str(layout.log)!r}:\n{tail}")
