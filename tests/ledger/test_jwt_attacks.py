"""Forged, stolen and bent JWTs: `verify` accepts what our key signed for us and for now, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from openweights_prefect.errors import AuthenticationError, ConfigurationError
from openweights_prefect.ledger.signing import SigningKey, verify

ISSUER = "https://ledger.example/exchange"
AUDIENCE = "authenticated"
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # Of the group of P-256.
OTHER = ec.generate_private_key(ec.SECP256R1())


def encode(value: bytes | object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def good_claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + 600, "role": "authenticated"}
    return {name: value for name, value in {**claims, **changes}.items() if value is not None}


class Forge:
    """A signing key, also for tokens that `sign` would never make."""

    def __init__(self, path: Path) -> None:
        self.key = SigningKey.create(path)
        self._private = jwt.PyJWK(json.loads(path.read_text())).key

    def raw(self, header: object, payload: object, *, key: ec.EllipticCurvePrivateKey | None = None) -> str:
        """A token of any header and payload, correctly signed with ES256."""
        text = f"{encode(header)}.{encode(payload)}"
        signature = (key or self._private).sign(text.encode(), ec.ECDSA(hashes.SHA256()))
        r, s = decode_dss_signature(signature)
        return f"{text}.{encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def header(self, **changes: Any) -> dict[str, Any]:
        members = {"alg": "ES256", "kid": self.key.kid, "typ": "JWT", **changes}
        return {name: value for name, value in members.items() if value is not None}

    def token(self, **claims: Any) -> str:
        return self.raw(self.header(), good_claims(**claims))


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    return Forge(tmp_path / "key.json")


def accepted(forge: Forge, token: str, jwks: dict[str, Any] | None = None) -> bool:
    try:
        verify(token, jwks or forge.key.jwks(), ISSUER, AUDIENCE)
    except AuthenticationError:
        return False
    return True


def test_what_we_sign_is_accepted(forge: Forge) -> None:
    """The claims come back, with `iat` rounded down and at most 15 minutes to live."""
    before = int(time.time())
    claims = verify(forge.key.sign(good_claims(exp=before + 99999)), forge.key.jwks(), ISSUER, AUDIENCE)
    assert before <= claims["iat"] <= time.time()
    assert claims["exp"] == claims["iat"] + 900
    assert claims["role"] == "authenticated"
    assert accepted(forge, forge.token())


def test_a_shorter_life_is_kept(forge: Forge) -> None:
    """What the ledger grants for less than 15 minutes is signed for less."""
    ends = int(time.time()) + 60
    assert jwt.decode(forge.key.sign({"exp": ends}), options={"verify_signature": False})["exp"] == ends


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "none ", "", "NoNe\u0000"])
@pytest.mark.parametrize("signature", ["", "AAAA", "valid"])
def test_no_algorithm(forge: Forge, name: str, signature: str) -> None:
    head, payload, signed = forge.raw(forge.header(alg=name), good_claims()).split(".")
    assert not accepted(forge, f"{head}.{payload}.{signed if signature == 'valid' else signature}")


@pytest.mark.parametrize("name", ["HS256", "HS384", "HS512"])
def test_public_key_as_a_shared_secret(forge: Forge, name: str) -> None:
    """Everybody has the public key; no form of it works as the secret of an HMAC."""
    (public,) = forge.key.jwks()["keys"]
    shapes = [
        jwt.PyJWK(public).key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        jwt.PyJWK(public).key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(public).encode(),
        decode(public["x"]),
        decode(public["x"]) + decode(public["y"]),
        b"",
    ]
    text = f"{encode(forge.header(alg=name))}.{encode(good_claims())}"
    digest = getattr(hashlib, name.replace("HS", "sha"))
    for secret in shapes:
        assert not accepted(forge, f"{text}.{encode(hmac.digest(secret, text.encode(), digest))}")


@pytest.mark.parametrize(
    "name", ["RS256", "PS256", "ES384", "ES256K", "EdDSA", "es256", "ES256 ", ["ES256"], 1, None]
)
def test_other_algorithms(forge: Forge, name: object) -> None:
    """Even where the signature is a good one of ES256."""
    assert not accepted(forge, forge.raw(forge.header(alg=name), good_claims()))


def test_rsa_key(forge: Forge) -> None:
    """A token signed with somebody's RSA key is refused, even with such a key among the published ones."""
    private = rsa.generate_private_key(65537, 2048)
    token = jwt.encode(good_claims(), private, algorithm="RS256", headers={"kid": forge.key.kid})
    assert not accepted(forge, token)
    public: Any = jwt.algorithms.RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
    es256, published = forge.token(), {"keys": [{**public, "kid": forge.key.kid}]}
    with pytest.raises(ConfigurationError, match="P-256"):
        verify(es256, published, ISSUER, AUDIENCE)


