"""`ow pod`: the rented machines, as the ledger knows them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from openweights_prefect.cli.output import duration, json_option, print_json, print_table
from openweights_prefect.cli.session import open_ledger, user_environment
from openweights_prefect.errors import BudgetExceeded, NotFoundError
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.runtime import wire
from openweights_prefect.types.job import parse_time

_ALIVE = ["starting", "active", "busy", "draining", "lost"]
_EXTENDABLE = ["starting", "active", "busy"]
_HOURS = click.FloatRange(0, 30 * 24)
_AGENT_SECONDS = 60.0


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


@pod.command()
@click.argument("pod_id", metavar="[POD]", required=False)
@click.option("--check", is_flag=True, help="Only show how long it may live; what happens without an option.")
@click.option("--extend", "added", type=_HOURS, metavar="HOURS", help="Give it so many hours more.")
@click.option("--set", "hours", type=_HOURS, metavar="HOURS", help="Let it end so many hours from now.")
@json_option
def ttl(pod_id: str | None, check: bool, added: float | None, hours: float | None, as_json: bool) -> None:
    """Show or move the time at which a pod ends at the latest.

    Inside a pod, in a job or in a shell, it is about that pod; elsewhere it needs its name. A run that is
    there at that time is told to save what it has, and goes on elsewhere. The budget must allow for a longer
    time.

    \b
    Example:
      ow pod ttl pod-0123456789ab --extend 12
    """
    if [check, added is not None, hours is not None].count(True) > 1:
        raise click.UsageError("Give one of `--check`, `--extend` and `--set`.")
    moved = hours if added is None else added
    if pod_id is None:
        answer = _ask_agent(moved, added=added is not None)
    else:
        with open_ledger() as ledger:
            answer = _ask_ledger(ledger, pod_id, moved, added=added is not None)
    if as_json:
        print_json(answer)
        return
    now = datetime.now(UTC)
    end = now + timedelta(seconds=answer["deadline_seconds"])
    click.echo(f"{answer['pod']}: ends in {duration(now, end)} at the latest, {end:%Y-%m-%d %H:%M} UTC")


def _ask_agent(hours: float | None, *, added: bool) -> Row:
    """What the agent of the pod says in which this runs."""
    socket = _agent_socket()
    if socket is None:
        raise click.UsageError(
            "This is not inside a pod. Name the pod, `ow pod ttl POD`; `ow pod ls` lists them."
        )
    change: dict[str, Any] = {} if hours is None else {"hours": hours, "added": added}
    return wire.request("ttl", socket_path=socket, timeout_seconds=_AGENT_SECONDS, **change)


def _agent_socket() -> str | None:
    """A job is told where; for a shell, the pod's first process has a link in its folder."""
    if told := user_environment().get(wire.SOCKET_VARIABLE):
        return told
    for folder in (Path.cwd(), Path("/proc/1/cwd")):
        try:
            return str((folder / wire.POD_SOCKET).resolve(strict=True))
        except OSError:
            continue
    return None


def _ask_ledger(ledger: Ledger, pod_id: str, hours: float | None, *, added: bool) -> Row:
    found = ledger.call("list_workers", with_status=_EXTENDABLE, max_rows=1000)
    pods = [row for row in found if row["id"] == pod_id]
    if not pods:
        raise NotFoundError(f"No pod {pod_id!r} that could go on is in this organization; see `ow pod ls`.")
    deadline = parse_time(pods[0]["deadline_at"])
    left = max(0.0, (deadline - datetime.now(UTC)).total_seconds()) if deadline else 0.0
    if hours is not None:
        left = 3600 * hours + (left if added else 0.0)
        [answer] = ledger.call("extend_pod", for_worker=pod_id, deadline_seconds=left)
        if answer["outcome"] == "budget":
            raise BudgetExceeded(
                f"Pod {pod_id} could cost more than what is left of the budget if it had {left / 3600:.1f} "
                "hours. Ask for less, or raise the budget."
            )
        if answer["outcome"] != "extended":
            raise NotFoundError(f"Pod {pod_id!r} is about to end; its deadline stays. See `ow pod ls`.")
        left = float(answer["deadline_seconds"])
    return {"pod": pod_id, "deadline_seconds": left}


def _row(row: Row) -> tuple[object, ...]:
    uptime = duration(_time(row, "created_at"), _time(row, "terminated_at"))
    price, run, reason = row["price_per_hour"], row["run_id"], row["reason"]
    return row["id"], row["status"], row["hardware"], row["cloud"], price, uptime, run, reason


def _time(row: Row, name: str) -> datetime | None:
    return parse_time(row[name])
