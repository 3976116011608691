"""`job.explain()`: what is in the way and how to mend it, when it starts, what it costs."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import NotFoundError
from openweights_prefect.resources.explanation import explain_job
from openweights_prefect.resources.job import Job
from openweights_prefect.settings import Settings
from openweights_prefect.types.explanation import Explanation, span, usd
from tests.callers import Callers, bootstrap_hash
from tests.ledger.bills import Bills, open_bills
from tests.sdk.conftest import RecordingLedger

IMAGE = "image"
LIMITS = {"max_workers": 2, "idle_seconds": 300, "pod_ttl_hours": 24, "paused": None}
L4 = {"gpu_id": "NVIDIA L4", "gpu_name": "L4", "count": 1, "cloud": "SECURE", "price_per_hour": 0.49,
      "memory_gb": 24, "availability": "LOW", "hardware": "1x L4", "key": "NVIDIA L4|1|SECURE"}  # fmt: skip
A40 = {"gpu_id": "NVIDIA A40", "gpu_name": "A40", "count": 1, "cloud": "SECURE", "price_per_hour": 0.6,
       "memory_gb": 48, "availability": "HIGH", "hardware": "1x A40",
       "key": "NVIDIA A40|1|SECURE"}  # fmt: skip


class Scene:
    """A ledger as the control plane and pods leave it."""

    def __init__(self, ow: OpenWeights, callers: Callers, bills: Bills) -> None:
        self.ow = ow
        self.call = callers.call
        self.control = callers.control.call
        self.bills = bills

    def publish(self, *offers: dict[str, Any], **limits: Any) -> None:
        self.control("publish_catalogue", offers=list(offers or (L4, A40)), limits={**LIMITS, **limits})

    def job(self, name: str = "a", **needs: Any) -> Job:
        wanted = {
            "id": name,
            "type": "probe",
            "docker_image": IMAGE,
            "entrypoint": "true",
            "requires_vram_gb": 10,
        }
        [answer] = self.call("submit_job", job={**wanted, **needs})
        assert answer["outcome"] == "new"
        return self.ow.jobs.retrieve(name)

    def pod(self, name: str = "p", *, registered: bool = True, **details: Any) -> str:
        row = {"id": name, "docker_image": IMAGE, "hardware": "1x L4", "gpu_type": "NVIDIA L4",
               "gpu_count": 1, "vram_gb": 19, "cloud": "SECURE", "price_per_hour": 0.5}  # fmt: skip
        self.call(
            "intend_pod",
            pod={**row, **details},
            bootstrap_hash=bootstrap_hash(name),
            ttl_seconds=3600,
            max_pods=99,
        )
        self.call("record_pod", for_worker=name, provider_id=f"provider-{name}", price=row["price_per_hour"])
        if registered:
            self.call("register_pod", for_worker=name, as_boot=_uuid(name), lease_seconds=600, models=[])
        return name

    def open(self, job: Job, pod: str) -> str:
        run = _uuid(f"{job.id} {job.attempt}")
        self.call("record_flow_run", for_job=job.id, for_attempt=job.attempt, flow_run=run)
        [answer] = self.call("open_run", for_run=run, for_worker=pod, as_boot=_uuid(pod))
        assert answer["outcome"] == "opened", answer
        return run

    def history(self) -> None:
        """A pod that took four minutes to come up, and a job that ran for half an hour."""
        pod, start = self.bills.pod("earlier"), datetime.now(UTC) - timedelta(days=1)
        run = self.bills.run(self.bills.job("earlier"), pod)
        execute = self.bills.connection.execute
        execute(
            "update ledger.worker set created_at = %s, active_at = %s where id = %s",
            [start, start + timedelta(minutes=4), pod],
        )
        execute(
            "update ledger.runs set started_at = %s, finished_at = %s where id = %s",
            [start, start + timedelta(minutes=30), run],
        )

    def age(self, pod: str, seconds: float) -> None:
        self.bills.connection.execute(
            "update ledger.worker set created_at = created_at - make_interval(secs => %s) where id = %s",
            [seconds, pod],
        )


def _uuid(text: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, text))


@pytest.fixture
def scene(ow: OpenWeights, settings: Settings) -> Iterator[Scene]:
    callers = Callers(settings.database_url, settings.organization_id)
    with open_bills(settings.database_url) as bills:
        yield Scene(ow, callers, bills)
    callers.close()


def told(job: Job) -> Explanation:
    explanation = job.explain()
    print(f"\n{explanation}\n")
    return explanation


def whats(explanation: Explanation) -> str:
    return " | ".join(each.what for each in explanation.obstacles)


def test_without_a_worker_nothing_starts(scene: Scene) -> None:
    """It says so, and how to start one; the hardware is that of the packaged catalogue."""
    explanation = told(scene.job())
    assert "No worker has reported yet" in whats(explanation)
    assert "`ow worker`" in explanation.obstacles[0].mend
    assert explanation.candidates
    assert explanation.start_seconds.value is None
    assert explanation.max_workers is None


def test_a_worker_that_fell_silent_is_named(scene: Scene) -> None:
    scene.publish()
    scene.bills.connection.execute("update ledger.catalogues set updated_at = now() - interval '2 hours'")
    assert "No worker has reported for 2 h" in whats(told(scene.job()))


def test_candidates_come_in_the_order_of_tries(scene: Scene) -> None:
    """With price and stock, the last refusal and when it is asked again."""
    scene.publish()
    scene.control("note_refusal", subject=L4["key"], why="no such machine is free", seconds=58)
    first, second = told(scene.job()).candidates
    assert (first.hardware, first.price_per_hour, first.availability) == ("1x L4", 0.49, "LOW")
    assert (first.refused, second.refused) == ("no such machine is free", None)
    assert first.retry_seconds == pytest.approx(58, abs=5)
    assert second.retry_seconds is None
    text = str(scene.ow.jobs.retrieve("a").explain())
    assert "few left; refused 0 s ago (no such machine is free), asked again in 5" in text


def test_when_everything_was_refused_the_next_try_is_told(scene: Scene) -> None:
    scene.publish()
    scene.history()
    job = scene.job()
    assert told(job).obstacles == ()
    for offer in (L4, A40):
        scene.control("note_refusal", subject=offer["key"], why="no capacity", seconds=40)
    explanation = told(job)
    assert "refused all 2 offers" in whats(explanation)
    assert "allowed_hardware" in explanation.obstacles[0].mend
    assert explanation.start_seconds.value is None
    scene.control("clear_refusal", subject=L4["key"])
    assert told(job).obstacles == ()


def test_a_new_pod_is_estimated_by_the_last_ones(scene: Scene) -> None:
    """Start by the median boot, cost by the median run of that type and the first offer's price."""
    scene.publish()
    scene.history()
    explanation = told(scene.job())
    assert explanation.start_seconds.value == pytest.approx(240)
    assert explanation.cost_usd.value == pytest.approx(0.245)
    assert "unknown" in str(scene.job("b", type="other").explain())


