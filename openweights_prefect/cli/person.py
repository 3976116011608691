"""A person at the command line: who may found and enter organizations, which no token may."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from openweights_prefect.cli.login_file import Login, load_login, login_path, save_login, session_path
from openweights_prefect.errors import AuthenticationError, OpenWeightsError
from openweights_prefect.ledger.access import AccessToken, AccessTokens
from openweights_prefect.ledger.connect import connect, project_url, supabase_ledger
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.ledger.sessions import Session, SessionFile, SessionRefresh, SupabaseAuth
from openweights_prefect.resources.organizations import Organization, Organizations
from openweights_prefect.resources.tokens import create_token
from openweights_prefect.settings import Settings

_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Person:
    """Somebody who has signed in; on a local installation, whoever may open its database."""

    settings: Settings
    email: str | None
    open: Callable[[str | None], Ledger]
    """The ledger as this person sees it, within an organization or none."""

    @contextmanager
    def organizations(self, organization_id: str | None = None) -> Iterator[Organizations]:
        """The organizations of this person."""
        with closing(self.open(organization_id)) as ledger:
            yield Organizations(ledger)

    def mint(self, organization: Organization, *, expires_in: timedelta | None) -> Login:
        """A token for this machine, with this person's own rights in the organization."""
        with closing(self.open(organization["id"])) as ledger:
            made = create_token(
                ledger, socket.gethostname()[:100], organization["role"], expires_in=expires_in
            )
        return Login(
            supabase_url=project_url(self.settings),
            supabase_key=self.settings.supabase_key,
            organization_id=organization["id"],
            api_key=made.token,
            token_id=made.id,
            minted=True,
        )


@contextmanager
def opened_session(settings: Settings, session: Session) -> Iterator[Person]:
    """The person of a session that was opened just now, while its first access token lasts."""
    token = AccessToken(session.access_token, session.expires_at - time.time())
    yield _hosted(settings, session.email, AccessTokens(lambda: token))


@contextmanager
def signed_in_person(settings: Settings) -> Iterator[Person]:
    """Whoever is signed in here; raises `AuthenticationError` when nobody is, in person."""
    if not settings.supabase_url:
        yield Person(settings, None, lambda organization: connect(_within(settings, organization)))
        return
    login, file = load_login(settings.home), SessionFile(session_path(settings.home))
    # A session is shown to the project that opened it, and to no other.
    if login is None or login.supabase_url != settings.supabase_url.rstrip("/") or file.load() is None:
        raise AuthenticationError(
            f"Nobody is signed in here in person at {settings.supabase_url!r}, and a token acts for one "
            "organization only. Run `ow login`."
        )
    with closing(SupabaseAuth(project_url(settings), settings.supabase_key)) as auth:
        access = AccessTokens(SessionRefresh(auth, file))
        access.bearer()
        session = file.load()
        yield _hosted(settings, session.email if session else None, access)


@contextmanager
def own_ledger(settings: Settings) -> Iterator[Ledger]:
    """The ledger as the person who is signed in here sees it, else as the token of the settings does.

    What a token makes ends with that token, and `ow logout` ends the one of this machine.
    """
    login = load_login(settings.home)
    of_login = login is not None and login.minted and login.api_key == settings.api_key
    if not of_login or not session_path(settings.home).exists():
        with closing(connect(settings)) as ledger:
            yield ledger
        return
    with signed_in_person(settings) as somebody, closing(somebody.open(settings.organization_id)) as ledger:
        yield ledger


def keep_login(home: Path, login: Login) -> str | None:
    """Write the login down and end the one before; returns why that one could not be ended."""
    before = load_login(home)
    try:
        save_login(home, login)
    except OpenWeightsError:
        with contextlib.suppress(OpenWeightsError):
            end_token(login, home)
        raise
    if before is None or before.token_id == login.token_id:
        return None
    try:
        end_token(before, home)
    except OpenWeightsError as exc:
        return str(exc)
    return None


def end_token(login: Login, home: Path) -> None:
    """Revoke the token of a login, if it was made for it; silent when it has ended already."""
    if not login.minted:
        return
    connection = connect(login.settings(home), patience_seconds=_PATIENCE_SECONDS)
    with contextlib.suppress(AuthenticationError), closing(connection) as ledger:
        ledger.call("revoke_token", token_id=login.token_id)


def end_session(login: Login, home: Path) -> None:
    """Sign the person out of this machine; silent when nobody is signed in."""
    file = SessionFile(session_path(home))
    with contextlib.suppress(AuthenticationError):
        session = file.load()
        if session is not None:
            with closing(SupabaseAuth(login.supabase_url, login.supabase_key)) as auth:
                if session.expires_at <= time.time():
                    session = auth.refresh(session.refresh_token)
                auth.sign_out(session)
    forget_session(home)


def forget_session(home: Path) -> None:
    """Delete the session's file."""
    SessionFile(session_path(home)).remove()


def forget_login(home: Path) -> None:
    """Delete the login's file."""
    login_path(home).unlink(missing_ok=True)


def _hosted(settings: Settings, email: str | None, access: AccessTokens) -> Person:
    def open_ledger(organization_id: str | None) -> Ledger:
        return supabase_ledger(settings, access, organization_id=organization_id)

    return Person(settings, email, open_ledger)


def _within(settings: Settings, organization_id: str | None) -> Settings:
    return replace(settings, organization_id=organization_id) if organization_id else settings
