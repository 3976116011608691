"""Envelope encryption of secrets, for installations without Supabase Vault.

`sealed:v1:KEY:WRAPPED:VALUE`. The value is encrypted with a data key of its own, the data key with the master
key that `KEY` names; both by AES-256-GCM, as base64url of nonce, ciphertext and tag. Both are bound to the
organization and the name of the secret, so that a sealed value is worth nothing in another row.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openweights_prefect.errors import OpenWeightsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PREFIX = "sealed:v1:"
KEY_BYTES = 32

_NONCE_BYTES = 12
_TAG_BYTES = 16


class UnreadableSecret(OpenWeightsError):
    """A sealed value was changed, cut short or moved, or its master key is not in the key file."""


@dataclass(frozen=True)
class Owner:
    """What a sealed value belongs to."""

    organization_id: str
    name: str

    def bind(self, part: str) -> bytes:
        """The additional data that one of the two ciphertexts is authenticated with; JSON is unambiguous."""
        return json.dumps([PREFIX, part, self.organization_id, self.name]).encode()


def seal(value: str, *, owner: Owner, key_id: str, master: bytes) -> str:
    """Encrypt a value under a new data key."""
    data_key = os.urandom(KEY_BYTES)
    text = _encrypt(data_key, value.encode(), owner.bind("value"))
    return _join(key_id, _encrypt(master, data_key, owner.bind(f"key {key_id}")), text)


def unseal(sealed: str, *, owner: Owner, master: bytes) -> str:
    """The value; raises `UnreadableSecret` when anything of it is not as `seal` left it."""
    key_id, wrapped, text = _split(sealed, owner)
    data_key = _decrypt(master, wrapped, owner.bind(f"key {key_id}"), owner)
    return _decrypt(data_key, text, owner.bind("value"), owner).decode()


def rewrap(sealed: str, *, owner: Owner, master: bytes, new_key_id: str, new_master: bytes) -> str:
    """The same value under another master key. Raises `UnreadableSecret` if it could not be opened."""
    key_id, wrapped, text = _split(sealed, owner)
    data_key = _decrypt(master, wrapped, owner.bind(f"key {key_id}"), owner)
    _decrypt(data_key, text, owner.bind("value"), owner)  # damage must not outlive the key that can show it
    return _join(new_key_id, _encrypt(new_master, data_key, owner.bind(f"key {new_key_id}")), text)


def key_id_of(sealed: str, owner: Owner) -> str:
    """The id of the master key that a sealed value needs."""
    return _split(sealed, owner)[0]


def unreadable(owner: Owner) -> UnreadableSecret:
    """One error for every way in which a value can be bad: which way it was helps only an attacker."""
    return UnreadableSecret(
        f"The secret {owner.name!r} cannot be opened: its stored value was changed, cut short, or sealed for "
        f"another name, organization or key. Store it again: `ow env set {owner.name}`."
    )


def _join(key_id: str, wrapped: bytes, text: bytes) -> str:
    return f"{PREFIX}{key_id}:{_to_text(wrapped)}:{_to_text(text)}"


def _split(sealed: str, owner: Owner) -> tuple[str, bytes, bytes]:
    parts = sealed.removeprefix(PREFIX).split(":") if sealed.startswith(PREFIX) else []
    if len(parts) != 3:
        raise unreadable(owner)
    try:
        return parts[0], _to_bytes(parts[1]), _to_bytes(parts[2])
    except (ValueError, binascii.Error):
        raise unreadable(owner) from None


def _to_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")


def _to_bytes(text: str) -> bytes:
    padded = (text + "=" * (-len(text) % 4)).encode("ascii")
    data = base64.b64decode(padded, altchars=b"-_", validate=True)
    if _to_text(data) != text:  # several spellings of one value would defeat compare-and-set
        raise ValueError("not canonical")
    return data


def _encrypt(key: bytes, plain: bytes, bound_to: bytes) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + _cipher(key).encrypt(nonce, plain, bound_to)


def _decrypt(key: bytes, data: bytes, bound_to: bytes, owner: Owner) -> bytes:
    from cryptography.exceptions import InvalidTag

    if len(data) < _NONCE_BYTES + _TAG_BYTES:
        raise unreadable(owner)
    try:
        return _cipher(key).decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], bound_to)
    except InvalidTag:
        raise unreadable(owner) from None


def _cipher(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # not for those who use no secrets

    return AESGCM(key)
