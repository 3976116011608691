"""`ow org`: organizations and their members."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta

import click

from openweights_prefect.cli import person
from openweights_prefect.cli.login import find_organization
from openweights_prefect.cli.output import age, json_option, print_json, print_table
from openweights_prefect.cli.secret_input import Duration, read_secret
from openweights_prefect.cli.session import open_client
from openweights_prefect.errors import AuthenticationError, ConfigurationError
from openweights_prefect.ledger.connect import connect
from openweights_prefect.resources.organizations import Organization, Organizations
from openweights_prefect.settings import Settings
from openweights_prefect.stack.addresses import choose_organization
from openweights_prefect.stack.service import Folders
from openweights_prefect.types.tenancy import MEMBER_ROLES


@click.group()
def org() -> None:
    """Found, enter and manage organizations.

    \b
    Example:
      ow org ls
    """


@org.command()
@click.argument("name")
@json_option
def create(name: str, as_json: bool) -> None:
    """Found an organization, as its admin.

    \b
    Example:
      ow org create "Interpretability"
    """
    settings = Settings.load()
    with person.signed_in_person(settings) as somebody, somebody.organizations() as organizations:
        made = organizations.create(name, email=somebody.email)
    if as_json:
        print_json(made)
        return
    click.echo(made["id"])
    click.echo(f"Founded {name!r}. `ow org switch {made['id']}` makes it the one you act for.", err=True)


@org.command()
@json_option
def ls(as_json: bool) -> None:
    """List the organizations that you belong to.

    Who has only a token sees the token's.

    \b
    Example:
      ow org ls
    """
    settings = Settings.load()
    with closing(connect(settings)) as ledger:
        current = ledger.organization_id
        held = _organizations(settings, Organizations(ledger))
    if as_json:
        print_json([{**each, "current": each["id"] == current} for each in held])
        return
    rows = [("*" if each["id"] == current else "", each["name"], each["role"], each["id"]) for each in held]
    print_table(("", "name", "role", "id"), rows)


@org.command()
@click.argument("organization", metavar="NAME|ID")
@json_option
def switch(organization: str, as_json: bool) -> None:
    """Act for another organization from now on.

    Makes a token there for this machine, and revokes the one before. The worker of a local stack serves the
    new one after `ow down` and `ow up`.

    \b
    Example:
      ow org switch Interpretability
    """
    settings = Settings.load()
    for name in ("api_key", "organization_id"):
        if Settings.source_of(name) == "environment":
            raise ConfigurationError(
                f"{Settings.origin_of(name)} is set, and decides for which organization you act. Unset it."
            )
    with person.signed_in_person(settings) as somebody:
        with somebody.organizations() as organizations:
            chosen = find_organization(organizations.list(), organization)
        warning = None
        if settings.supabase_url:
            made = somebody.mint(chosen, expires_in=timedelta(days=90))
            warning = person.keep_login(settings.home, made)
        else:
            choose_organization(Folders(settings.home), chosen["id"])
    if warning is not None:
        click.echo(f"Warning: the token before was not revoked: {warning}", err=True)
    if as_json:
        print_json(chosen)
    else:
        click.echo(f"You act for {chosen['name']!r} ({chosen['id']}) now.")


@org.command()
@json_option
def members(as_json: bool) -> None:
    """List the members of the organization.

    \b
    Example:
      ow org members
    """
    with open_client() as ow:
        held = ow.organization.members()
    if as_json:
        print_json(held)
        return
    rows = [(each["email"], each["role"], age(each["created_at"]), each["user_id"]) for each in held]
    print_table(("email", "role", "member for", "user id"), rows)


@org.command()
@click.argument("email", required=False)
@click.option(
    "--role", type=click.Choice(MEMBER_ROLES), default="user", show_default=True, help="What they may do."
)
@click.option(
    "--expires-in",
    type=Duration(),
    metavar="DURATION",
    default="7d",
    show_default=True,
    help="How long the code can be used, 30d at most.",
)
@json_option
def invite(email: str | None, role: str, expires_in: timedelta | None, as_json: bool) -> None:
    """Make an invitation code, and print it: this once, on stdout alone.

    Send it to one person, who brings it with `ow org join`. The address is a note. Only admins invite.

    \b
    Example:
      ow org invite ada@example.org
    """
    if expires_in is None:
        raise click.BadParameter("an invitation ends after 30 days at the latest", param_hint="--expires-in")
    with open_client() as ow:
        made = ow.organization.invite(email, role, expires_in=expires_in)
    if as_json:
        print_json(dataclasses.asdict(made))
        return
    click.echo(made.code)
    click.echo(
        f"For one {role}, until {made.expires_at:%Y-%m-%d %H:%M} UTC. It is not shown again.", err=True
    )


@org.command()
@click.argument("source", metavar="[-]", required=False)
@json_option
def join(source: str | None, as_json: bool) -> None:
    """Enter the organization of an invitation code.

    The code is asked for without echo; `-` reads it from stdin.

    \b
    Example:
      ow org join - < invitation.txt
    """
    if source not in (None, "-"):
        raise click.UsageError("Others can read arguments: write the code to stdin (`-`), or type it.")
    code = read_secret("Invitation code", stdin=source == "-")
    settings = Settings.load()
    with person.signed_in_person(settings) as somebody, somebody.organizations() as organizations:
        joined = organizations.join(code, email=somebody.email)
    if as_json:
        print_json(joined)
        return
    click.echo(f"You are a member of {joined['name']!r} ({joined['id']}); `ow org switch` goes there.")


@org.command()
@click.argument("member", metavar="EMAIL|USER_ID")
@click.argument("role", type=click.Choice(MEMBER_ROLES))
@json_option
def role(member: str, role: str, as_json: bool) -> None:
    """Make a member an admin or a user.

    \b
    Example:
      ow org role ada@example.org admin
    """
    with open_client() as ow:
        ow.organization.set_role(member, role)
    if as_json:
        print_json({"member": member, "role": role})
    else:
        click.echo(f"{member}: {role}")


@org.command()
@click.argument("member", metavar="EMAIL|USER_ID")
@json_option
def remove(member: str, as_json: bool) -> None:
    """End a membership, and every token that the member made.

    \b
    Example:
      ow org remove ada@example.org
    """
    with open_client() as ow:
        ow.organization.remove(member)
    if as_json:
        print_json({"removed": member})
    else:
        click.echo(f"{member}: removed")


def _organizations(settings: Settings, own: Organizations) -> Sequence[Organization]:
    """All of the person's, where it is signed in; else what the token sees."""
    if not settings.supabase_url or Settings.source_of("api_key") == "environment":
        return own.list()
    try:
        with person.signed_in_person(settings) as somebody, somebody.organizations() as organizations:
            return organizations.list()
    except AuthenticationError:
        return own.list()
