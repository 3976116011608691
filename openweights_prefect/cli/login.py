"""`ow signup`, `ow login`, `ow logout`, `ow whoami`: who acts, and where."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from typing import Any

import click

from openweights_prefect.cli import person
from openweights_prefect.cli.login_file import Login, load_login, login_path, prepare_home, session_path
from openweights_prefect.cli.output import json_option, print_fields, print_json
from openweights_prefect.cli.person import Person
from openweights_prefect.cli.secret_input import Duration, read_secret
from openweights_prefect.errors import ConfigurationError, InvalidRequestError, OpenWeightsError
from openweights_prefect.ledger.connect import connect, project_url
from openweights_prefect.ledger.sessions import Session, SessionFile, SupabaseAuth
from openweights_prefect.resources.organizations import Organization, OrganizationInfo, Organizations
from openweights_prefect.settings import Settings
from openweights_prefect.stack.databases import ledger_address

PASSWORD_VARIABLE = "OPENWEIGHTS_PASSWORD"


def _project_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--url", metavar="URL", help="Address of the Supabase project; SUPABASE_URL otherwise."),
        click.option(
            "--key", metavar="KEY", help="Its publishable key, which is public; SUPABASE_ANON_KEY otherwise."
        ),
        click.option(
            "--organization", metavar="NAME|ID", help="The organization to act for, or the name of a new one."
        ),
        click.option(
            "--expires-in",
            type=Duration(),
            metavar="DURATION",
            default="90d",
            show_default=True,
            help="Lifetime of this machine's token, such as `12h`, `30d` or `never`.",
        ),
        click.option("--password-stdin", is_flag=True, help="Read the password from stdin."),
        json_option,
    )[::-1]:
        command = option(command)
    return command


@click.command()
@click.argument("email", required=False)
@_project_options
def signup(
    email: str | None,
    url: str | None,
    key: str | None,
    organization: str | None,
    expires_in: timedelta | None,
    password_stdin: bool,
    as_json: bool,
) -> None:
    """Create an account on a hosted ledger, and sign in.

    The password is asked for without echo, or comes from stdin or the variable OPENWEIGHTS_PASSWORD. Where
    addresses have to be confirmed, `ow login` goes on after that.

    \b
    Example:
      ow signup ada@example.org --url https://abc.supabase.co --key sb_publishable_...
    """
    settings = _settings(url, key)
    prepare_home(settings.home)
    email = email or _ask_for_address("EMAIL")
    password = read_secret("Password", stdin=password_stdin, variable=PASSWORD_VARIABLE, confirm=True)
    with closing(SupabaseAuth(project_url(settings), settings.supabase_key)) as auth:
        session = auth.sign_up(email, password)
    if session is None:
        if as_json:
            print_json({"signed_in": False, "confirm": email})
        else:
            click.echo(f"Confirm the address in the message that was sent to {email}, then run `ow login`.")
        return
    _enter(settings, session, organization=organization, expires_in=expires_in, as_json=as_json)


@click.command()
@_project_options
@click.option("--email", metavar="EMAIL", help="Address of the account; asked for otherwise.")
@click.option("--token", "with_token", is_flag=True, help="Sign in with an API token, read from stdin.")
def login(
    url: str | None,
    key: str | None,
    organization: str | None,
    expires_in: timedelta | None,
    password_stdin: bool,
    email: str | None,
    with_token: bool,
    as_json: bool,
) -> None:
    """Sign in to a hosted ledger, so that every command and script of this machine uses it.

    Makes a token for this machine and writes it to `credentials.json` in OW_HOME, which only you can read; it
    is never printed. The password is asked for without echo, or comes from stdin or the variable
    OPENWEIGHTS_PASSWORD. With `--token`, that API token is used as it is.

    \b
    Example:
      ow login --url https://abc.supabase.co --key sb_publishable_... --email ada@example.org
      ow login --token < token.txt
    """
    settings = _settings(url, key)
    prepare_home(settings.home)
    if with_token:
        _enter_with_token(settings, read_secret("API token", stdin=not sys.stdin.isatty()), as_json=as_json)
        return
    email = email or _ask_for_address("--email")
    password = read_secret("Password", stdin=password_stdin, variable=PASSWORD_VARIABLE)
    with closing(SupabaseAuth(project_url(settings), settings.supabase_key)) as auth:
        session = auth.sign_in(email, password)
    _enter(settings, session, organization=organization, expires_in=expires_in, as_json=as_json)


@click.command()
@click.option("--force", is_flag=True, help="Forget the login also when its token cannot be revoked now.")
@json_option
def logout(force: bool, as_json: bool) -> None:
    """Revoke the token of this machine, and forget it.

    A token that was given with `ow login --token` is forgotten but stays valid. Without a login there is
    nothing to do.

    \b
    Example:
      ow logout
    """
    home = Settings.load().home
    held = load_login(home)
    revoked = False
    if held is not None:
        try:
            person.end_token(held, home)
            person.end_session(held, home)
            revoked = held.minted
        except OpenWeightsError as exc:
            if not force:
                raise
            click.echo(f"Warning: the token was not revoked: {exc}", err=True)
        person.forget_session(home)
        person.forget_login(home)
    if as_json:
        print_json({"signed_out": held is not None, "revoked": revoked})
    elif held is None:
        click.echo("Nobody is signed in here.")
    else:
        ending = "and its token revoked" if revoked else "its token stays valid"
        click.echo(f"Signed out of {held.supabase_url}, {ending}.")


@click.command()
@json_option
def whoami(as_json: bool) -> None:
    """Show who acts, for which organization, on which ledger, and which settings say so.

    \b
    Example:
      ow whoami --json | jq -r .organization_id
    """
    settings = Settings.load()
    with closing(connect(settings)) as ledger:
        info = Organizations(ledger).info()
    is_local = not settings.supabase_url and not settings.api_key
    places = {
        "ledger": ledger_address(settings),
        "ledger_from": Settings.origin_of("supabase_url" if settings.supabase_url else "database_url"),
        "identity_from": Settings.origin_of("organization_id" if is_local else "api_key"),
    }
    if as_json:
        print_json({**_document(info), "local_person": is_local, **places})
        return
    who = "local person" if is_local else info["email"] or info["user_id"]
    token = f"{info['token_name']} ({info['token_id']})" if info["token_id"] else None
    print_fields(
        [
            ("person", who),
            ("role", info["role"]),
            ("token", token),
            ("organization", f"{info['name']} ({info['id']})"),
            ("secrets", info["secret_storage"]),
            ("ledger", f"{places['ledger']}, from {places['ledger_from']}"),
            ("identity", f"from {places['identity_from']}"),
        ]
    )


def _ask_for_address(argument: str) -> str:
    if not sys.stdin.isatty():
        raise click.UsageError(f"There is no terminal to ask for the email address: give {argument}.")
    address: str = click.prompt("Email", err=True)
    return address


def _settings(url: str | None, key: str | None) -> Settings:
    settings = Settings.load(given={"supabase_url": url, "supabase_key": key})
    if not settings.supabase_url:
        raise ConfigurationError(
            "There is nothing to sign in to: the local stack needs no login. For a hosted ledger, give "
            "`--url` and `--key`, or set SUPABASE_URL and SUPABASE_ANON_KEY."
        )
    return settings


def _enter(
    settings: Settings,
    session: Session,
    *,
    organization: str | None,
    expires_in: timedelta | None,
    as_json: bool,
) -> None:
    """Choose or found the organization, make a token for this machine, and write everything down."""
    with person.opened_session(settings, session) as somebody:
        chosen = _choose(somebody, organization)
        made = somebody.mint(chosen, expires_in=expires_in)
    warning = person.keep_login(settings.home, made)
    SessionFile(session_path(settings.home)).save(session)
    _report(settings, made, warning, as_json=as_json)


def _enter_with_token(settings: Settings, token: str, *, as_json: bool) -> None:
    settings = settings.with_given({"api_key": token.strip()})
    with closing(connect(settings)) as ledger:
        info = Organizations(ledger).info()
    given = Login(
        supabase_url=project_url(settings),
        supabase_key=settings.supabase_key,
        organization_id=info["id"],
        api_key=settings.api_key,
        token_id=info["token_id"] or "",
        minted=False,
    )
    warning = person.keep_login(settings.home, given)
    person.forget_session(settings.home)
    _report(settings, given, warning, as_json=as_json)


def _choose(somebody: Person, wanted: str | None) -> Organization:
    """The organization that is wanted, the only one, or a new one for who has none."""
    with somebody.organizations() as organizations:
        held = organizations.list()
        if not held:
            return organizations.create(wanted or somebody.email or "my organization", email=somebody.email)
    if wanted is not None:
        return find_organization(held, wanted)
    if len(held) == 1:
        return held[0]
    names = ", ".join(f"{each['name']!r} ({each['id']})" for each in held)
    if not sys.stdin.isatty():
        raise InvalidRequestError(f"You belong to {names}. Choose one with `--organization`.")
    click.echo(f"You belong to {names}.", err=True)
    return find_organization(held, click.prompt("Organization", default=held[0]["name"], err=True))


def find_organization(held: Sequence[Organization], wanted: str) -> Organization:
    """The one with this id, or this name if no other has it."""
    found = [each for each in held if each["id"] == wanted] or [
        each for each in held if each["name"] == wanted
    ]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{each['name']!r} ({each['id']})" for each in held) or "none"
    problem = "is the name of several" if found else "is none"
    raise InvalidRequestError(f"{wanted!r} {problem} of your organizations: {names}.")


def _report(settings: Settings, made: Login, warning: str | None, *, as_json: bool) -> None:
    with closing(connect(made.settings(settings.home))) as ledger:
        info = Organizations(ledger).info()
    if warning is not None:
        click.echo(f"Warning: the token of the login before was not revoked: {warning}", err=True)
    path = login_path(settings.home)
    _warn_of_environment(made)
    if as_json:
        print_json({**_document(info), "ledger": made.supabase_url, "file": path})
        return
    who = info["email"] or info["user_id"]
    click.echo(f"Signed in to {made.supabase_url} as {who} ({info['role']} of {info['name']!r}).")
    click.echo(f"The token is in {path}; `ow logout` revokes it.", err=True)


def _warn_of_environment(made: Login) -> None:
    """A login is of no effect while the environment says something else."""
    now = Settings.load()
    if (now.supabase_url.rstrip("/"), now.api_key) != (made.supabase_url, made.api_key):
        name = Settings.origin_of("supabase_url" if now.supabase_url != made.supabase_url else "api_key")
        click.echo(f"Warning: {name} is set and counts more than this login.", err=True)


def _document(info: OrganizationInfo) -> dict[str, object]:
    return {
        "organization_id": info["id"],
        "organization_name": info["name"],
        **{name: value for name, value in info.items() if name not in ("id", "name")},
    }
