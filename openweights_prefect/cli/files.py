"""`ow fetch`: files and results."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from openweights_prefect.cli.output import json_option, print_json
from openweights_prefect.cli.session import open_client
from openweights_prefect.client import OpenWeights


@click.command()
@click.argument("identity", metavar="FILE_ID|JOB")
@click.option("-o", "--output", metavar="PATH", help="File or folder to write; `-` writes a file to stdout.")
@click.option("--all-runs", is_flag=True, help="The files of every run of a job, a folder for each.")
@json_option
def fetch(identity: str, output: str | None, all_runs: bool, as_json: bool) -> None:
    """Download a file, or the results of a job.

    The log of the job's last run is among them. A file goes to the current folder under its own name, the
    files of a job to a folder named like the job.

    \b
    Example:
      ow fetch ftjob-1a2b3c4d5e6f -o results
      ow fetch conversations:file-1a2b3c4d5e6f -o - | head
    """
    with open_client() as ow:
        if ":" in identity and output == "-":
            _to_stdout(ow, identity)
            return
        paths = _download(ow, identity, output, all_runs=all_runs)
    if as_json:
        print_json({"paths": paths})
        return
    for path in paths:
        click.echo(path)
    if not paths:
        click.echo("The job has no files yet.", err=True)


def _download(ow: OpenWeights, identity: str, output: str | None, *, all_runs: bool) -> list[Path]:
    if ":" in identity:
        return [ow.files.download(identity, output or ".")]
    return ow.jobs.retrieve(identity).download(output or identity, only_last_run=not all_runs)


def _to_stdout(ow: OpenWeights, file_id: str) -> None:
    sys.stdout.buffer.write(ow.files.content(file_id))