@pytest.mark.parametrize(
    "kid",
    [
        None,
        "",
        "unknown",
        "../../../../dev/null",
        "/proc/self/environ",
        "' or '1'='1",
        "x'; drop table ledger.api_tokens; --",
        "\u0000",
        "${jndi:ldap://127.0.0.1/a}",
        ["list"],
        {"an": "object"},
        7,
        True,
    ],
)
def test_key_names(forge: Forge, kid: object) -> None:
    """A `kid` is compared with the published ones and used for nothing else."""
    assert not accepted(forge, forge.raw(forge.header(kid=kid), good_claims()))


def test_key_name_with_another_case_or_space(forge: Forge) -> None:
    for kid in (
        forge.key.kid.swapcase(),
        f" {forge.key.kid}",
        f"{forge.key.kid}\n",
        f"{forge.key.kid}\u0000",
    ):
        assert not accepted(forge, forge.raw(forge.header(kid=kid), good_claims()))


def test_two_published_keys_of_one_name(forge: Forge, tmp_path: Path) -> None:
    """Which one is meant is nobody's guess: the token is refused, in either order."""
    mine, theirs = forge.key.jwks()["keys"][0], SigningKey.create(tmp_path / "other").jwks()["keys"][0]
    theirs = {**theirs, "kid": forge.key.kid}
    assert not accepted(forge, forge.token(), {"keys": [mine, theirs]})
    assert not accepted(forge, forge.token(), {"keys": [theirs, mine]})


def test_header_member_twice(forge: Forge) -> None:
    """Readers disagree about which of two members counts."""
    for double in ('"kid":"a","kid":"KID"', '"kid":"KID","kid":"KID"', '"alg":"none","kid":"KID"'):
        header = '{"alg":"ES256",' + double.replace("KID", forge.key.kid) + "}"
        assert not accepted(forge, forge.raw(header.encode(), good_claims()))


def test_claim_twice(forge: Forge) -> None:
    payload = json.dumps(good_claims())[:-1] + ', "role": "service_role"}'
    assert not accepted(forge, forge.raw(forge.header(), payload.encode()))


@pytest.mark.parametrize(
    "member", ["jwk", "jku", "x5u", "x5c", "x5t", "crit", "b64", "zip", "cty", "enc", "p2c"]
)
def test_headers_that_bring_a_key_or_change_the_meaning(forge: Forge, member: str) -> None:
    """An attacker's own key signs, and the header says where to find it; nothing is fetched or believed."""
    public: Any = jwt.algorithms.ECAlgorithm.to_jwk(OTHER.public_key(), as_dict=True)
    values: dict[str, Any] = {"jwk": public, "x5c": ["MIIB"], "crit": ["exp"], "b64": False, "p2c": 10**9}
    header = forge.header(**{member: values.get(member, "http://127.0.0.1:9/keys")})
    assert not accepted(forge, forge.raw(header, good_claims(), key=OTHER))
    assert not accepted(forge, forge.raw(header, good_claims()))


def test_key_of_somebody_else(forge: Forge) -> None:
    assert not accepted(forge, forge.raw(forge.header(), good_claims(), key=OTHER))


@pytest.mark.parametrize("empty", [{}, {"keys": []}, {"keys": [{"kty": "EC"}]}])
def test_no_published_key(forge: Forge, empty: dict[str, Any]) -> None:
    with pytest.raises(AuthenticationError):
        verify(forge.token(), empty, ISSUER, AUDIENCE)


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": None},
        {"iss": "https://evil.example"},
        {"iss": ISSUER + "/"},
        {"iss": ISSUER.upper()},
        {"iss": [ISSUER]},
        {"aud": None},
        {"aud": "anon"},
        {"aud": ""},
        {"aud": [AUDIENCE]},
        {"aud": ["anon", AUDIENCE]},
        {"aud": "authenticated\u0000"},
        {"aud": "authenticated "},
        {"aud": "\uff41uthenticated"},  # A full-width letter, the same one after NFKC.
        {"aud": "auth\u200benticated"},
        {"aud": True},
    ],
)
def test_other_issuer_or_audience(forge: Forge, claims: dict[str, Any]) -> None:
    assert not accepted(forge, forge.token(**claims))


