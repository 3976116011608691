"""`ow up`, `ow down`, `ow status`: the local stack."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console

from openweights_prefect.cli.output import duration, json_option, print_json, print_table
from openweights_prefect.cli.session import user_environment
from openweights_prefect.simulator.chaos import parse_chaos
from openweights_prefect.simulator.config import PROFILES
from openweights_prefect.stack import down as stopping
from openweights_prefect.stack import state
from openweights_prefect.stack import up as starting
from openweights_prefect.stack.addresses import running_settings
from openweights_prefect.stack.state import ServiceStatus


@click.command()
@click.option("--job-python", metavar="PATH", help="Python of the job environment (torch, TRL); remembered.")
@click.option(
    "--chaos",
    metavar="FAULT=PROBABILITY[,...]",
    default="",
    help="Let the simulated RunPod fail, such as preempt=0.2,capacity=0.3; without it nothing fails.",
)
@click.option(
    "--profile",
    type=click.Choice(sorted(PROFILES)),
    default="fast",
    help="How long the simulated RunPod takes for each step of a pod.",
)
@json_option
def up(job_python: str | None, chaos: str, profile: str, as_json: bool) -> None:
    """Start the local stack, or what is missing of it.

    PostgreSQL, the Prefect server, a simulated RunPod whose pods are processes of this machine, and the
    worker. They go on after this command ends; `ow down` stops them. Calling it again repairs what has died.

    \b
    Example:
      ow up --job-python ~/job-env/bin/python
      ow up --chaos preempt=0.2,capacity=0.3
    """
    faults = parse_chaos(chaos)
    with _progress("Starting the local stack") as progress:
        services = starting.up(
            environment=user_environment(),
            job_python=job_python,
            chaos=faults,
            profile=profile,
            progress=progress,
        )
    settings = running_settings(user_environment())
    if as_json:
        print_json({"services": [_document(service) for service in services]})
        return
    click.echo(f"Prefect UI: {settings.prefect_api_url.removesuffix('/api')}")
    click.echo("Look with `ow status` and `ow ls`; stop with `ow down`.")
    if not settings.job_python:
        click.echo("No job interpreter is set: run `ow up --job-python PATH` before the first job.", err=True)


@click.command()
@json_option
def down(as_json: bool) -> None:
    """Stop the local stack; its data stays.

    Jobs that were running start again after the next `ow up`.

    \b
    Example:
      ow down
    """
    with _progress("Stopping the local stack") as progress:
        stopped = stopping.down(environment=user_environment(), progress=progress)
    if as_json:
        print_json({"stopped": stopped})
    elif not stopped:
        click.echo("Nothing was running.")


@click.command()
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show the services of the local stack.

    The exit code is 0 when all are up, else 1.

    \b
    Example:
      ow status --json
    """
    services = state.status(running_settings(user_environment()))
    if as_json:
        print_json({"services": [_document(service) for service in services]})
    else:
        columns = ("service", "state", "pid", "uptime", "address", "log")
        print_table(columns, [_row(service) for service in services])
    ctx.exit(0 if all(service.up for service in services) else 1)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr for every step; on a terminal, a spinner meanwhile."""
    if not sys.stderr.isatty():
        yield lambda line: click.echo(line, err=True)
        return
    console = Console(stderr=True, highlight=False)
    with console.status(title):
        yield lambda line: console.print(line, markup=False)


def _document(service: ServiceStatus) -> dict[str, object]:
    return dataclasses.asdict(service)


def _row(service: ServiceStatus) -> tuple[object, ...]:
    condition = "up" if service.up else "down" if service.pid is None else "failed"
    uptime = duration(service.started_at, None)
    return service.name, condition, service.pid, uptime, service.address, service.log
