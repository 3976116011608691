"""A wait that ends with its job: the notification is a hint, and everything works without it."""

from __future__ import annotations

import threading
import time

import psycopg
import pytest

from openweights_prefect.resources.patience import sleep_until_end
from tests.callers import Callers


@pytest.fixture(params=["psycopg"])
def transport(request: pytest.FixtureRequest) -> str:
    """The one that hears notifications; over HTTP a wait only looks."""
    return str(request.param)


def submit(ledger: Callers, job_id: str) -> None:
    job = {"id": job_id, "type": "probe", "docker_image": "image", "entrypoint": "true", "files": []}
    ledger.call("submit_job", job=job)


def time_sleep(ledger: Callers, job_id: str, seconds: float) -> float:
    started = time.monotonic()
    sleep_until_end(ledger.person, job_id)(seconds)
    return time.monotonic() - started


def test_it_ends_with_the_job_and_not_with_another(ledger: Callers) -> None:
    """Other jobs' ends are none of its business."""
    submit(ledger, "probe-1")
    submit(ledger, "probe-2")
    time_sleep(ledger, "probe-1", 0.5)  # listens from here on
    threading.Timer(0.2, ledger.call, ("cancel_job",), {"job_id": "probe-2"}).start()
    threading.Timer(0.8, ledger.call, ("cancel_job",), {"job_id": "probe-1"}).start()
    assert 0.7 < time_sleep(ledger, "probe-1", 20) < 10


def test_without_a_change_it_lasts_as_long_as_asked(ledger: Callers) -> None:
    assert 0.45 < time_sleep(ledger, "probe-1", 0.5) < 5
    assert 0.05 < time_sleep(ledger, "probe-1", 0.06) < 5


def test_a_lost_connection_costs_nothing(ledger: Callers) -> None:
    """It sleeps on, and listens again the next time."""
    time_sleep(ledger, "probe-1", 0.5)

    def cut() -> None:
        with psycopg.connect(ledger.url, autocommit=True) as connection:
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where query = 'listen ow_job'"
                " and datname = current_database()"
            )

    threading.Timer(0.1, cut).start()
    assert 0.45 < time_sleep(ledger, "probe-1", 0.5) < 5
    submit(ledger, "probe-1")
    time_sleep(ledger, "probe-1", 0.5)
    threading.Timer(0.1, ledger.call, ("cancel_job",), {"job_id": "probe-1"}).start()
    assert time_sleep(ledger, "probe-1", 20) < 10


def test_of_several_threads_each_sleeps_no_longer_than_asked(ledger: Callers) -> None:
    """One connection listens, whoever else waits only sleeps."""
    lasted: list[float] = []
    threads = [
        threading.Thread(target=lambda: lasted.append(time_sleep(ledger, "probe-1", 0.5))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(0.45 < seconds < 5 for seconds in lasted)
