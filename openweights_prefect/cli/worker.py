"""`ow worker`: a Prefect worker in the foreground."""

from __future__ import annotations

import os

import click

from openweights_prefect.cli.session import user_environment
from openweights_prefect.settings import Settings
from openweights_prefect.stack.services import foreground_worker


@click.command()
@click.option("--pool", metavar="NAME", help="Work pool to serve; `OW_WORK_POOL` otherwise.")
@click.option("--name", metavar="NAME", help="Name of this worker in Prefect.")
def worker(pool: str | None, name: str | None) -> None:
    """Run a Prefect worker of type runpod in the foreground.

    The same as `prefect worker start --type runpod`, with the addresses of the settings. The local stack
    runs one already.

    \b
    Example:
      ow worker --name laptop
    """
    environment = user_environment()
    command, variables = foreground_worker(Settings.load(environment), pool=pool, name=name)
    # Becomes the worker, so that signals and the exit code are its own.
    os.execve(command[0], command, {**environment, **variables})
