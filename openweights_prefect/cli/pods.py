"""`ow pod`: the rented machines, as the ledger knows them."""

from __future__ import annotations

from datetime import datetime

import click

from openweights_prefect.cli.output import duration, json_option, print_json, print_table
from openweights_prefect.cli.session import open_ledger
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.types.job import parse_time

_ALIVE = ["starting", "active", "busy", "draining", "lost"]


@click.group()
def pod() -> None:
    """Look at pods, and end them.

    \b
    Example:
      ow pod ls --all
    """


@pod.command()
@click.option("--all", "everything", is_flag=True, help="Terminated pods too.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="At most so many."
)
@json_option
def ls(everything: bool, limit: int, as_json: bool) -> None:
    """List pods, newest first.

    \b
    Example:
      ow pod ls --json
    """
    with open_ledger() as ledger:
        pods = ledger.call("list_workers", with_status=None if everything else _ALIVE, max_rows=limit)
    if as_json:
        print_json(pods)
        return
    columns = ("id", "status", "hardware", "cloud", "usd/h", "uptime", "run", "reason")
    print_table(columns, [_row(row) for row in pods])


@pod.command()
@click.argument("pod_ids", metavar="POD...", nargs=-1, required=True)
@json_option
@click.pass_context
def terminate(ctx: click.Context, pod_ids: tuple[str, ...], as_json: bool) -> None:
    """End pods.

    Each finishes the run that it has, takes no other, and is terminated then; to stop the run as well, cancel
    its job. The exit code is 1 if one is unknown or has ended already.

    \b
    Example:
      ow pod terminate pod-0123456789ab
    """
    with open_ledger() as ledger:
        outcomes = {each: ledger.call("request_shutdown", for_worker=each)[0]["outcome"] for each in pod_ids}
    for pod_id, outcome in outcomes.items():
        if outcome != "requested":
            click.echo(f"Error: No pod {pod_id!r} is alive in this organization; see `ow pod ls`.", err=True)
        elif not as_json:
            click.echo(f"{pod_id}: ends after its run")
    if as_json:
        print_json(outcomes)
    ctx.exit(0 if set(outcomes.values()) == {"requested"} else 1)


def _row(row: Row) -> tuple[object, ...]:
    uptime = duration(_time(row, "created_at"), _time(row, "terminated_at"))
    price, run, reason = row["price_per_hour"], row["run_id"], row["reason"]
    return row["id"], row["status"], row["hardware"], row["cloud"], price, uptime, run, reason


def _time(row: Row, name: str) -> datetime | None:
    return parse_time(row[name])
