"""One local stack for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_stack import Stack

from openweights_prefect import OpenWeights
from openweights_prefect.ledger import embedded


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The stack of this session; nothing of it is left afterwards."""
    parent = Path(tempfile.mkdtemp(prefix="ow-faults-"))
    parent.chmod(0o755)  # PostgreSQL of root runs as another account
    stack = Stack(parent / "home")
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
        left = [(process.pid, process.cmdline()) for process in stack.processes()]
        if keep := os.environ.get("OW_TEST_KEEP"):
            shutil.copytree(stack.home / "logs", Path(keep) / "logs", dirs_exist_ok=True)
            shutil.copytree(stack.home / "simulator", Path(keep) / "simulator", dirs_exist_ok=True)
        embedded.remove(stack.home / "postgres")
        shutil.rmtree(parent)
        assert left == []


@pytest.fixture
def ow(stack: Stack) -> Iterator[OpenWeights]:
    """A client of the stack."""
    with OpenWeights(settings=stack.settings) as client:
        yield client
