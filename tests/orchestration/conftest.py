"""A real Prefect server for the tests of this folder that ask for one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before Prefect is imported: it would report to its makers.
os.environ["DO_NOT_TRACK"] = "1"

from tests.credentials.prefect_server import PrefectServer, running


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server on SQLite."""
    with running(tmp_path_factory.mktemp("prefect")) as server:
        yield server
