"""What the tests of a pod's parts share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from runpod_api import RunPodApi


@pytest.fixture
def runpod() -> Iterator[RunPodApi]:
    """A RunPod on this machine."""
    api = RunPodApi()
    yield api
    api.close()
