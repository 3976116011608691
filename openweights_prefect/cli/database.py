"""`ow db`: the schema and the data of the ledger."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import click

from openweights_prefect.cli.doctor import print_checks
from openweights_prefect.cli.output import json_option, print_json, print_table
from openweights_prefect.errors import ConfigurationError
from openweights_prefect.ledger import backup as backups
from openweights_prefect.ledger import migrator
from openweights_prefect.settings import Settings
from openweights_prefect.stack import databases
from openweights_prefect.stack.service import Folders
from openweights_prefect.stack.verification import verify as verify_ledger


@click.group()
def db() -> None:
    """Migrate, back up and check the ledger.

    With the database itself: for a Supabase project, set OW_DATABASE_URL to its connection string.

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
    applied = migrator.migrate(_admin_url(Settings.load()))
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
    migrations = migrator.status(_admin_url(Settings.load()))
    if as_json:
        print_json({"migrations": [dataclasses.asdict(migration) for migration in migrations]})
    else:
        rows = [(m.version, m.name, "applied" if m.applied else "missing") for m in migrations]
        print_table(("version", "name", "state"), rows)
    ctx.exit(0 if all(migration.applied for migration in migrations) else 1)


@db.command()
@click.argument("file", required=False)
@json_option
def backup(file: str | None, as_json: bool) -> None:
    """Write the whole ledger to a file that only you can read.

    The file is made by `pg_dump` (custom format) and checked with `pg_restore`. It holds neither the files of
    the store nor `secrets.key`, without which sealed secrets cannot be opened: keep both elsewhere.

    \b
    Example:
      ow db backup ledger.dump
    """
    path = Path(file or f"openweights-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.dump").expanduser()
    made = backups.back_up(_admin_url(Settings.load()), path)
    if as_json:
        print_json(dataclasses.asdict(made))
    else:
        click.echo(f"{made.path}: {made.bytes} bytes, {made.tables} tables")


@db.command()
@click.argument("file")
@json_option
def restore(file: str, as_json: bool) -> None:
    """Bring a backup into an empty ledger, as a whole or not at all.

    A ledger in which anybody has done anything is refused.

    \b
    Example:
      OW_HOME=/srv/new ow up && OW_HOME=/srv/new ow db restore ledger.dump
    """
    made = backups.restore(_admin_url(Settings.load()), Path(file).expanduser())
    if as_json:
        print_json(dataclasses.asdict(made))
    else:
        click.echo(f"Restored {made.tables} tables from {made.path}. `ow db verify --deep` checks them.")


@db.command()
@click.option("--deep", is_flag=True, help="Read and hash every file of the store again.")
@json_option
@click.pass_context
def verify(ctx: click.Context, deep: bool, as_json: bool) -> None:
    """Check that the ledger and the file store are whole, and say how to mend what is not.

    Migrations, row-level security, tenancy, events without gaps, contiguous logs, states of jobs, runs and
    pods, and the content of every file. The exit code is 0 when every check is ok, else 1.

    \b
    Example:
      ow db verify --deep
    """
    settings = Settings.load()
    ok = print_checks(verify_ledger(_admin_url(settings), settings, deep=deep), as_json=as_json)
    ctx.exit(0 if ok else 1)


def _admin_url(settings: Settings) -> str:
    if settings.supabase_url and not settings.database_url:
        raise ConfigurationError(
            f"The ledger is the Supabase project {settings.supabase_url!r}. Set `OW_DATABASE_URL` to its "
            "connection string as `postgres`; the dashboard has it under Connect."
        )
    return databases.in_use(Folders(settings.home), settings).admin_url