@pytest.mark.parametrize(
    ("begins", "ends", "not_before"),
    [
        (-900, -60, None),  # expired
        (-900, 0, None),  # expired at this moment
        (0, None, None),  # never ends
        (None, 600, None),  # began at no time
        (300, 600, None),  # made in the future
        (0, 600, 300),  # not yet valid
        (0, 901, None),  # lives too long
        (-86_400, 600, None),
        (0, 10**12, None),
        (5, 5, None),
        (9, 3, None),  # ends before it begins
    ],
)
def test_times(forge: Forge, begins: int | None, ends: int | None, not_before: int | None) -> None:
    now = int(time.time())
    times = {"iat": begins, "exp": ends, "nbf": not_before}
    shifted = {name: None if value is None else now + value for name, value in times.items()}
    assert not accepted(forge, forge.token(**shifted))


@pytest.mark.parametrize("name", ["iat", "exp", "nbf"])
@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "1e999", "true", '"9999999999"', "[1]", "{}", "9" * 400, "1.5", "null"],
)
def test_times_that_are_no_whole_numbers(forge: Forge, name: str, value: str) -> None:
    """A comparison with NaN is false, whichever way round."""
    payload = json.dumps(good_claims(**{name: "PLACE"})).replace('"PLACE"', value)
    assert not accepted(forge, forge.raw(forge.header(), payload.encode()))


def test_clock_ahead_by_seconds(forge: Forge) -> None:
    """The clocks of two machines differ by a little; that is no attack."""
    now = int(time.time())
    assert accepted(forge, forge.token(iat=now + 5, exp=now + 600))


def test_tampered_claims(forge: Forge) -> None:
    """Any other payload, header or signature under the same rest is refused: each byte is flipped once."""
    parts = forge.token().split(".")
    for number, part in enumerate(parts):
        raw = decode(part)
        for position in range(len(raw)):
            changed = bytearray(raw)
            changed[position] ^= 1
            assert not accepted(
                forge, ".".join([*parts[:number], encode(bytes(changed)), *parts[number + 1 :]])
            )
    raised = encode({**json.loads(decode(parts[1])), "role": "service_role"})
    assert not accepted(forge, f"{parts[0]}.{raised}.{parts[2]}")


def test_the_other_valid_signature(forge: Forge) -> None:
    """ECDSA has two signatures, (r, s) and (r, n - s); both hold for the same claims, so no right is gained.

    Nothing may therefore be keyed by the text of a token, say a list of revoked ones.
    """
    head, payload, signature = forge.token().split(".")
    r, s = decode(signature)[:32], int.from_bytes(decode(signature)[32:], "big")
    twin = f"{head}.{payload}.{encode(r + (ORDER - s).to_bytes(32, 'big'))}"
    assert accepted(forge, twin)
    assert verify(twin, forge.key.jwks(), ISSUER, AUDIENCE)["role"] == "authenticated"


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        bytes(64),  # r = s = 0, which a famous verifier took for good
        b"\xff" * 64,
        bytes(32) + (1).to_bytes(32, "big"),
        ORDER.to_bytes(32, "big") * 2,
        bytes(128),
        bytes(63),
        bytes(65),
    ],
)
def test_degenerate_signatures(forge: Forge, signature: bytes) -> None:
    head, payload, _ = forge.token().split(".")
    assert not accepted(forge, f"{head}.{payload}.{encode(signature)}")


def test_signature_as_der(forge: Forge) -> None:
    """The form that certificates use is no signature of a JWT, also with the right numbers."""
    head, payload, signature = forge.token().split(".")
    raw = decode(signature)
    der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    assert not accepted(forge, f"{head}.{payload}.{encode(der)}")


def test_truncated(forge: Forge) -> None:
    """No beginning and no end of a token is a token."""
    token = forge.token()
    assert not any(accepted(forge, token[:length]) for length in range(len(token)))
    assert not any(accepted(forge, token[start:]) for start in range(1, len(token)))


