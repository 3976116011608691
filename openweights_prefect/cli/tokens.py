"""`ow token`: API tokens."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import click

from openweights_prefect.cli.output import age, json_option, print_json, print_table
from openweights_prefect.cli.person import own_ledger
from openweights_prefect.cli.secret_input import Duration
from openweights_prefect.cli.session import open_client
from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.resources.tokens import Tokens
from openweights_prefect.settings import Settings
from openweights_prefect.types.tenancy import TOKEN_ROLES, Token


@click.group()
def token() -> None:
    """Make, list and revoke API tokens.

    \b
    Example:
      ow token ls
    """


@token.command()
@click.option("--all", "everything", is_flag=True, help="Expired and revoked ones too.")
@json_option
def ls(everything: bool, as_json: bool) -> None:
    """List tokens, newest first: one's own, for an admin those of the organization.

    \b
    Example:
      ow token ls --json | jq -r '.[].prefix'
    """
    with open_client() as ow:
        tokens = [each for each in ow.tokens.list() if everything or each.state == "active"]
    if as_json:
        print_json([dataclasses.asdict(each) for each in tokens])
        return
    columns = (
        "prefix",
        "name",
        "role",
        "state",
        "age",
        "expires",
        "last used",
        "spent usd",
        "limit usd",
        "id",
    )
    print_table(columns, [_row(each) for each in tokens])


@token.command()
@click.argument("name")
@click.option(
    "--role", type=click.Choice(TOKEN_ROLES), default="user", show_default=True, help="What it may do."
)
@click.option(
    "--expires-in",
    type=Duration(),
    metavar="DURATION",
    default="never",
    show_default=True,
    help="Lifetime, such as `12h` or `30d`.",
)
@click.option("--spend-limit", type=float, metavar="USD", help="The most that its jobs may cost.")
@json_option
def create(
    name: str, role: str, expires_in: timedelta | None, spend_limit: float | None, as_json: bool
) -> None:
    """Make a token, and print it: this once, on stdout alone.

    It ends with your membership. One that is made by a token, without a person who has signed in, ends with
    that token too.

    \b
    Example:
      ow token create ci --expires-in 30d --spend-limit 50 > token.txt
    """
    with own_ledger(Settings.load()) as ledger:
        made = Tokens(ledger).create(name, role, expires_in=expires_in, spend_limit_usd=spend_limit)
    if as_json:
        print_json(dataclasses.asdict(made))
        return
    click.echo(made.token)
    ending = f"until {made.expires_at:%Y-%m-%d %H:%M} UTC" if made.expires_at else "until it is revoked"
    click.echo(f"A {role} token, valid {ending}. It is not shown again.", err=True)


@token.command()
@click.argument("tokens", metavar="TOKEN...", nargs=-1, required=True)
@json_option
@click.pass_context
def revoke(ctx: click.Context, tokens: tuple[str, ...], as_json: bool) -> None:
    """End tokens, and those that they made, from the next call on.

    TOKEN is the id or the prefix that `ow token ls` shows. One that is unknown does not keep the others from
    it; the exit code is 1 then.

    \b
    Example:
      ow token revoke ow_k3J9xQ2mA
    """
    revoked: list[Token] = []
    failed = False
    with open_client() as ow:
        for each in tokens:
            try:
                revoked.append(ow.tokens.revoke(each))
            except OpenWeightsError as exc:
                failed = True
                click.echo(f"Error: {exc}", err=True)
    if as_json:
        print_json({"revoked": [each.id for each in revoked]})
    else:
        for held in revoked:
            click.echo(f"{held.prefix}: revoked")
    ctx.exit(1 if failed else 0)


@token.command()
@click.argument("token_id", metavar="TOKEN")
@click.argument("usd", metavar="USD|none")
@json_option
def limit(token_id: str, usd: str, as_json: bool) -> None:
    """Set what the jobs of a token may cost, or `none`.

    \b
    Example:
      ow token limit ow_k3J9xQ2mA 100
    """
    try:
        amount = None if usd == "none" else float(usd)
    except ValueError:
        raise click.BadParameter(f"{usd!r} is neither an amount of USD nor `none`.") from None
    with open_client() as ow:
        changed = ow.tokens.set_limit(token_id, amount)
    if as_json:
        print_json(dataclasses.asdict(changed))
    else:
        click.echo(f"{changed.prefix}: {'no limit' if amount is None else f'{amount:g} USD'}")


def _row(held: Token) -> tuple[object, ...]:
    expires = f"{held.expires_at:%Y-%m-%d}" if held.expires_at else "never"
    used = f"{age(held.last_used_at)} ago" if held.last_used_at else "never"
    spent = f"{held.spent_usd:.2f}"
    return (
        held.prefix, held.name, held.role, held.state, age(held.created_at), expires, used, spent,
        held.spend_limit_usd, held.id,
    )  # fmt: skip
