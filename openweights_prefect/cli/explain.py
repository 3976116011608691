"""`ow explain`: why a job waits."""

from __future__ import annotations

import dataclasses

import click

from openweights_prefect.cli.output import json_option, print_json
from openweights_prefect.cli.session import open_client


@click.command()
@click.argument("job_id", metavar="JOB")
@json_option
def explain(job_id: str, as_json: bool) -> None:
    """Say why a job waits, when it starts, and what it costs.

    What is in the way and how to mend it, its place in line, the hardware that would do with prices and what
    the provider said last, the pods that are up, limits and budget. Of a job that runs or has ended: on what,
    for how long, for how much.

    \b
    Example:
      ow explain ftjob-1a2b3c4d5e6f
    """
    with open_client() as ow:
        told = ow.jobs.retrieve(job_id).explain()
    if as_json:
        print_json(dataclasses.asdict(told))
    else:
        click.echo(str(told))
