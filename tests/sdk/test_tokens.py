"""`ow.tokens`: what is made, what it may do, and how it ends."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import (
    AuthenticationError,
    BudgetExceeded,
    InvalidParameterError,
    NotFoundError,
    PermissionDeniedError,
)
from openweights_prefect.ledger.connect import connect
from openweights_prefect.resources.tokens import Tokens
from openweights_prefect.settings import Settings
from openweights_prefect.types.tenancy import NewToken
from tests.sdk.conftest import RecordingLedger


@pytest.fixture
def holder(settings: Settings) -> Iterator[Any]:
    """Opens a client for a token."""
    opened: list[OpenWeights] = []

    def open_one(token: NewToken) -> OpenWeights:
        opened.append(OpenWeights(auth_token=token.token, settings=settings))
        return opened[-1]

    yield open_one
    for client in opened:
        client.close()


def test_a_token_is_shown_once(ow: OpenWeights) -> None:
    """It is an attribute of what `create` returns, in no text of it, and in no list."""
    made = ow.tokens.create("ci")
    assert made.token.startswith("ow_")
    assert len(made.token) == 46
    assert made.token not in repr(made) + str(made)
    [held] = ow.tokens.list()
    assert (held.id, held.prefix, held.state) == (made.id, made.token[:12], "active")
    assert made.token not in repr(held)
    assert not hasattr(held, "token")


def test_a_token_acts_for_who_made_it(ow: OpenWeights, holder: Any) -> None:
    """With the rights of its own role, and its use is noted."""
    user, admin = holder(ow.tokens.create("u")), holder(ow.tokens.create("a", "admin"))
    assert user.organization.info()["token_name"] == "u"
    assert (user.organization.info()["role"], admin.organization.info()["role"]) == ("user", "admin")
    with pytest.raises(PermissionDeniedError):
        user.tokens.create("more", "admin")
    assert user.tokens.create("less").role == "user"
    assert all(held.last_used_at for held in ow.tokens.list() if held.name in "ua")


@pytest.mark.parametrize("by", ["id", "prefix", "token"])
def test_a_revoked_token_is_refused_at_the_next_call(ow: OpenWeights, holder: Any, by: str) -> None:
    """With what it made; revoking again is silent."""
    made = ow.tokens.create("a", "admin")
    client = holder(made)
    child = holder(client.tokens.create("child"))
    child.organization.info()
    assert ow.tokens.revoke(getattr(made, by)).id == made.id
    for each in (client, child):
        with pytest.raises(AuthenticationError):
            each.organization.info()
    ow.tokens.revoke(made.id)
    assert {held.state for held in ow.tokens.list()} == {"revoked"}


def test_a_token_expires(ow: OpenWeights, holder: Any) -> None:
    """And makes none that outlives it."""
    made = ow.tokens.create("short", expires_in=timedelta(seconds=2))
    client = holder(made)
    child = client.tokens.create("child", expires_in=3600)
    assert made.expires_at is not None
    assert child.expires_at == made.expires_at
    deadline = time.monotonic() + 10
    while {held.state for held in ow.tokens.list()} != {"expired"}:
        assert time.monotonic() < deadline, "the tokens did not expire"
        time.sleep(0.1)
    with pytest.raises(AuthenticationError):
        client.organization.info()


def test_a_spent_token_submits_nothing(ow: OpenWeights, holder: Any) -> None:
    """The error says who can raise the limit; an admin does."""
    made = ow.tokens.create("poor", spend_limit_usd=0)
    client = holder(made)
    with pytest.raises(BudgetExceeded, match="ow token limit"):
        client.fine_tuning.create(model="org/model", training_file=_file(client), loss="sft")
    assert ow.tokens.set_limit(made.id, 10).spend_limit_usd == 10
    client.fine_tuning.create(model="org/model", training_file=_file(client), loss="sft")
    assert ow.tokens.set_limit(made.prefix, None).spend_limit_usd is None
    with pytest.raises(PermissionDeniedError):
        client.tokens.set_limit(made.id, 100)


def _file(client: OpenWeights) -> str:
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    return client.files.create(io.BytesIO(row), "conversations")["id"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": ""},
        {"name": "x" * 101},
        {"role": "root"},
        {"expires_in": 0},
        {"expires_in": -1.0},
        {"expires_in": float("nan")},
        {"expires_in": "30d"},
        {"expires_in": timedelta(days=100_000)},
        {"spend_limit_usd": -1},
        {"spend_limit_usd": float("inf")},
        {"spend_limit_usd": True},
    ],
)
def test_bad_arguments_are_refused_without_a_request(
    ledger: RecordingLedger, arguments: dict[str, Any]
) -> None:
    """The message names the argument and the value."""
    with pytest.raises(InvalidParameterError, match=next(iter(arguments))):
        Tokens(ledger).create(**{"name": "x", **arguments})
    assert ledger.calls == []


def test_what_is_no_token_is_not_found(ow: OpenWeights) -> None:
    """Of a whole token, only the beginning is repeated."""
    secret = "ow_" + "s" * 43
    with pytest.raises(NotFoundError) as caught:
        ow.tokens.revoke(secret)
    assert secret not in str(caught.value)
    with pytest.raises(NotFoundError):
        ow.tokens.set_limit("00000000-0000-0000-0000-00000000dead", 1)


def test_the_list_is_complete(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: pages are read until the end."""
    monkeypatch.setattr("openweights_prefect.resources.session.MAX_ROWS", 3)
    ledger = connect(replace(settings))
    tokens = Tokens(ledger)
    made = [tokens.create(f"t{number}").id for number in range(7)]
    assert [held.id for held in tokens.list()] == made[::-1]
    ledger.close()