def test_without_history_the_start_is_unknown(scene: Scene) -> None:
    scene.publish()
    explanation = told(scene.job())
    assert explanation.start_seconds.value is None
    assert "none came up here before" in explanation.start_seconds.basis
    assert explanation.obstacles == ()


def test_an_idle_pod_that_fits_takes_it_at_once(scene: Scene) -> None:
    """Whatever keeps others from being bought."""
    scene.publish(paused="RunPod: no funds")
    scene.pod()
    explanation = told(scene.job())
    assert explanation.headline == "waiting, next in line; it starts at once"
    [pod] = explanation.pods
    assert (pod.fits, pod.why) == (True, "fits and is idle")
    assert explanation.obstacles == ()


def test_a_starting_pod_is_due_when_the_last_ones_were(scene: Scene) -> None:
    scene.publish()
    scene.history()
    scene.age(scene.pod(registered=False), 60)
    explanation = told(scene.job())
    assert explanation.start_seconds.value == pytest.approx(180, abs=5)
    assert "has been starting for 60 s; the last ones took 4 min" in explanation.start_seconds.basis


def test_the_pod_of_somebody_before_is_not_promised(scene: Scene) -> None:
    """One idle pod, two jobs that need the same."""
    scene.publish()
    scene.pod()
    scene.job("first", priority=5)
    explanation = told(scene.job())
    assert explanation.position == 2
    assert explanation.ahead == ("first (probe, priority 5)",)
    assert explanation.start_seconds.basis.startswith("on a new pod")
    assert explanation.pods[0].why == "fits and is idle, but jobs before this one will take it"
    scene.publish(max_workers=1)
    explanation = told(scene.ow.jobs.retrieve("a"))
    assert "The one pod that the organization may have is in use" in whats(explanation)
    assert explanation.start_seconds.value is None


@pytest.mark.parametrize(
    ("needs", "why"),
    [
        ({"docker_image": "other"}, "it has another image (image)"),
        ({"requires_vram_gb": 40}, "19 GB of GPU memory, 40 GB are needed"),
        ({"allowed_hardware": ["2x A100"]}, "1x L4 is not in allowed_hardware"),
        ({"max_price_per_hour": 0.3}, "dearer than max_price_per_hour=0.3"),
        ({"cloud": "COMMUNITY"}, "it is of the secure cloud"),
        ({"min_ram_gb": 500}, "0 vCPU and 0 GB RAM are too few"),
        ({"min_cuda": "12.8"}, "CUDA of an unknown version, 12.8 is needed"),
    ],
)
def test_why_a_pod_does_not_fit(scene: Scene, needs: dict[str, Any], why: str) -> None:
    """The first thing that it lacks."""
    scene.publish()
    scene.pod()
    [pod] = told(scene.job(**needs)).pods
    assert not pod.fits
    assert pod.why == f"idle; does not fit: {why}"


