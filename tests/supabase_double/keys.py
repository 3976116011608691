"""Who a request comes from: the project's keys at the gateway, and signed tokens of the issuers it trusts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import jwt
from jwt.types import Options

PUBLISHABLE_KEY = "sb_publishable_double"
SECRET_KEY = "sb_secret_double"
_ROLES_OF_KEYS = {PUBLISHABLE_KEY: "anon", SECRET_KEY: "service_role"}
_AUDIENCE = "authenticated"


class RefusedToken(Exception):
    """A token that is not believed: PostgREST's code, and the reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class TrustedIssuers:
    """The public keys of GoTrue and of the token exchange, by issuer."""

    key_sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def caller(self, authorization: str, apikey: str, *, leeway_seconds: float) -> dict[str, Any]:
        """The claims of a request; a project key in place of a token stands for its role."""
        token = authorization.removeprefix("Bearer ").strip()
        if token in ("", apikey):
            return {"role": _ROLES_OF_KEYS[apikey]}
        claims = self._signed(token)
        _check_claims(claims, leeway_seconds)
        return claims

    def _signed(self, token: str) -> dict[str, Any]:
        parts = token.count(".") + 1
        if parts != 3:
            raise RefusedToken("PGRST301", f"Expected 3 parts in JWT; got {parts}")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as exc:
            raise RefusedToken("PGRST301", "JWT cryptographic operation failed") from exc
        for issuer, keys in self.key_sets.items():
            for key in keys["keys"]:
                if header.get("alg") == "ES256" and key["kid"] == header.get("kid"):
                    return _decode(token, key, issuer)
        raise RefusedToken("PGRST301", "No suitable key was found to decode the JWT")


def is_project_key(apikey: str) -> bool:
    """Whether the gateway lets the request in."""
    return apikey in _ROLES_OF_KEYS


def _decode(token: str, key: dict[str, Any], issuer: str) -> dict[str, Any]:
    unchecked: Options = {  # Our own checks say which claim it was.
        "verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False,
        "verify_sub": False, "verify_jti": False,
    }  # fmt: skip
    try:
        return jwt.decode(token, jwt.PyJWK(key).key, algorithms=["ES256"], issuer=issuer, options=unchecked)
    except jwt.InvalidTokenError as exc:
        raise RefusedToken("PGRST301", "JWT cryptographic operation failed") from exc


def _check_claims(claims: dict[str, Any], leeway_seconds: float) -> None:
    now = time.time()
    audience = claims.get("aud")
    if claims.get("exp", 0) + leeway_seconds <= now:
        raise RefusedToken("PGRST303", "JWT expired")
    if max(claims.get("iat", 0), claims.get("nbf", 0)) - leeway_seconds > now:
        raise RefusedToken("PGRST303", "JWT not yet valid")
    if _AUDIENCE not in (audience if isinstance(audience, list) else [audience]):
        raise RefusedToken("PGRST303", "JWT not in audience")
