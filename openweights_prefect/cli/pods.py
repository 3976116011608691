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
    """Look at pods.

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


def _row(row: Row) -> tuple[object, ...]:
    uptime = duration(_time(row, "created_at"), _time(row, "terminated_at"))
    price, run, reason = row["price_per_hour"], row["run_id"], row["reason"]
    return row["id"], row["status"], row["hardware"], row["cloud"], price, uptime, run, reason


def _time(row: Row, name: str) -> datetime | None:
    return parse_time(row[name])
