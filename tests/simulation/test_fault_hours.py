"""Pods that are alive are left alone, whatever stutters; those that died are noticed."""

from __future__ import annotations

import pytest

from tests.simulation.fault_hours import measure


@pytest.mark.timeout(600)
def test_no_pod_that_lives_is_killed() -> None:
    """Short freezes, cuts, outages and bad lists kill nothing; most deaths are noticed within 45 seconds."""
    found = measure(1, pods=12, hours=4.0)
    assert found.pod_hours > 20
    assert found.false_kills == 0, found.why
    assert found.deaths > 5
    soon = [seconds for seconds in found.noticed_seconds if seconds <= 45]
    assert len(soon) >= 0.8 * len(found.noticed_seconds)
