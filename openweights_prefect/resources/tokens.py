"""`ow.tokens`: API tokens of the organization."""

from __future__ import annotations

import math
import secrets
from datetime import timedelta

from openweights_prefect.errors import InvalidParameterError, NotFoundError
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.resources.session import check_choice, every_row
from openweights_prefect.types.tenancy import TOKEN_ROLES, NewToken, Token

_PREFIX_LENGTH = 12
_LONGEST_SECONDS = 100 * 365 * 86400


class Tokens:
    """Make, list and revoke tokens; what a token may do, its maker may do."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def create(
        self,
        name: str,
        role: str = "user",
        *,
        expires_in: timedelta | float | None = None,
        spend_limit_usd: float | None = None,
    ) -> NewToken:
        """Make a token; its secret is the result's `token`, which nobody can read again.

        `expires_in` (a `timedelta`, or seconds) is never longer than what is left of the token that makes it.
        Only admins make tokens of the roles `admin` and `worker`.
        """
        return create_token(self._ledger, name, role, expires_in=expires_in, spend_limit_usd=spend_limit_usd)

    def list(self) -> list[Token]:
        """One's own tokens, for an admin all of the organization, newest first; ended ones too."""
        rows = every_row(self._ledger, "list_tokens", key="id")
        return [Token.from_row(row) for row in rows]

    def revoke(self, token: str) -> Token:
        """End a token and all that it made, from the next call on; repeatable.

        `token` is its id, or its beginning as `list` shows it. Raises `NotFoundError`.
        """
        return revoke_token(self._ledger, self._find(token))

    def set_limit(self, token: str, usd: float | None) -> Token:
        """Set what the token's jobs may cost in USD, None for no limit; only admins may."""
        found = self._find(token)
        [answer] = self._ledger.call(
            "set_token_limit", token_id=found.id, spend_limit_usd=checked_usd("usd", usd)
        )
        if answer["outcome"] == "not_found":
            raise _no_token(token)
        return self._find(found.id)

    def _find(self, token: str) -> Token:
        for held in self.list():
            if held.id == token or token.startswith(held.prefix):
                return held
        raise _no_token(token)


def create_token(
    ledger: Ledger,
    name: str,
    role: str,
    *,
    expires_in: timedelta | float | None = None,
    spend_limit_usd: float | None = None,
) -> NewToken:
    """Make a token as whoever calls the ledger; only its hash leaves this machine."""
    check_choice("role", role, TOKEN_ROLES)
    if not 1 <= len(name) <= 100:
        raise InvalidParameterError(f"name={name!r} has {len(name)} characters; 1 to 100 are allowed.")
    token = f"ow_{secrets.token_urlsafe(32)}"
    [answer] = ledger.call(
        "create_token",
        token_name=name,
        token_role=role,
        hash=hash_secret(token),
        prefix=token[:_PREFIX_LENGTH],
        valid_seconds=None if expires_in is None else whole_seconds(expires_in, longest=_LONGEST_SECONDS),
        spend_limit_usd=checked_usd("spend_limit_usd", spend_limit_usd),
    )
    return NewToken.from_row(answer["token"], token=token)


def revoke_token(ledger: Ledger, token: Token) -> Token:
    """End a token."""
    [answer] = ledger.call("revoke_token", token_id=token.id)
    if answer["outcome"] == "not_found":
        raise _no_token(token.id)
    return token


def whole_seconds(expires_in: timedelta | float, *, longest: int) -> int:
    """A duration as the ledger takes it; raises `InvalidParameterError` for one that cannot be."""
    seconds = expires_in.total_seconds() if isinstance(expires_in, timedelta) else expires_in
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 1 <= seconds <= longest:
        raise InvalidParameterError(
            f"expires_in={expires_in!r} is not a `timedelta`, or a number of seconds, of 1 s to "
            f"{longest // 86400} days."
        )
    return int(seconds)


def checked_usd(name: str, usd: float | None) -> float | None:
    """An amount, or None; raises `InvalidParameterError` with the parameter's name."""
    if usd is None:
        return None
    if isinstance(usd, bool) or not isinstance(usd, int | float) or not math.isfinite(usd) or usd < 0:
        raise InvalidParameterError(f"{name}={usd!r} is not an amount of USD: a number from 0, or None.")
    return usd


def _no_token(token: str) -> NotFoundError:
    """What was asked for may be the token itself: of that, only the beginning is repeated."""
    shown = token[:_PREFIX_LENGTH] if token.startswith("ow_") else token
    return NotFoundError(
        f"No token {shown!r} in this organization, or it is another member's; `ow token ls` shows those that "
        "exist."
    )
