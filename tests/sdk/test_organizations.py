"""`ow.organization`: members, invitations, and the audit log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import (
    AuthenticationError,
    InvalidParameterError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
)
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.resources.organizations import Organizations
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings
from tests.callers import FixedIdentity

EMAIL = "bob@example.org"


@pytest.fixture
def person(settings: Settings) -> Iterator[Any]:
    """Opens an organization as another person."""
    opened: list[PostgresLedger] = []

    def open_one(user_id: str, organization_id: str | None = None) -> Organizations:
        claims = {"role": "authenticated", "aud": "authenticated", "sub": user_id}
        if organization_id:
            claims["organization_id"] = organization_id
        opened.append(PostgresLedger(settings.database_url, identity=FixedIdentity(claims)))
        return Organizations(opened[-1])

    yield open_one
    for ledger in opened:
        ledger.close()


def test_the_local_person_is_the_admin(ow: OpenWeights) -> None:
    """Of the organization that every installation begins with."""
    info = ow.organization.info()
    assert (info["id"], info["role"], info["token_id"]) == (LOCAL_ORGANIZATION_ID, "admin", None)
    assert info["secret_storage"] == "sealed"
    [member] = ow.organization.members()
    assert (member["user_id"], member["role"]) == (info["user_id"], "admin")


def test_an_invitation_works_once(ow: OpenWeights, person: Any) -> None:
    """It is shown once, lets one person in with its role, and is refused after that."""
    bob, eve = str(uuid4()), str(uuid4())
    made = ow.organization.invite(EMAIL, "user")
    assert made.code.startswith("owi_")
    assert made.code not in repr(made)
    joined = person(bob).join(made.code, email=EMAIL)
    assert (joined["id"], joined["role"]) == (LOCAL_ORGANIZATION_ID, "user")
    assert person(bob).join(made.code, email=EMAIL)["id"] == joined["id"]
    with pytest.raises(InvalidRequestError, match="used"):
        person(eve).join(made.code)
    [held] = ow.organization.invitations()
    assert (held.email, held.role, held.accepted_at is not None) == (EMAIL, "user", True)
    assert not hasattr(held, "code")


def test_members_are_changed_by_admins(ow: OpenWeights, person: Any) -> None:
    """By address or id; a removed member is nobody at the next call, and the last admin stays."""
    bob = str(uuid4())
    person(bob).join(ow.organization.invite().code, email=EMAIL)
    inside = person(bob, LOCAL_ORGANIZATION_ID)
    with pytest.raises(PermissionDeniedError):
        inside.invite()
    with pytest.raises(PermissionDeniedError):
        inside.audit()
    ow.organization.set_role(EMAIL.upper(), "admin")
    assert inside.info()["role"] == "admin"
    ow.organization.set_role(bob, "user")
    ow.organization.remove(EMAIL)
    with pytest.raises(AuthenticationError):
        inside.info()
    me = ow.organization.info()["user_id"]
    assert me is not None
    with pytest.raises(PermissionDeniedError, match="last admin"):
        ow.organization.remove(me)
    for unknown in (EMAIL, bob):
        with pytest.raises(NotFoundError, match="ow org members"):
            ow.organization.set_role(unknown, "user")


def test_organizations_are_founded_by_people(ow: OpenWeights, settings: Settings) -> None:
    """A token acts for one organization, and founds or enters none."""
    made = ow.organization.create("Second")
    assert (made["name"], made["role"]) == ("Second", "admin")
    assert {each["name"] for each in ow.organization.list()} == {"local", "Second"}
    assert ow.organization_id == LOCAL_ORGANIZATION_ID
    code = ow.organization.invite().code
    token = ow.tokens.create("t", "admin").token
    with OpenWeights(auth_token=token, settings=settings) as client:
        assert [each["name"] for each in client.organization.list()] == ["local"]
        with pytest.raises(PermissionDeniedError):
            client.organization.create("Third")
        with pytest.raises(PermissionDeniedError):
            client.organization.join(code)
    with OpenWeights(organization_id=made["id"], settings=settings) as client:
        client.organization.rename("Renamed")
        assert client.organization.info()["name"] == "Renamed"
        assert client.tokens.list() == []


def test_the_audit_log_names_who_did_what(ow: OpenWeights, settings: Settings) -> None:
    """Newest first and in pages; a token is named beside the person who made it."""
    made = ow.tokens.create("t", "admin")
    with OpenWeights(auth_token=made.token, settings=settings) as client:
        client.organization.rename("By token")
    newest, before, *_ = ow.organization.audit()
    assert (newest["action"], newest["subject"]) == ("rename_organization", "By token")
    assert newest["actor"]["token_id"] == made.id
    assert (before["action"], before["subject"]) == ("create_token", "t")
    assert ow.organization.audit(limit=1, before=newest["id"]) == [before]
    assert made.token not in str(ow.organization.audit())


@pytest.mark.parametrize("arguments", [{"role": "worker"}, {"expires_in": 31 * 86400}, {"expires_in": 0}])
def test_bad_invitations_are_refused(ow: OpenWeights, arguments: dict[str, Any]) -> None:
    """The message names the argument and the value."""
    with pytest.raises(InvalidParameterError, match=next(iter(arguments))):
        ow.organization.invite(**arguments)
