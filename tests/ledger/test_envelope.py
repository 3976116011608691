from __future__ import annotations

import json
import os
import stat
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.ledger.envelope import UnreadableSecret
from openweights_prefect.ledger.keyring import Keyring

ORG = "00000000-0000-0000-0000-000000000001"
OTHER = "00000000-0000-0000-0000-000000000002"
VALUE = "hf_canary \u2713 of many\nlines, longer than a row of numbers"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "secrets.key"


@pytest.fixture
def keyring(path: Path) -> Keyring:
    return Keyring(path)


def keys_in(path: Path, organization_id: str = ORG) -> list[str]:
    return [*json.loads(path.read_text())["organizations"][organization_id]["keys"].values()]


def assert_unreadable(keyring: Keyring, path: Path, org: str, name: str, sealed: str) -> None:
    """The one error, without the value, the key or the sealed text in it or in what it came from."""
    with pytest.raises(UnreadableSecret) as caught:
        keyring.open(org, name, sealed)
    shown = "".join(traceback.format_exception(caught.value))
    assert f"`ow env set {name}`" in str(caught.value)
    assert not [text for text in (*keys_in(path), VALUE, sealed) if len(text) > 30 and text in shown]


def test_what_is_sealed_opens_again(keyring: Keyring, path: Path) -> None:
    """Each time another text, which does not show the value; the file is only its owner's."""
    first, second = (keyring.seal(ORG, "TOKEN", VALUE) for _ in range(2))
    assert first.startswith("sealed:v1:")
    assert first != second
    assert "canary" not in first
    assert [keyring.open(ORG, "TOKEN", sealed) for sealed in (first, second)] == [VALUE, VALUE]
    assert Keyring(path).open(ORG, "TOKEN", first) == VALUE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*path.parent.glob("*.new")] == []


def test_a_value_opens_only_where_it_was_sealed_for(keyring: Keyring, path: Path) -> None:
    """Another name, another organization, another installation: nothing."""
    sealed = keyring.seal(ORG, "TOKEN", VALUE)
    keyring.seal(OTHER, "TOKEN", VALUE)
    assert_unreadable(keyring, path, ORG, "OTHER_TOKEN", sealed)
    assert_unreadable(keyring, path, OTHER, "TOKEN", sealed)
    foreign = Keyring(path.with_name("foreign.key"))
    assert_unreadable(keyring, path, ORG, "TOKEN", foreign.seal(ORG, "TOKEN", VALUE))


def test_the_spelling_of_an_organization_does_not_matter(keyring: Keyring) -> None:
    """A setting may have it in capitals; the ledger never does."""
    organization = "0a000000-0000-0000-0000-00000000000f"
    sealed = keyring.seal(organization.upper(), "TOKEN", VALUE)
    keyring.rotate(organization)
    assert keyring.open(organization, "TOKEN", sealed) == VALUE


def test_every_change_is_noticed(keyring: Keyring, path: Path) -> None:
    """Each character, each truncation, exchanged parts, and text that is no sealed value at all."""
    sealed, other = keyring.seal(ORG, "TOKEN", VALUE), keyring.seal(ORG, "TOKEN", "other")
    broken = [
        sealed[:at] + ("A" if sealed[at] != "A" else "B") + sealed[at + 1 :] for at in range(len(sealed))
    ]
    broken += [sealed[:length] for length in range(len(sealed))]
    broken += [
        sealed + "A",
        sealed + "=",
        sealed + ":",
        f"{sealed}\n",
        "",
        "sealed:v1:",
        "sealed:v1:a:b:c",
        VALUE,
    ]
    mine, theirs = sealed.split(":"), other.split(":")
    broken += [":".join([*mine[:3], theirs[3], mine[4]]), ":".join([*mine[:4], theirs[4]])]
    for each in broken:
        assert_unreadable(keyring, path, ORG, "TOKEN", each)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610, 0o644])
