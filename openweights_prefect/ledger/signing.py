"""ES256 keys, and the short-lived JWTs that they sign: the only kind of JWT that this package trusts."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights_prefect.errors import AuthenticationError, ConfigurationError

if TYPE_CHECKING:
    from jwt import PyJWK

Claims = dict[str, Any]

LONGEST_LIFETIME_SECONDS = 900

_ALGORITHM = "ES256"
_LONGEST_TOKEN = 8192  # What web servers accept as one header.
_CLOCK_SKEW_SECONDS = 10  # The issuer's clock may be ahead by so much; an expired token is expired.
_PUBLIC_MEMBERS = ("kty", "crv", "x", "y")  # In RFC 7638's sense: what the thumbprint is made of.


class SigningKey:
    """A private P-256 key that signs; the file that holds it is a JWK, as the Supabase CLI makes them."""

    def __init__(self, jwk: Mapping[str, Any]) -> None:
        if not isinstance(jwk.get("d"), str):
            raise ConfigurationError("A signing key has no private half.")
        self._key = _parse_jwk(jwk)
        self._public = {name: jwk[name] for name in _PUBLIC_MEMBERS}
        self.kid: str = jwk.get("kid") or _thumbprint(self._public)

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r})"

    @classmethod
    def create(cls, path: Path) -> SigningKey:
        """Make a new key and write it to `path`, readable by us only; refuses to replace a file."""
        from cryptography.hazmat.primitives.asymmetric import ec  # Slow, and only issuers need it.
        from jwt.algorithms import ECAlgorithm

        jwk = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()), as_dict=True)
        jwk |= {"kid": _thumbprint(jwk), "alg": _ALGORITHM, "use": "sig"}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as exc:
            raise ConfigurationError(
                f"The signing key {str(path)!r} cannot be created ({exc.strerror}). Name another file, or "
                "move the old key away: tokens that it signed end within 15 minutes."
            ) from exc
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(jwk, stream)
            stream.flush()
            os.fsync(stream.fileno())
        return cls(jwk)

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read the key of a file that nobody but us may read; raises `ConfigurationError`."""
        try:
            with path.open(encoding="utf-8") as stream:
                mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
                text = stream.read()
        except OSError as exc:
            raise ConfigurationError(
                f"The signing key {str(path)!r} cannot be read ({exc.strerror}). Name the file that "
                "`SigningKey.create` or `supabase gen signing-key` made."
            ) from exc
        if mode & 0o077:
            raise ConfigurationError(
                f"The signing key {str(path)!r} can be read by other accounts (mode {mode:o}). Make a new "
                f"one, or, if nobody has seen it, run `chmod 600 {path}`."
            )
        try:
            return cls(json.loads(text))
        except (ValueError, TypeError, AttributeError, ConfigurationError):
            reason = f"The file {str(path)!r} is not a private ES256 key in JWK form. Make a new one."
        raise ConfigurationError(reason)  # Outside the handler: a cause may quote the private key.

    def jwks(self) -> dict[str, list[dict[str, str]]]:
        """The key set to publish: the public half of this key."""
        return {"keys": [{**self._public, "kid": self.kid, "alg": _ALGORITHM, "use": "sig"}]}

    def sign(self, claims: Mapping[str, Any]) -> str:
        """A JWT of these claims from now on; it ends at `exp`, and never later than in 15 minutes."""
        import jwt

        now = int(time.time())  # Rounded down: a time in the future would not be valid yet.
        latest = now + LONGEST_LIFETIME_SECONDS
        payload = {**claims, "iat": now, "exp": min(int(claims.get("exp", latest)), latest)}
        return jwt.encode(payload, self._key.key, algorithm=_ALGORITHM, headers={"kid": self.kid})


def verify(token: str, jwks: Mapping[str, Any], issuer: str, audience: str) -> Claims:
    """The claims of a JWT that one of these keys signed, and that is valid now.

    Stricter than the standard: only ES256, only the header members `alg`, `kid` and `typ`, one audience, and
    at most 15 minutes between `iat` and `exp`. Raises `AuthenticationError`, whose message holds nothing of
    the token.
    """
    header = _header(token)
    matches = [jwk for jwk in jwks.get("keys", ()) if jwk.get("kid") == header["kid"]]
    if len(matches) != 1:
        raise _refused("no key, or more than one, has its `kid`")
    claims = _signed_payload(token, _parse_jwk(matches[0]))
    _check_claims(claims, issuer, audience)
    return claims


