"""A user's flow with all that Prefect offers in one: tasks, a retry, a subflow, logs, an artifact."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact

from pkg.stages.numbers import doubled


@task
def extract(number: int) -> int:
    """One of several tasks at once."""
    get_run_logger().info("extract %s", number)
    return doubled(number)


@task(retries=2, retry_delay_seconds=0.1)
def flaky() -> str:
    """Fails the first time."""
    marker = Path("failed-once")
    if not marker.exists():
        marker.touch()
        raise ValueError("the first time fails")
    marker.unlink()
    return "at last"


@flow
def load(numbers: list[int]) -> int:
    """A subflow with a task of its own."""
    get_run_logger().info("load %s", numbers)
    return extract(sum(numbers))


@flow(log_prints=True)
def etl(n: int = 3) -> int:
    """Extract, transform and load."""
    get_run_logger().info("etl of %s", n)
    print("printed by etl")
    create_markdown_artifact("# Done", key="etl-report")
    futures = [extract.submit(number) for number in range(n)]
    flaky()
    return load([future.result() for future in futures])
