"""`ow.organization`: the tenant, its members, and the way in."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import Any, TypedDict
from uuid import uuid4

from openweights_prefect.errors import InvalidRequestError, NotFoundError
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.resources.session import check_choice, check_limit, every_row
from openweights_prefect.resources.tokens import whole_seconds
from openweights_prefect.types.job import parse_time
from openweights_prefect.types.tenancy import MEMBER_ROLES, Invitation, NewInvitation

_WEEK = timedelta(days=7)
_LONGEST_SECONDS = 30 * 86400


class OrganizationInfo(TypedDict):
    """The organization, and who the caller is in it."""

    id: str
    name: str
    role: str
    """`admin`, `user` or `worker`: never more than the token's."""
    user_id: str | None
    email: str | None
    token_id: str | None
    token_name: str | None
    secret_storage: str
    """`vault` on Supabase, else `sealed` by a key of the caller's."""


class Organization(TypedDict):
    """An organization that the caller belongs to."""

    id: str
    name: str
    created_at: datetime | None
    role: str
    """The caller's."""


class Member(TypedDict):
    """A person in the organization."""

    user_id: str
    email: str | None
    role: str
    created_at: datetime | None


class AuditEntry(TypedDict):
    """Who did what: a line that nobody can change."""

    id: int
    created_at: datetime | None
    actor: dict[str, str]
    """`user_id`, `token_id` or `worker_id`."""
    action: str
    subject: str
    detail: Any


class Organizations:
    """The organization that the client acts for; only people, not tokens, `create` and `join` others."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def info(self) -> OrganizationInfo:
        """The organization, and who one is in it."""
        [row] = self._ledger.call("whoami")
        return OrganizationInfo(
            id=row["organization_id"],
            name=row["organization_name"],
            role=row["role"],
            user_id=row["user_id"],
            email=row["email"],
            token_id=row["token_id"],
            token_name=row["token_name"],
            secret_storage=row["secret_storage"],
        )

    def members(self) -> list[Member]:
        """Everybody who belongs to it."""
        rows = every_row(self._ledger, "list_members", key="user_id")
        return [
            Member(
                user_id=row["user_id"],
                email=row["email"],
                role=row["role"],
                created_at=parse_time(row["created_at"]),
            )
            for row in rows
        ]

    def invite(
        self,
        email: str | None = None,
        role: str = "user",
        *,
        expires_in: timedelta | float = _WEEK,
    ) -> NewInvitation:
        """Make a code that lets one person in, whoever brings it; it is the result's `code`, shown once.

        `email` is a note for whom it is. Only admins invite; `expires_in` is at most 30 days.
        """
        check_choice("role", role, MEMBER_ROLES)
        code = f"owi_{secrets.token_urlsafe(32)}"
        [answer] = self._ledger.call(
            "create_invitation",
            code_hash=hash_secret(code),
            new_role=role,
            for_email=email,
            valid_seconds=whole_seconds(expires_in, longest=_LONGEST_SECONDS),
        )
        return NewInvitation.from_row(answer["invitation"], code=code)

    def invitations(self) -> list[Invitation]:
        """What admins have sent out, newest first; used ones too."""
        return [Invitation.from_row(row) for row in every_row(self._ledger, "list_invitations", key="id")]

    def join(self, code: str, *, email: str | None = None) -> Organization:
        """Become a member of the organization that the invitation is of; returns that one."""
        [answer] = self._ledger.call("accept_invitation", code_hash=hash_secret(code.strip()), email=email)
        if answer["outcome"] != "accepted":
            raise InvalidRequestError(
                "The invitation code is unknown, used or expired. Ask an admin of the organization for "
                "another one."
            )
        return self._joined(answer["organization"]["id"])

    def set_role(self, member: str, role: str) -> None:
        """Make a member an `admin` or a `user`; the last admin stays one.

        `member` is a user id or an email address.
        """
        check_choice("role", role, MEMBER_ROLES)
        [answer] = self._ledger.call("set_member_role", member=self._user_id(member), new_role=role)
        _check_found(answer, member)

    def remove(self, member: str) -> None:
        """End a membership, and every token that the member made, from the next call on."""
        [answer] = self._ledger.call("remove_member", member=self._user_id(member))
        _check_found(answer, member)

    def rename(self, name: str) -> None:
        """Give it another name."""
        self._ledger.call("rename_organization", new_name=name)

    def create(self, name: str, *, email: str | None = None) -> Organization:
        """Make another organization with the caller as its admin; the client goes on acting for this one.

        `email` is how its members see the caller.
        """
        [answer] = self._ledger.call(
            "create_organization", organization_id=str(uuid4()), name=name, email=email
        )
        return _organization({**answer["organization"], "role": "admin"})

    def audit(self, limit: int = 100, before: int | None = None) -> list[AuditEntry]:
        """What was done to members, tokens, secrets and files, newest first; for admins.

        `before` goes on behind that entry's id.
        """
        rows = self._ledger.call("list_audit", max_rows=check_limit(limit), before_id=before)
        return [
            AuditEntry(
                id=row["id"],
                created_at=parse_time(row["created_at"]),
                actor=row["actor"],
                action=row["action"],
                subject=row["subject"],
                detail=row["detail"],
            )
            for row in rows
        ]

    def list(self) -> list[Organization]:
        """Those that the caller belongs to; for a token, its own."""
        return [_organization(row) for row in every_row(self._ledger, "list_organizations", key="id")]

    def _joined(self, organization_id: str) -> Organization:
        return next(held for held in self.list() if held["id"] == organization_id)

    def _user_id(self, member: str) -> str:
        if "@" not in member:
            return member
        found = [held for held in self.members() if (held["email"] or "").lower() == member.lower()]
        if not found:
            raise _no_member(member)
        return found[0]["user_id"]


def _check_found(answer: Row, member: str) -> None:
    if answer["outcome"] == "not_found":
        raise _no_member(member)


def _no_member(member: str) -> NotFoundError:
    return NotFoundError(
        f"No member {member!r} in this organization; `ow org members` shows those that it has."
    )


def _organization(row: Row) -> Organization:
    return Organization(
        id=row["id"], name=row["name"], created_at=parse_time(row["created_at"]), role=row["role"]
    )