@pytest.mark.parametrize(
    "bend",
    [
        lambda token: token + ".",
        lambda token: "." + token,
        lambda token: token + ".AAAA",
        lambda token: token + "=",
        lambda token: token + "\n",
        lambda token: " " + token,
        lambda token: token.replace(".", "..", 1),
        lambda token: token.replace(".", ".=", 1),
        lambda token: token.replace(".", "\uff0e"),
        lambda token: token.replace(".", "%2e"),
        lambda token: token + "\u0000",
        lambda token: token + "\u200b",
        lambda token: "Bearer " + token,
        lambda token: token.replace("e", "\u0435"),  # The Cyrillic letter that looks the same.
        lambda token: "\ud800" + token,
        lambda token: ".." + token,
        lambda token: "",
        lambda token: "." * 100_000,
        lambda token: "A" * 10_000_000,
        lambda token: token + "A" * 10_000,
        lambda token: json.dumps(
            dict(zip(("protected", "payload", "signature"), token.split("."), strict=True))
        ),
    ],
)
def test_bent_text(forge: Forge, bend: Callable[[str], str]) -> None:
    """Other spellings of a good token, and much text: refused, and at once."""
    began = time.monotonic()
    assert not accepted(forge, bend(forge.token()))
    assert time.monotonic() - began < 1


def test_unused_bits_of_base64(forge: Forge) -> None:
    """The last letter of a signature has bits that mean nothing; only zeros are accepted there."""
    token = forge.token()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = [token[:-1] + letter for letter in alphabet if letter != token[-1]]
    assert [other for other in others if accepted(forge, other)] == []


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"7",
        b"{",
        b"\xff\xfe",
        b"[" * 3000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
    ],
)
def test_payloads_that_are_no_claims(forge: Forge, payload: bytes) -> None:
    """Also when our key signed them, and also as a header."""
    assert not accepted(forge, forge.raw(forge.header(), payload))
    assert not accepted(forge, forge.raw(payload, good_claims()))


def test_token_in_a_token(forge: Forge) -> None:
    """Claims count at the top only, and a token is no payload."""
    assert not accepted(forge, forge.raw(forge.header(), forge.token().encode()))
    assert not accepted(forge, forge.raw(forge.header(), {"claims": good_claims()}))
    assert not accepted(forge, forge.raw(forge.header(cty="JWT"), forge.token().encode()))


def test_the_error_shows_nothing_of_the_token(forge: Forge) -> None:
    """It may be somebody's, and errors are logged."""
    for token in (forge.token(aud="canary-7f3a"), forge.token() + "canary-7f3a"):
        with pytest.raises(AuthenticationError) as caught:
            verify(token, forge.key.jwks(), ISSUER, AUDIENCE)
        assert not any(part in str(caught.value) for part in ("canary", *token.split(".")))


def test_header_type(forge: Forge) -> None:
    """A JWT of another kind, say an ID token or a proof of possession, is not taken for an access token."""
    for kind in ("JWE", "dpop+jwt", "logout+jwt", 7, ["JWT"]):
        assert not accepted(forge, forge.raw(forge.header(typ=kind), good_claims()))
    assert accepted(forge, forge.raw(forge.header(typ=None), good_claims()))


def test_key_file_is_private(tmp_path: Path) -> None:
    """The file is ours alone, is never replaced, and names its key as RFC 7638 does."""
    path = tmp_path / "keys" / "key.json"
    made = SigningKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (public,) = made.jwks()["keys"]
    members = json.dumps({name: public[name] for name in ("crv", "kty", "x", "y")}, separators=(",", ":"))
    assert made.kid == encode(hashlib.sha256(members.encode()).digest())
    assert SigningKey.load(path).jwks() == made.jwks()
    assert "d" not in public
    with pytest.raises(ConfigurationError, match="cannot be created"):
        SigningKey.create(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="other accounts"):
        SigningKey.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "{}", '{"kty": "oct", "k": "AAAA"}', "PUBLIC", "SECRET"]
)
def test_damaged_key_file(tmp_path: Path, text: str) -> None:
    """The error names the file and shows nothing of the key."""
    path = tmp_path / "key.json"
    key = SigningKey.create(path)
    secret = json.loads(path.read_text())
    shapes = {"PUBLIC": key.jwks()["keys"][0], "SECRET": {**secret, "x": secret["y"]}}
    path.write_text(json.dumps(shapes[text]) if text in shapes else text)
    with pytest.raises(ConfigurationError, match=r"key\.json") as caught:
        SigningKey.load(path)
    assert secret["d"] not in repr((caught.value, caught.value.__cause__, caught.value.__context__))
    assert secret["d"] not in repr(key)
