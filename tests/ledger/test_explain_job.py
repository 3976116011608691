"""What the ledger tells about a waiting job, and what the control plane tells the ledger."""

from __future__ import annotations

from typing import Any

import pytest

from openweights_prefect.errors import InvalidRequestError, PermissionDeniedError
from openweights_prefect.stack.databases import create_organization
from tests.callers import Callers
from tests.conftest import OpenLedger

OTHERS = "00000000-0000-0000-0000-0000000000b0"
LIMITS = {"max_workers": 8, "paused": None}


def submit(ledger: Callers, name: str, **needs: Any) -> None:
    job = {"id": name, "type": "probe", "docker_image": "i", "entrypoint": "true", **needs}
    ledger.call("submit_job", job=job)


def explained(ledger: Callers, name: str) -> dict[str, Any]:
    [row] = ledger.person.call("explain_job", job_id=name)
    return row


def test_a_job_has_its_place(ledger: Callers) -> None:
    """By priority, then by age; those before it, the nearest first, and how many of them need the same."""
    submit(ledger, "a")
    submit(ledger, "b", requires_vram_gb=40)
    submit(ledger, "c")
    submit(ledger, "urgent", priority=9)
    row = explained(ledger, "c")
    assert (row["position"], row["waiting_total"], row["ahead_for_same_pods"]) == (4, 4, 2)
    assert [each["job_id"] for each in row["ahead"]] == ["b", "a", "urgent"]
    assert row["ahead"][-1] == {"job_id": "urgent", "type": "probe", "priority": 9}
    assert explained(ledger, "urgent")["ahead"] == []


def test_what_does_not_wait_has_no_place(ledger: Callers) -> None:
    """And an unknown job no row."""
    submit(ledger, "a")
    ledger.call("cancel_job", job_id="a")
    row = explained(ledger, "a")
    assert (row["position"], row["ahead"], row["waiting_total"]) == (None, [], 0)
    assert row["cost"]["total_usd"] == 0
    assert ledger.person.call("explain_job", job_id="b") == []


def test_a_catalogue_is_replaced(ledger: Callers) -> None:
    """By what the control plane sees now, which may be nothing."""
    submit(ledger, "a")
    assert explained(ledger, "a")["catalogue"] is None
    for offers in ([{"key": "x"}], [{"key": "y"}, {"key": "z"}], []):
        ledger.control.call("publish_catalogue", offers=offers, limits=LIMITS)
        catalogue = explained(ledger, "a")["catalogue"]
        assert (catalogue["offers"], catalogue["limits"]) == (offers, LIMITS)
        assert catalogue["age_seconds"] < 60
    with pytest.raises(InvalidRequestError):
        ledger.control.call("publish_catalogue", offers={"key": "x"}, limits=LIMITS)


def test_refusals_are_counted_until_they_are_cleared(ledger: Callers) -> None:
    """The newest reason and time count; one that ran out is still told."""
    submit(ledger, "a")
    note = ledger.control.call
    assert note("note_refusal", subject="x", why="first", seconds=60)[0]["failures"] == 1
    assert note("note_refusal", subject="x", why="second", seconds=600)[0]["failures"] == 2
    note("note_refusal", subject="host:1", why="bad", seconds=0)
    refusals = explained(ledger, "a")["refusals"]
    assert (refusals["x"]["failures"], refusals["x"]["reason"]) == (2, "second")
    assert refusals["x"]["seconds_left"] == pytest.approx(600, abs=60)
    assert refusals["host:1"]["seconds_left"] <= 0
    note("clear_refusal", subject="x")
    note("clear_refusal", subject="x")
    assert set(explained(ledger, "a")["refusals"]) == {"host:1"}
    assert note("note_refusal", subject="x", why="again", seconds=60)[0]["failures"] == 1
    with pytest.raises(InvalidRequestError):
        note("note_refusal", subject="x", why="for ever", seconds=10**9)


def test_only_the_control_plane_writes_them(ledger: Callers) -> None:
    for function, arguments in (
        ("publish_catalogue", {"offers": [{"key": "x"}], "limits": {}}),
        ("note_refusal", {"subject": "x", "why": "y", "seconds": 1}),
        ("clear_refusal", {"subject": "x"}),
    ):
        with pytest.raises(PermissionDeniedError):
            ledger.person.call(function, **arguments)


def test_others_are_not_seen(ledger: Callers, ledger_url: str, open_ledger: OpenLedger) -> None:
    """Each organization has its own catalogue, refusals and line."""
    create_organization(ledger_url, OTHERS)
    others = open_ledger(OTHERS)
    for caller, reason in ((ledger, "ours"), (others, "theirs")):
        submit(caller, "a")
        caller.control.call("publish_catalogue", offers=[{"key": reason}], limits=LIMITS)
        caller.control.call("note_refusal", subject="x", why=reason, seconds=60)
    submit(ledger, "b")
    for caller, reason, waiting in ((ledger, "ours", 2), (others, "theirs", 1)):
        row = explained(caller, "a")
        assert row["catalogue"]["offers"] == [{"key": reason}]
        assert row["refusals"]["x"]["reason"] == reason
        assert row["waiting_total"] == waiting
    assert others.person.call("explain_job", job_id="b") == []
