"""`ow env`: the organization's secrets, which jobs get as environment variables."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from openweights_prefect.cli.dotenv import parse_dotenv
from openweights_prefect.cli.output import age, json_option, print_json, print_table
from openweights_prefect.cli.secret_input import from_environment, read_secret
from openweights_prefect.cli.session import open_client
from openweights_prefect.errors import InvalidFileError


@click.group()
def env() -> None:
    """Store secrets that jobs get as environment variables.

    \b
    Example:
      ow env ls
    """


@env.command("import")
@click.argument("file", metavar="FILE")
@json_option
def import_(file: str, as_json: bool) -> None:
    """Store every variable of a .env file; `-` is stdin.

    A file with a bad line is refused as a whole, and nothing is stored.

    \b
    Example:
      ow env import .env
    """
    values = parse_dotenv(_read(file), source=file)
    with open_client() as ow:
        for name, value in values.items():
            ow.secrets.set(name, value)
            if not as_json:
                click.echo(f"Stored {name}")
    if as_json:
        print_json({"stored": list(values)})
    elif not values:
        click.echo(f"{file!r} has no variables.", err=True)


@env.command()
@json_option
def ls(as_json: bool) -> None:
    """List the names of the secrets, never a value.

    \b
    Example:
      ow env ls
    """
    with open_client() as ow:
        held = ow.secrets.list()
    if as_json:
        print_json([vars(each) for each in held])
        return
    print_table(("name", "age", "changed"), [(s.name, age(s.created_at), age(s.updated_at)) for s in held])


@env.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Print the value of a secret; only admins may, and the audit log notes it.

    \b
    Example:
      ow env show HF_TOKEN
    """
    with open_client() as ow:
        value = ow.secrets.get(name)
    if as_json:
        print_json({"name": name, "value": value})
    else:
        click.echo(value)


@env.command("set")
@click.argument("name")
@click.argument("source", metavar="[-]", required=False)
@click.option("--from-env", metavar="VARIABLE", help="Take the value of this environment variable.")
@json_option
def set_(name: str, source: str | None, from_env: str | None, as_json: bool) -> None:
    """Store a secret, or change it.

    The value is asked for without echo; `-` reads it from stdin. It is never an argument, which other
    processes could read.

    \b
    Example:
      ow env set HF_TOKEN
      ow env set HF_TOKEN - < token.txt
      ow env set HF_TOKEN --from-env HF_TOKEN
    """
    if source not in (None, "-") or "=" in name:
        raise click.UsageError(
            "Others can read arguments, so a value is none: write it to stdin (`-`), type it, or use "
            "`--from-env`."
        )
    value = from_environment(from_env) if from_env else read_secret(f"Value of {name}", stdin=source == "-")
    with open_client() as ow:
        ow.secrets.set(name, value)
    if as_json:
        print_json({"stored": [name]})
    else:
        click.echo(f"Stored {name}")


@env.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@json_option
@click.pass_context
def unset(ctx: click.Context, names: tuple[str, ...], as_json: bool) -> None:
    """Remove secrets; only admins may.

    The exit code is 1 if one does not exist.

    \b
    Example:
      ow env unset HF_TOKEN
    """
    with open_client() as ow:
        removed = {name: ow.secrets.delete(name) for name in names}
    for name, was_there in removed.items():
        if not was_there:
            click.echo(f"Error: No secret {name!r} in this organization; see `ow env ls`.", err=True)
        elif not as_json:
            click.echo(f"Removed {name}")
    if as_json:
        print_json({"removed": [name for name, was_there in removed.items() if was_there]})
    ctx.exit(0 if all(removed.values()) else 1)


@env.command()
@json_option
def rotate(as_json: bool) -> None:
    """Seal every secret with a new key, and drop the old one; only admins may.

    On Supabase, its Vault has the key and there is nothing to rotate here.

    \b
    Example:
      ow env rotate
    """
    with open_client() as ow:
        count = ow.secrets.rotate()
    if as_json:
        print_json({"rotated": count})
    else:
        click.echo(f"{count} secrets are sealed with a new key.")


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8")
    except OSError as exc:
        raise InvalidFileError(f"{file!r} cannot be read: {exc.strerror}.") from exc
    except UnicodeDecodeError:
        problem = f"{file!r} is not UTF-8 text. Save it as UTF-8."
    raise InvalidFileError(problem)  # Outside the handler: its cause quotes the content.
