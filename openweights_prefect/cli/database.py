"""`ow db`: the schema of the ledger."""

from __future__ import annotations

import dataclasses

import click

from openweights_prefect.cli.output import json_option, print_json, print_table
from openweights_prefect.ledger import migrator
from openweights_prefect.settings import Settings
from openweights_prefect.stack import databases
from openweights_prefect.stack.service import Folders


@click.group()
def db() -> None:
    """Migrate the ledger.

    \b
    Example:
      ow db status
    """


@db.command()
@json_option
def migrate(as_json: bool) -> None:
    """Apply the migrations that the ledger lacks; `ow up` does it too.

    \b
    Example:
      OW_DATABASE_URL=postgresql://postgres@db/openweights ow db migrate
    """
    applied = migrator.migrate(_admin_url())
    if as_json:
        print_json({"applied": applied})
        return
    for version in applied:
        click.echo(f"Applied {version}")
    if not applied:
        click.echo("The ledger has every migration.")


@db.command()
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """List the migrations, and whether the ledger has them.

    The exit code is 0 when it has all, else 1.

    \b
    Example:
      ow db status --json
    """
    migrations = migrator.status(_admin_url())
    if as_json:
        print_json({"migrations": [dataclasses.asdict(migration) for migration in migrations]})
    else:
        rows = [(m.version, m.name, "applied" if m.applied else "missing") for m in migrations]
        print_table(("version", "name", "state"), rows)
    ctx.exit(0 if all(migration.applied for migration in migrations) else 1)


def _admin_url() -> str:
    settings = Settings.load()
    return databases.in_use(Folders(settings.home), settings).admin_url