def _header(token: str) -> Claims:
    if len(token) > _LONGEST_TOKEN:
        raise _refused("it is too long")
    parts = token.split(".")
    if len(parts) != 3:
        raise _refused("it has not three parts")
    header = _decode(parts[0])
    # `jwk`, `jku`, `x5u` and `x5c` would let a token bring its own key, and `crit` change what it means.
    if not header.keys() <= {"alg", "kid", "typ"} or header.get("typ", "JWT") != "JWT":
        raise _refused("its header has members that we do not accept")
    if header.get("alg") != _ALGORITHM:
        raise _refused("its algorithm is not ES256")
    if not isinstance(header.get("kid"), str):
        raise _refused("it names no key")
    return header


def _signed_payload(token: str, key: PyJWK) -> Claims:
    from jwt import PyJWS
    from jwt.exceptions import PyJWTError

    try:
        # Only the signature: the library's checks of header and claims accept more than ours.
        PyJWS().decode(token, key, algorithms=[_ALGORITHM])
    except (PyJWTError, ValueError) as exc:
        raise _refused("its signature does not fit") from exc
    return _decode(token.split(".")[1])


def _check_claims(claims: Claims, issuer: str, audience: str) -> None:
    now = time.time()
    begins, ends, earliest = claims.get("iat"), claims.get("exp"), claims.get("nbf", 0)
    if not (type(begins) is int and type(ends) is int and type(earliest) is int):
        raise _refused("`iat`, `exp` or `nbf` is missing or no whole number")
    if claims.get("iss") != issuer:
        raise _refused("another issuer made it")
    if claims.get("aud") != audience:
        raise _refused("it is for another audience")
    if ends <= now:
        raise _refused("it has expired")
    if max(begins, earliest) > now + _CLOCK_SKEW_SECONDS:
        raise _refused("it is not valid yet")
    if not 0 < ends - begins <= LONGEST_LIFETIME_SECONDS:
        raise _refused("it lives longer than 15 minutes")


def _decode(part: str) -> Claims:
    """A JSON object in base64url, strictly: no padding, no other alphabet, no member twice."""
    try:
        raw = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object_without_doubles, parse_constant=_no_constant
        )
    except (ValueError, binascii.Error, RecursionError) as exc:
        raise _refused("a part of it is not JSON in base64url") from exc
    if not isinstance(value, dict) or base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != part:
        raise _refused("a part of it is not a JSON object in base64url")
    return value


def _object_without_doubles(pairs: Sequence[tuple[str, Any]]) -> Claims:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member occurs twice")
    return members


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refused(reason: str) -> AuthenticationError:
    return AuthenticationError(f"The access token was refused: {reason}. Sign in again.")


def _parse_jwk(jwk: Mapping[str, Any]) -> PyJWK:
    """The key of a JWK, if it is one for ES256."""
    from jwt import PyJWK
    from jwt.exceptions import PyJWTError

    if jwk.get("kty") != "EC" or jwk.get("crv") != "P-256" or jwk.get("alg", _ALGORITHM) != _ALGORITHM:
        raise ConfigurationError("A signing key is not an elliptic curve key (P-256) for ES256.")
    try:
        return PyJWK({**jwk, "alg": _ALGORITHM})
    except (PyJWTError, ValueError):
        reason = "A signing key is damaged: it is no point of the curve P-256."
    raise ConfigurationError(reason)  # Outside the handler: a cause may quote the private key.


def _thumbprint(jwk: Mapping[str, Any]) -> str:
    """The `kid` of RFC 7638: a hash of the public half, the same wherever it is computed."""
    members = json.dumps({name: jwk[name] for name in sorted(_PUBLIC_MEMBERS)}, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(members.encode()).digest()).rstrip(b"=").decode()