def test_what_nothing_can_satisfy_gets_the_nearest_fix(scene: Scene) -> None:
    scene.publish()
    explanation = told(scene.job(max_price_per_hour=0.1))
    assert "max_price_per_hour=0.1 is below every fitting offer" in whats(explanation)
    assert "Raise it to at least 0.49" in explanation.obstacles[0].mend


def test_a_full_pool_is_told(scene: Scene) -> None:
    """With what the pods do."""
    scene.publish()
    scene.open(scene.job("running"), scene.pod("p"))
    scene.pod("q", docker_image="other")
    explanation = told(scene.job())
    assert "All 2 pods" in whats(explanation)
    assert [pod.why for pod in explanation.pods] == [
        "fits, but runs another job",
        "idle; does not fit: it has another image (other)",
    ]


def test_a_budget_that_bears_no_pod_is_told(scene: Scene) -> None:
    """In money, with the command that raises it."""
    scene.publish()
    scene.ow.costs.set_budget(5)
    explanation = told(scene.job())
    assert "The budget has $5.00 left for new pods" in whats(explanation)
    assert "up to $11.76 in its 24 hours" in whats(explanation)
    assert "`ow costs budget USD`" in explanation.obstacles[0].mend


@pytest.mark.parametrize("by_refusal", [False, True])
def test_a_paused_pool_is_told(scene: Scene, by_refusal: bool) -> None:
    """Missing funds stop all purchases."""
    why = "RunPod: the account has no funds"
    scene.publish(paused=None if by_refusal else why)
    if by_refusal:
        scene.control("note_refusal", subject="account", why=why, seconds=300)
    explanation = told(scene.job())
    assert explanation.paused == why
    assert f"Nothing can be bought at present: {why}" in whats(explanation)


def test_a_running_and_a_finished_job_tell_what_they_ran_on(scene: Scene) -> None:
    """And what that costs."""
    scene.publish()
    scene.history()
    job = scene.job()
    run = scene.open(job, scene.pod(price_per_hour=1))
    explanation = told(job)
    assert explanation.headline.startswith("running for 0 s on 1x L4; such jobs take 30 min")
    assert (explanation.position, explanation.candidates, explanation.pods) == (None, (), ())
    scene.call("finish_run", for_run=run, as_boot=_uuid("p"), result="completed")
    explanation = told(job)
    assert explanation.headline == "completed after 0 s on 1x L4"
    assert explanation.cost.total_usd > 0
    assert explanation.attempts[0].pod == "p"
    assert job.cost == pytest.approx(explanation.cost.total_usd, rel=0.5)


def test_a_failed_job_tells_why(scene: Scene) -> None:
    """Lost attempts before are listed with what became of their pods."""
    job = scene.job()
    scene.open(job, scene.pod("p"))
    scene.control("lose_pod", for_worker="p", why="its machine vanished")
    run = scene.open(job.refresh(), scene.pod("q"))
    scene.call("finish_run", for_run=run, as_boot=_uuid("q"), result="failed", why="exit code 1\nTraceback")
    explanation = told(job)
    assert explanation.headline.startswith("failed after 0 s on 1x L4: exit code 1")
    assert "`ow restart a` runs it again" in explanation.headline
    assert [each.status for each in explanation.attempts] == ["lost", "failed"]
    assert explanation.attempts[0].error == "its machine vanished"


def test_what_strangers_wrote_does_no_harm(scene: Scene) -> None:
    """No control characters on a terminal, no markup in a notebook."""
    scene.publish()
    scene.control("note_refusal", subject=L4["key"], why="\x1b[31m<script>alert(1)</script>", seconds=9)
    explanation = told(scene.job())
    assert "\x1b" not in str(explanation)
    assert "<script>" not in explanation._repr_html_()
    assert repr(explanation).startswith("Explanation(job_id='a', status='pending'")


def test_one_request_explains(scene: Scene, ledger: RecordingLedger) -> None:
    """However much there is to say; of an unknown job, that it is unknown."""
    scene.job()
    assert explain_job(ledger, "a").waiting_total == 1
    assert ledger.calls == ["explain_job"]
    with pytest.raises(NotFoundError, match="No job 'b'"):
        explain_job(ledger, "b")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (7500, "2 h 5 min"),
        (7200, "2 h"),
        (300_000, "3 d 11 h"),
    ],
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "$0.00"), (12.345, "$12.35"), (0.0123, "$0.012"), (1e-9, "<$0.0001")]
)
def test_amounts(amount: float, text: str) -> None:
    assert usd(amount) == text
