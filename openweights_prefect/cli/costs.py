"""`ow costs`: the bill, and the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime, timedelta

import click

from openweights_prefect.cli.output import json_option, print_json, print_table
from openweights_prefect.cli.secret_input import Duration
from openweights_prefect.cli.session import open_client
from openweights_prefect.resources.costs import CostRow, total_of
from openweights_prefect.types.money import COST_GROUPS, Budget


class Moment(click.ParamType[datetime | timedelta]):
    """`7d` (that long ago), or a date, with a time if need be; without a zone, the zone of this machine."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime | timedelta:
        """Read the text."""
        text = str(value)
        if text[:1].isdigit() and text[-1:].isalpha() and text[-1] != "Z":
            ago = Duration().convert(text, param, ctx)
            assert ago is not None
            return ago
        try:
            return datetime.fromisoformat(text).astimezone()
        except ValueError:
            self.fail(
                f"{text!r} is neither a date like 2026-03-01 or 2026-03-01T14:00, nor how long ago, like 7d.",
                param,
                ctx,
            )


@click.group(invoke_without_command=True)
@click.option(
    "--by", type=click.Choice(COST_GROUPS), default="job", show_default=True, help="What each line is about."
)
@click.option("--since", type=Moment(), metavar="DURATION|DATE", help="Only what was spent from then on.")
@click.option("--until", type=Moment(), metavar="DURATION|DATE", help="Only what was spent before.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="At most so many lines, the dearest.",
)
@json_option
@click.pass_context
def costs(
    ctx: click.Context,
    by: str,
    since: datetime | timedelta | None,
    until: datetime | timedelta | None,
    limit: int,
    as_json: bool,
) -> None:
    """Show what pods cost, and for whom; set the budget.

    Every second of a pod is charged: `running` to the run that it was for, `overhead` (booting, waiting,
    ending) to the runs of that pod, by how long they ran. The last line is the whole bill of the time,
    however it is grouped.

    \b
    Example:
      ow costs --by user --since 7d
      ow costs budget 500
    """
    if ctx.invoked_subcommand is not None:
        return
    with open_client() as ow:
        rows = ow.costs.rows(by, since=since, until=until)
        held = ow.costs.budget()
    total = total_of(rows)
    if as_json:
        print_json({"by": by, "rows": rows, "total": total, "budget": dataclasses.asdict(held)})
        return
    if not rows:
        click.echo("Nothing was spent in that time." if since or until else "Nothing was spent yet.")
    else:
        _print(by, rows, total, limit)
    click.echo(_budget_line(held))


@costs.command()
@click.argument("usd", metavar="[USD|none]", required=False)
@json_option
def budget(usd: str | None, as_json: bool) -> None:
    """Show what the organization may spend in all, or set it; `none` removes the limit.

    Pods that could go beyond it are not bought; those that live go on. Only admins set it.

    \b
    Example:
      ow costs budget 500
    """
    try:
        amount = None if usd in (None, "none") else float(str(usd))
    except ValueError:
        raise click.BadParameter(f"{usd!r} is neither an amount of USD nor `none`.") from None
    with open_client() as ow:
        held = ow.costs.budget() if usd is None else ow.costs.set_budget(amount)
    if as_json:
        print_json(dataclasses.asdict(held))
    else:
        click.echo(_budget_line(held))


def _print(by: str, rows: Sequence[CostRow], total: CostRow, limit: int) -> None:
    # Days are in order: of those, the newest.
    shown = rows[-limit:] if by == "day" else rows[:limit]
    title = "pod" if by == "worker" else by
    lines = [(*_names(by, row), *_amounts(row)) for row in shown]
    if len(shown) < len(rows):
        hidden = rows[: len(rows) - limit] if by == "day" else rows[limit:]
        lines.append((f"{len(hidden)} more", "", *_amounts(total_of(hidden))))
    lines.append(("total", "", *_amounts(total)))
    columns = [title, "", "runs", "hours", "running", "overhead", "total usd"]
    # Numbers are read from the right, and a column of nothing is left out.
    kept = [number for number in range(len(columns)) if number != 1 or any(line[1] for line in lines)]
    widths = [max(len(columns[number]), *(len(line[number]) for line in lines)) for number in kept]
    print_table(
        [
            columns[number].rjust(width) if number > 1 else columns[number]
            for number, width in zip(kept, widths, strict=True)
        ],
        [
            [line[n].rjust(width) if n > 1 else line[n] for n, width in zip(kept, widths, strict=True)]
            for line in lines
        ],
    )
    click.echo()
    click.echo(
        f"Of the overhead: {total['boot_usd']:.2f} booting, {total['idle_usd']:.2f} waiting, "
        f"{total['teardown_usd']:.2f} ending."
    )
    click.echo(f"Saved by reuse: {total['saved_usd']:.2f} USD, the boots of pods that were up already.")


def _names(by: str, row: CostRow) -> tuple[str, str]:
    """A line's id, and its name; people know users by their address and tokens by their name."""
    if row["key"] is None:
        return {"job": "(no job)", "token": "(no token)"}.get(by, "(unknown)"), ""
    if by in ("user", "token"):
        return row["label"] or row["key"], row["key"] if row["label"] and by == "token" else ""
    return row["key"], row["label"] or ""


def _amounts(row: CostRow) -> tuple[str, ...]:
    return (
        f"{row['runs']:.0f}",
        f"{row['run_seconds'] / 3600:.1f}",
        f"{row['direct_usd']:.2f}",
        f"{row['overhead_usd']:.2f}",
        f"{row['total_usd']:.2f}",
    )


def _budget_line(held: Budget) -> str:
    if held.limit_usd is None:
        return f"Budget: no limit; {held.spent_usd:.2f} USD spent in all. `ow costs budget USD` sets one."
    return (
        f"Budget: {held.spent_usd:.2f} of {held.limit_usd:.2f} USD spent, {held.reserved_usd:.2f} set aside "
        f"for the pods that live, {held.remaining_usd:.2f} left for new ones."
    )
