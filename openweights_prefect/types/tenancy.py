"""Tokens and invitations as the ledger holds them, and as they are once shown to whoever made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Self, get_args

from openweights_prefect.types.job import known_columns

TokenRole = Literal[
    "user",  # works with jobs and files
    "admin",  # also manages members, tokens, secrets and budgets
    "worker",  # the control plane: flow runs, pods
]
TOKEN_ROLES: tuple[TokenRole, ...] = get_args(TokenRole)

MemberRole = Literal["user", "admin"]
MEMBER_ROLES: tuple[MemberRole, ...] = get_args(MemberRole)


@dataclass(frozen=True, kw_only=True)
class Token:
    """An API token, without its secret; times are aware UTC."""

    id: str
    name: str
    role: TokenRole
    prefix: str
    """How the token begins, to tell it from others."""
    state: Literal["active", "expired", "revoked"]
    created_by: str
    """The user who made it; it ends with that user's membership."""
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    spend_limit_usd: float | None
    spent_usd: float

    @classmethod
    def from_row(cls, row: Mapping[str, Any], **secret: str) -> Self:
        """Read a row of the ledger; columns that this version does not know are ignored."""
        return cls(**known_columns(cls, {**row, **secret}))


@dataclass(frozen=True, kw_only=True)
class NewToken(Token):
    """A token just made: `token` is its only copy."""

    token: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """A way into the organization that works once; times are aware UTC."""

    id: str
    role: MemberRole
    email: str | None
    """For whom it is meant; a note."""
    created_at: datetime
    expires_at: datetime
    accepted_at: datetime | None

    @classmethod
    def from_row(cls, row: Mapping[str, Any], **secret: str) -> Self:
        """Read a row of the ledger; columns that this version does not know are ignored."""
        return cls(**known_columns(cls, {**row, **secret}))


@dataclass(frozen=True, kw_only=True)
class NewInvitation(Invitation):
    """An invitation just made: `code` is its only copy."""

    code: str = field(repr=False)
