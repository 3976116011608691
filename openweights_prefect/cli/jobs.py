"""`ow ls`, `ow show`, `ow logs`, `ow events`, `ow cancel`, `ow restart`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence

import click

from openweights_prefect.cli.output import age, duration, json_option, print_fields, print_json, print_table
from openweights_prefect.cli.session import open_client
from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.resources.events import Event
from openweights_prefect.resources.job import Job
from openweights_prefect.types.canonical import encode_event
from openweights_prefect.types.job import JOB_STATUSES, JobColumns
from openweights_prefect.types.run import RunColumns


@click.command()
@click.option("--status", type=click.Choice(JOB_STATUSES), help="Only jobs in this state.")
@click.option("--type", "job_type", help="Only jobs of this type, such as `fine_tuning`.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="At most so many.")
@json_option
def ls(status: str | None, job_type: str | None, limit: int, as_json: bool) -> None:
    """List jobs, newest first.

    \b
    Example:
      ow ls --status failed --limit 5
      ow ls --status pending --json | jq -r '.[].id' | ow cancel -
    """
    with open_client() as ow:
        jobs = ow.jobs.list(limit=limit, status=status, type=job_type)
    if as_json:
        print_json([_job_document(job) for job in jobs])
        return
    columns = ("id", "type", "status", "model", "age", "duration", "pending reason")
    print_table(columns, [_job_row(job) for job in jobs])


@click.command()
@click.argument("job_id", metavar="JOB")
@json_option
def show(job_id: str, as_json: bool) -> None:
    """Show all of a job.

    Its parameters, runs and outputs, and its address in the Prefect UI. The exit code is 0 whatever the job's
    state; scripts read it from `--json`.

    \b
    Example:
      ow show ftjob-1a2b3c4d5e6f
    """
    with open_client() as ow:
        job = ow.jobs.retrieve(job_id)
        runs, url = job.runs, job.url
    if as_json:
        print_json({**_job_document(job), "runs": [_columns(run, RunColumns) for run in runs], "url": url})
        return
    document = _job_document(job)
    sections = {
        "parameters": job.params.get("validated_params", job.params),  # a script has none
        "mounts": document.pop("mounts"),
        "outputs": document.pop("outputs"),
    }
    del document["params"]
    print_fields([*document.items(), ("url", url)])
    if runs:
        click.echo("\nruns")
        rows = [
            (r.id, r.attempt, r.status, r.worker_id, duration(r.started_at, r.finished_at), r.error)
            for r in runs
        ]
        print_table(("id", "attempt", "status", "pod", "duration", "error"), rows)
    for title, content in sections.items():
        if content:
            click.echo(f"\n{title}")
            click.echo(json.dumps(content, indent=2, ensure_ascii=False))


@click.command()
@click.argument("job_id", metavar="JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job is final.")
@json_option
def logs(job_id: str, follow: bool, as_json: bool) -> None:
    """Print the log of a job.

    That of its newest run. With `--json`, each line is a JSON object `{"line": ...}`. Ctrl-C stops following,
    not the job.

    \b
    Example:
      ow logs -f ftjob-1a2b3c4d5e6f
    """
    with open_client() as ow:
        for line in ow.jobs.retrieve(job_id).logs(follow=follow):
            if as_json:
                print_json({"line": line})
            else:
                click.echo(line)


@click.command()
@click.argument("job_id", metavar="JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job is final.")
@json_option
def events(job_id: str, follow: bool, as_json: bool) -> None:
    """Print the events of a job.

    With `--json`, each line is one event; numbers that JSON lacks are written like `{"$float": "NaN"}`.

    \b
    Example:
      ow events ftjob-1a2b3c4d5e6f --json | jq .data.loss
    """
    with open_client() as ow:
        job = ow.jobs.retrieve(job_id)
        for event in ow.events.stream(job_id=job.id) if follow else job.events():
            if as_json:
                print_json({**event, "data": encode_event(event["data"])})
            else:
                click.echo(_event_line(event))


@click.command()
@click.argument("job_ids", metavar="JOB...", nargs=-1, required=True)
@json_option
@click.pass_context
def cancel(ctx: click.Context, job_ids: Sequence[str], as_json: bool) -> None:
    """Cancel jobs.

    `-` reads ids from stdin. One that cannot be canceled does not keep the others from it; the exit code is
    1 then.

    \b
    Example:
      ow cancel ftjob-1a2b3c4d5e6f
      ow ls --status pending --json | jq -r '.[].id' | ow cancel -
    """
    with open_client() as ow:
        _change_all(ctx, job_ids, ow.jobs.cancel, as_json=as_json)


@click.command()
@click.argument("job_ids", metavar="JOB...", nargs=-1, required=True)
@json_option
@click.pass_context
def restart(ctx: click.Context, job_ids: Sequence[str], as_json: bool) -> None:
    """Run failed or canceled jobs again.

    `-` reads ids from stdin. One that cannot be restarted does not keep the others from it; the exit code is
    1 then.

    \b
    Example:
      ow restart ftjob-1a2b3c4d5e6f
    """
    with open_client() as ow:
        _change_all(ctx, job_ids, ow.jobs.restart, as_json=as_json)


def _change_all(
    ctx: click.Context, job_ids: Sequence[str], change: Callable[[str], Job], *, as_json: bool
) -> None:
    changed: list[Job] = []
    failed: list[dict[str, str]] = []
    for job_id in _read_ids(job_ids):
        try:
            job = change(job_id)
        except OpenWeightsError as exc:
            failed.append({"id": job_id, "error": str(exc)})
            click.echo(f"Error: {exc}", err=True)
            continue
        changed.append(job)
        if not as_json:
            click.echo(f"{job.id}: {_state(job)}")
    if as_json:
        print_json({"changed": [_job_document(job) for job in changed], "failed": failed})
    ctx.exit(1 if failed else 0)


def _read_ids(job_ids: Sequence[str]) -> list[str]:
    """The ids in order, each once; `-` stands for the words of stdin."""
    ids: dict[str, None] = {}
    for job_id in job_ids:
        ids.update(dict.fromkeys(sys.stdin.read().split() if job_id == "-" else [job_id]))
    return list(ids)


def _state(job: Job) -> str:
    # A running job ends when its pod has heard of it.
    return "cancel requested" if job.status == "in_progress" else job.status


def _columns(row: object, kind: type) -> dict[str, object]:
    return {spec.name: vars(row)[spec.name] for spec in dataclasses.fields(kind)}


def _job_document(job: Job) -> dict[str, object]:
    return _columns(job, JobColumns)


def _job_row(job: Job) -> tuple[object, ...]:
    took = duration(job.started_at, job.finished_at)
    return job.id, job.type, job.status, job.model, age(job.created_at), took, job.pending_reason


def _event_line(event: Event) -> str:
    moment = event["created_at"]
    time = "" if moment is None else moment.astimezone().strftime("%H:%M:%S")
    file = f"  file={event['file']}" if event["file"] else ""
    return f"{time}  {json.dumps(event['data'], ensure_ascii=False)}{file}"
