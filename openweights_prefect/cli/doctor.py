"""`ow doctor`: is everything there and working?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import click

from openweights_prefect.cli.output import json_option, print_json
from openweights_prefect.settings import Settings
from openweights_prefect.stack.checks import Check, check_all


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check settings, services and stores, and say how to mend what fails.

    The exit code is 0 when every check is ok, else 1.

    \b
    Example:
      ow doctor
    """
    ok = print_checks(check_all(Settings.load()), as_json=as_json)
    ctx.exit(0 if ok else 1)


def print_checks(checks: Iterable[Check], *, as_json: bool) -> bool:
    """Print checks as they come, or as one document at the end; says whether all are ok."""
    done: list[Check] = []
    for check in checks:
        done.append(check)
        if not as_json:
            _print(check)
    ok = all(check.ok for check in done)
    if as_json:
        print_json({"ok": ok, "checks": [dataclasses.asdict(check) for check in done]})
    return ok


def _print(check: Check) -> None:
    mark = click.style("ok  ", fg="green") if check.ok else click.style("fail", fg="red")
    click.echo(f"{mark}  {check.name:<15}  {check.detail}")
    if not check.ok and check.mend:
        click.echo(f"      {'':<15}  {check.mend}")
