from __future__ import annotations

from typing import Any

import pytest

from openweights_prefect.provisioning.placement import Pod
from openweights_prefect.provisioning.provider import HostUnusable, ImageError, ProviderPod
from openweights_prefect.provisioning.reaper import (
    Limits,
    Verdict,
    counterpart,
    is_missing_for_good,
    judge,
    judge_log,
)

LIMITS = Limits(first_log_seconds=180, boot_seconds=1500)
NAME = "ow-1-pod-1"


def pod(status: str = "starting", **changes: Any) -> Pod:
    values: dict[str, Any] = {
        "id": "pod-1",
        "pod_id": "abc",
        "status": status,
        "docker_image": "image",
        "hardware": "1x L4",
        "price_per_hour": 1.0,
        "age_seconds": 30.0,
    }
    return Pod(**{**values, **changes})


def listed(pod_id: str = "abc", *, name: str = NAME, status: str = "RUNNING", **changes: Any) -> ProviderPod:
    values: dict[str, Any] = {
        "cost_per_hour": 1.0,
        "created_at": None,
        "runtime_up": True,
        "image": "image",
        "gpu_id": "NVIDIA L4",
        "gpu_count": 1,
    }
    return ProviderPod(id=pod_id, name=name, status=status, **{**values, **changes})


def test_a_pod_is_known_by_its_id_or_else_by_its_name() -> None:
    """A stranger of another name is nothing to us; a second pod of our name is one too many."""
    stranger = listed("xyz", name="ow-2-pod-1")
    twin = listed("def")
    assert counterpart(pod(), NAME, [stranger, listed(), twin]) == (listed(), [twin])
    assert counterpart(pod(pod_id=None), NAME, [stranger, twin, listed()]) == (listed(), [twin])
    assert counterpart(pod(), NAME, [stranger]) == (None, [])
    gone = listed(status="TERMINATED")
    assert counterpart(pod(pod_id=None), NAME, [gone]) == (None, [])


def test_a_pod_cannot_pass_for_somebody_elses() -> None:
    """The id is what it says of itself; the name was given by us."""
    stranger = listed("xyz", name="somebody-elses")
    assert counterpart(pod(pod_id="xyz"), NAME, [stranger]) == (None, [])


def test_no_twin_is_ended_while_our_own_pod_is_not_in_sight() -> None:
    """The list may have left it out."""
    assert counterpart(pod(pod_id="abc"), NAME, [listed("def")]) == (None, [])


def test_one_list_without_it_proves_nothing() -> None:
    assert not is_missing_for_good(pod("active"), 1, LIMITS)
    assert is_missing_for_good(pod("active"), 2, LIMITS)
    heard = Limits(first_log_seconds=180, boot_seconds=1500, heard_seconds=20)
    assert not is_missing_for_good(pod("busy", heartbeat_seconds=19.0), 9, heard)
    assert is_missing_for_good(pod("busy", heartbeat_seconds=21.0), 2, heard)
    assert is_missing_for_good(pod("lost", heartbeat_seconds=1.0), 2, heard)
    assert not is_missing_for_good(pod("starting"), 9, LIMITS)
    assert is_missing_for_good(pod("starting", age_seconds=91), 2, LIMITS)
    assert not is_missing_for_good(pod(pod_id=None, age_seconds=60), 9, LIMITS)
    assert is_missing_for_good(pod(pod_id=None, age_seconds=91), 2, LIMITS)


@pytest.mark.parametrize(
    ("seen", "held", "why"),
    [
        (pod("active"), listed(), None),
        (pod("busy", overdue_seconds=59), listed(), None),
        (pod("busy", overdue_seconds=61), listed(), "past its deadline"),
        (pod("busy"), listed(status="EXITED"), "RunPod says EXITED"),
        (pod("active"), listed(status="ERROR"), "RunPod says ERROR"),
        (pod("active"), listed(runtime_up=False), None),
        (pod("draining", reason="idle"), listed(), "idle"),
        (pod("starting", age_seconds=1499), listed(), None),
        (pod("starting", age_seconds=1501), listed(), "no sign of life 1500 s after it was bought"),
        (pod("starting"), listed(host="bad"), "host bad was unusable before"),
        (pod("starting", shutdown_requested=True), listed(), "told to end before it had begun"),
        (pod("busy", shutdown_requested=True), listed(), None),
        (pod("busy"), listed(host="bad"), None),
    ],
)
def test_why_a_pod_ends(seen: Pod, held: ProviderPod, why: str | None) -> None:
    """RunPod's word that it runs means nothing; its word that it does not is enough."""
    verdict = judge(seen, held, LIMITS, {"bad"})
    assert (verdict and verdict.why) == why


def test_who_is_to_blame() -> None:
    assert judge(pod("lost", reason="unusable host: 1 of 2 GPUs"), listed(), LIMITS, ()) == Verdict(
        "unusable host: 1 of 2 GPUs", blame="machine"
    )
    silent = judge(pod(age_seconds=2000), listed(), LIMITS, ())
    assert silent is not None
    assert silent.blame == "machine"
    avoided = judge(pod(), listed(host="bad"), LIMITS, {"bad"})
    assert avoided is not None
    assert not avoided.counts


def test_what_the_machine_says() -> None:
    """No word in three minutes: there is no machine. An image that cannot be pulled blames no host."""
    assert judge_log(pod(), [], None, LIMITS) is None
    late = judge_log(pod(age_seconds=181), [], None, LIMITS)
    assert late is not None
    assert "no machine" in late.why
    assert judge_log(pod(age_seconds=181), ["create container x"], None, LIMITS) is None
    assert judge_log(pod(), ["x"], ImageError("no image"), LIMITS) == Verdict("no image", blame="image")
    bad = judge_log(pod(), ["x"], HostUnusable("cuda"), LIMITS)
    assert bad == Verdict("unusable host: cuda", blame="machine")


def test_a_container_that_starts_again_and_again_is_given_up() -> None:
    """RunPod restarts what exits, and bills on."""
    assert judge_log(pod(), ["start container for x: begin"] * 3, None, LIMITS) is None
    looping = judge_log(pod(), ["start container for x: begin"] * 4, None, LIMITS)
    assert looping is not None
    assert "ended 3 times" in looping.why