def test_a_key_file_that_others_can_open_is_refused(keyring: Keyring, path: Path, mode: int) -> None:
    """For sealing, too; the message has the mend, which works."""
    sealed = keyring.seal(ORG, "TOKEN", VALUE)
    path.chmod(mode)
    uses: list[Callable[[], str]] = [
        lambda: keyring.open(ORG, "TOKEN", sealed),
        lambda: keyring.seal(ORG, "TOKEN", VALUE),
    ]
    for use in uses:
        with pytest.raises(ConfigurationError, match=f"mode {mode:04o}.*chmod 600 {path}"):
            use()
    path.chmod(0o600)
    assert keyring.open(ORG, "TOKEN", sealed) == VALUE


def test_a_missing_key_file_is_named(keyring: Keyring, path: Path) -> None:
    """Opening never makes one."""
    sealed = keyring.seal(ORG, "TOKEN", VALUE)
    path.unlink()
    with pytest.raises(ConfigurationError, match=f"{str(path)!r} is missing"):
        keyring.open(ORG, "TOKEN", sealed)
    assert not path.exists()
    keyring.seal(ORG, "OTHER", VALUE)
    assert_unreadable(keyring, path, ORG, "TOKEN", sealed)


def test_a_damaged_key_file_is_not_quoted(keyring: Keyring, path: Path) -> None:
    """It is kept as it is, and no part of it is in the error."""
    keyring.seal(ORG, "TOKEN", VALUE)
    [key] = keys_in(path)
    content = path.read_text()
    for damaged in (
        content[:-20],
        content.replace(key, key[4:]),
        content.replace("current", "currant"),
        "[]",
        "",
    ):
        path.write_text(damaged)
        with pytest.raises(ConfigurationError, match="is damaged") as caught:
            keyring.seal(ORG, "TOKEN", VALUE)
        assert key[4:20] not in "".join(traceback.format_exception(caught.value))
        assert path.read_text() == damaged


def test_two_that_begin_at_once_make_one_key(path: Path) -> None:
    """Whoever is first makes the file; nobody's value is lost."""
    with ThreadPoolExecutor(8) as pool:
        sealed = list(pool.map(lambda number: Keyring(path).seal(ORG, "TOKEN", str(number)), range(8)))
    assert [Keyring(path).open(ORG, "TOKEN", text) for text in sealed] == [str(number) for number in range(8)]
    assert len(keys_in(path)) == 1


def test_rotation_keeps_old_values_readable_until_they_are_rewrapped(keyring: Keyring, path: Path) -> None:
    """Then the old key goes, and with it what was not rewrapped. Other organizations keep theirs."""
    old, foreign = keyring.seal(ORG, "TOKEN", VALUE), keyring.seal(OTHER, "TOKEN", VALUE)
    keyring.rotate(ORG)
    assert keyring.open(ORG, "TOKEN", old) == VALUE
    new = keyring.rewrap(ORG, "TOKEN", old)
    assert new != old
    assert new.split(":")[4] == old.split(":")[4]  # only the data key is wrapped anew
    assert keyring.rewrap(ORG, "TOKEN", new) == new
    keyring.forget_old_keys(ORG)
    assert keyring.open(ORG, "TOKEN", new) == VALUE
    assert_unreadable(keyring, path, ORG, "TOKEN", old)
    assert keyring.open(OTHER, "TOKEN", foreign) == VALUE
    assert len(keys_in(path)) == 1


def test_what_cannot_be_opened_is_not_rewrapped(keyring: Keyring, path: Path) -> None:
    """Damage would outlive the key that can show it."""
    sealed = keyring.seal(ORG, "TOKEN", VALUE)
    keyring.rotate(ORG)
    with pytest.raises(UnreadableSecret):
        keyring.rewrap(ORG, "TOKEN", sealed[:-6] + ("AAAAAA" if not sealed.endswith("AAAAAA") else "BBBBBB"))
    with pytest.raises(UnreadableSecret):
        keyring.rewrap(ORG, "OTHER", sealed)


def test_a_full_disk_leaves_the_old_keys(keyring: Keyring, path: Path) -> None:
    """A new file takes the place of the old one only when it is whole."""
    sealed = keyring.seal(ORG, "TOKEN", VALUE)
    blocker = path.with_name("secrets.key.new")
    blocker.mkdir()
    with pytest.raises(OSError, match=os.strerror(21)):
        keyring.rotate(ORG)
    assert keyring.open(ORG, "TOKEN", sealed) == VALUE
