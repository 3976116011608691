"""The block against real policies: row-level security of a real PostgreSQL decides what a token reaches."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from prefect.results import ResultStore

from openweights_prefect.credentials import SupabaseCredentials, SupabaseStorage
from openweights_prefect.errors import AuthenticationError, NotFoundError, PermissionDeniedError
from openweights_prefect.ledger.identity import LocalIdentity, hash_secret
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID

if TYPE_CHECKING:
    from tests.supabase_double import SupabaseDouble

TOKEN = f"ow_{secrets.token_urlsafe(32)}"
OTHER = "6f1c2f5e-7a34-4a53-9a2c-0d7e3b1c9f10"


@pytest.fixture
def transport() -> str:
    return "supabase"


@pytest.fixture
def person(ledger_url: str) -> Iterator[PostgresLedger]:
    """The ledger as a member of the local organization."""
    ledger = PostgresLedger(ledger_url, identity=LocalIdentity(LOCAL_ORGANIZATION_ID), connections=1)
    yield ledger
    ledger.close()


@pytest.fixture
def token_id(person: PostgresLedger) -> str:
    [row] = person.call("create_token", token_name="block", hash=hash_secret(TOKEN), prefix=TOKEN[:8])
    return str(row["token"]["id"])


@pytest.fixture
def credentials(supabase: SupabaseDouble, token_id: str) -> SupabaseCredentials:
    return SupabaseCredentials(url=supabase.url, key=supabase.key, token=TOKEN)


def storage(credentials: SupabaseCredentials, organization_id: str) -> SupabaseStorage:
    return SupabaseStorage(basepath=f"{organization_id}/flow-results", credentials=credentials)


def test_a_member_keeps_results(credentials: SupabaseCredentials) -> None:
    """Written, read, listed and replaced; Prefect's result store works on it."""
    mine = storage(credentials, LOCAL_ORGANIZATION_ID)
    mine.write_path("sub/key", b"1")
    mine.write_path("sub/key", b"2")
    assert mine.read_path("sub/key") == b"2"
    with mine._objects() as objects:
        assert list(objects.list(mine.basepath)) == ["sub/key"]
    store = ResultStore(result_storage=mine)
    store.write({"loss": 0.5}, key="job-1")
    assert ResultStore(result_storage=mine).read("job-1").result == {"loss": 0.5}


def test_no_other_organization_is_reached(credentials: SupabaseCredentials) -> None:
    """Neither for writing nor for reading, and what is there is not told."""
    other = storage(credentials, OTHER)
    with pytest.raises(PermissionDeniedError):
        other.write_path("key", b"1")
    with pytest.raises(NotFoundError):
        other.read_path("key")
    with other._objects() as objects:
        assert list(objects.list(OTHER)) == []


def test_a_file_of_the_ledger_is_not_replaced(credentials: SupabaseCredentials) -> None:
    """Only results are: a file is what its id says."""
    files = SupabaseStorage(basepath=f"{LOCAL_ORGANIZATION_ID}/conversations", credentials=credentials)
    files.write_path("file-0123456789ab", b"1")
    with pytest.raises(PermissionDeniedError):
        files.write_path("file-0123456789ab", b"2")
    assert files.read_path("file-0123456789ab") == b"1"


def test_a_revoked_token_reaches_nothing_at_once(
    credentials: SupabaseCredentials, person: PostgresLedger, token_id: str
) -> None:
    """Not even while its last JWT is good; a new process is told which variable to set anew."""
    mine = storage(credentials, LOCAL_ORGANIZATION_ID)
    mine.write_path("key", b"1")
    person.call("revoke_token", token_id=token_id)
    with pytest.raises(PermissionDeniedError):
        mine.write_path("key", b"2")
    with pytest.raises(NotFoundError):
        mine.read_path("key")
    with pytest.raises(AuthenticationError, match="OPENWEIGHTS_API_KEY") as caught:
        copy.deepcopy(mine).read_path("key")
    assert TOKEN not in str(caught.value)
