"""The databases of the stack: the ledger's and Prefect's, on the embedded server or on the user's own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import psycopg

from openweights_prefect.errors import (
    InvalidRequestError,
    LedgerUnavailable,
    PermissionDeniedError,
    StackError,
)
from openweights_prefect.ledger import embedded, migrator
from openweights_prefect.ledger.postgres import check_url, local_ledger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings
from openweights_prefect.stack.service import Folders

_LEDGER = "openweights"
_PREFECT = "prefect"
_CONNECT_SECONDS = 5


@dataclass(frozen=True)
class Databases:
    """Where the two databases are, for whom."""

    server_url: str
    """To create databases with."""
    admin_url: str
    """The ledger as its owner: migrations."""
    ledger_url: str
    """The ledger as everybody else uses it."""
    prefect_url: str
    """Prefect's database, as SQLAlchemy wants it."""
    is_embedded: bool


def locate(folders: Folders, *, own: str = "") -> Databases:
    """The databases on the server of the URL `own`, else on the embedded one; connects to nothing."""
    if own:
        check_url(own)
        prefect = _with_database(own, _PREFECT)
        return Databases(own, own, own, _for_asyncpg(prefect), is_embedded=False)
    server = embedded.EmbeddedPostgres(folders.postgres)
    return Databases(
        server_url=server.url(database="postgres", user="postgres"),
        admin_url=server.url(database=_LEDGER, user="postgres"),
        ledger_url=server.url(database=_LEDGER, user="authenticator"),
        prefect_url=_for_asyncpg(server.url(database=_PREFECT, user=_PREFECT)),
        is_embedded=True,
    )


def in_use(folders: Folders, settings: Settings) -> Databases:
    """The databases that the settings point to."""
    url = settings.database_url
    if url in ("", locate(folders).ledger_url):
        return locate(folders)
    return locate(folders, own=url)


def ledger_address(settings: Settings) -> str:
    """Where the ledger of the settings is, for people: without a user or a password."""
    if settings.supabase_url:
        return settings.supabase_url
    if in_use(Folders(settings.home), settings).is_embedded:
        return f"embedded PostgreSQL in {settings.home}"
    parts = urlsplit(settings.database_url)
    return f"PostgreSQL at {parts.hostname or 'a local socket'}{parts.path}"


def prepare_prefect(databases: Databases) -> None:
    """Create Prefect's database if it is missing."""
    owner = _PREFECT if databases.is_embedded else None
    migrator.ensure_database(databases.server_url, _PREFECT, owner=owner)


def prepare_ledger(databases: Databases, settings: Settings) -> list[str]:
    """Create or migrate the ledger, with the organization of the settings; returns the migrations applied."""
    if databases.is_embedded:
        migrator.ensure_database(databases.server_url, _LEDGER)
    applied = migrator.migrate(databases.admin_url)
    create_organization(databases.ledger_url, settings.organization_id)
    return applied


def create_organization(ledger_url: str, organization_id: str) -> None:
    """Make the organization with the local person as its admin; one that is there is left as it is."""
    name = "local" if organization_id == LOCAL_ORGANIZATION_ID else organization_id
    ledger = local_ledger(ledger_url, organization_id)
    try:
        ledger.call("create_organization", organization_id=organization_id, name=name)
    except (InvalidRequestError, PermissionDeniedError) as exc:
        raise StackError(
            f"The organization {organization_id!r} cannot be created in the ledger: {exc} "
            "Check `OW_ORGANIZATION_ID`, a UUID."
        ) from exc
    finally:
        ledger.close()


def await_server(databases: Databases, *, seconds: float = 20) -> None:
    """Return when the user's own server lets us in; raises `LedgerUnavailable` when it does not in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            psycopg.connect(databases.server_url, connect_timeout=_CONNECT_SECONDS).close()
            return
        except psycopg.OperationalError as exc:
            if time.monotonic() > deadline:
                raise LedgerUnavailable(
                    f"The server of `OW_DATABASE_URL` did not let us in within {seconds:.0f} s: {exc}. "
                    "Start it, or unset the variable to use the embedded one."
                ) from exc
        time.sleep(0.5)


def is_up(databases: Databases) -> bool:
    """Whether the server lets us in now."""
    try:
        psycopg.connect(databases.server_url, connect_timeout=_CONNECT_SECONDS).close()
        return True
    except psycopg.Error:
        return False


def _with_database(url: str, database: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


def _for_asyncpg(url: str) -> str:
    """Prefect's driver has its own word for `sslmode`, and knows no other of libpq's options."""
    parts = urlsplit(url)
    known = {"host": "host", "port": "port", "sslmode": "ssl"}
    query = [(known[name], value) for name, value in parse_qsl(parts.query) if name in known]
    return urlunsplit(parts._replace(scheme="postgresql+asyncpg", query=urlencode(query)))
