"""How a pod and the control plane find the ledger, over both transports."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from openweights_prefect.errors import (
    AuthenticationError,
    ConfigurationError,
    LedgerUnavailable,
    PermissionDeniedError,
)
from openweights_prefect.ledger.connect import (
    access_tokens,
    check_organization,
    connect,
    connect_pod,
    redeem_bootstrap,
)
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.notifications import notifications
from openweights_prefect.ledger.protocol import Ledger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings
from openweights_prefect.worker.orders import public_addresses
from openweights_prefect.worker.worker import _settings_of_token
from tests.callers import Callers

POD = {
    "id": "pod-1", "docker_image": "i", "hardware": "1x H200", "gpu_type": "H200", "gpu_count": 1,
    "vram_gb": 141, "cloud": "SECURE", "price_per_hour": 1,
}  # fmt: skip


@pytest.fixture
def settings(ledger_url: str, transport: str, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """As a pod loads them: addresses, and no secret."""
    if transport == "psycopg":
        return Settings(home=tmp_path, database_url=ledger_url)
    double = request.getfixturevalue("supabase")
    return Settings(home=tmp_path, supabase_url=double.url, supabase_key=double.key)


@pytest.fixture
def bootstrap(ledger: Callers) -> str:
    """The one-time token of a pod that was bought."""
    token = f"owb_{secrets.token_urlsafe(32)}"
    [answer] = ledger.call(
        "intend_pod", pod=POD, bootstrap_hash=hash_secret(token), ttl_seconds=3600, max_pods=8
    )
    assert answer["outcome"] == "intended"
    return token


@pytest.fixture
def closing() -> Iterator[list[Ledger]]:
    opened: list[Ledger] = []
    yield opened
    for ledger in opened:
        ledger.close()


def session_secret() -> str:
    return f"owp_{secrets.token_urlsafe(32)}"


def test_a_pod_trades_its_token_for_a_session(
    settings: Settings, bootstrap: str, closing: list[Ledger]
) -> None:
    """Once, and again with the same session when the answer was lost; then it calls as itself."""
    session = session_secret()
    redeem_bootstrap(settings, bootstrap, session)
    redeem_bootstrap(settings, bootstrap, session)
    closing.append(pod := connect_pod(settings, session))
    [answer] = pod.call("register_pod", for_worker="pod-1", as_boot=uuid4(), lease_seconds=60, models=[])
    assert answer["outcome"] == "registered"
    assert pod.organization_id == LOCAL_ORGANIZATION_ID
    with pytest.raises(AuthenticationError, match="refused"):
        redeem_bootstrap(settings, bootstrap, session_secret())
    with pytest.raises(AuthenticationError):
        redeem_bootstrap(settings, f"owb_{'x' * 43}", session_secret())


def test_guessing_is_slowed_down(settings: Settings) -> None:
    """Who was refused too often is told to come later: a pod then waits, and does not give up."""
    outcomes = [guess(settings) for _ in range(40)]
    assert outcomes[0] is AuthenticationError
    assert outcomes[-1] is LedgerUnavailable
    assert outcomes == sorted(outcomes, key=lambda kind: kind is LedgerUnavailable)


def guess(settings: Settings) -> type[Exception]:
    try:
        redeem_bootstrap(settings, f"owb_{secrets.token_urlsafe(32)}", session_secret())
    except (AuthenticationError, LedgerUnavailable) as exc:
        return type(exc)
    raise AssertionError("a guess was accepted")


def test_a_token_knows_its_organization(settings: Settings, ledger: Callers, closing: list[Ledger]) -> None:
    """The settings of a control plane need not name it; naming another one is an error."""
    token = f"ow_{secrets.token_urlsafe(32)}"
    ledger.person.call(
        "create_token", token_name="w", token_role="worker", hash=hash_secret(token), prefix=token[:12]
    )
    settings = replace(settings, api_key=token)
    closing.append(control := connect(settings, role="ow_worker"))
    assert check_organization(settings, control) == LOCAL_ORGANIZATION_ID
    assert control.call("control_snapshot")[0]["waiting"] == []
    assert _settings_of_token(settings, control).organization_id == LOCAL_ORGANIZATION_ID
    with pytest.raises(PermissionDeniedError, match="--role worker"):
        _settings_of_token(settings, ledger.person)
    with pytest.raises(AuthenticationError, match="belongs to organization"):
        check_organization(replace(settings, organization_id=str(uuid4())), control)


def test_an_exchange_that_is_none_is_named(settings: Settings, transport: str) -> None:
    """A wrong address or key is a matter of settings; silence may pass."""
    if transport == "psycopg":
        pytest.skip("there is no exchange")
    with pytest.raises(ConfigurationError, match="SUPABASE_ANON_KEY"):
        redeem_bootstrap(replace(settings, supabase_key="wrong"), f"owb_{'x' * 43}", session_secret())
    silent = replace(settings, supabase_url="http://127.0.0.1:9")
    with pytest.raises(LedgerUnavailable, match="did not answer"):
        redeem_bootstrap(silent, f"owb_{'x' * 43}", session_secret())


def test_construction_is_one_request(
    settings: Settings, ledger: Callers, transport: str, request: pytest.FixtureRequest
) -> None:
    """Over HTTP: the exchange, which also says which organization it is."""
    if transport == "psycopg":
        pytest.skip("there is no HTTP")
    from openweights_prefect.client import OpenWeights

    token = f"ow_{secrets.token_urlsafe(32)}"
    ledger.person.call("create_token", token_name="t", hash=hash_secret(token), prefix=token[:12])
    seen: list[str] = []

    def note(asked: Any) -> None:
        seen.append(asked.url.path)

    request.getfixturevalue("supabase").intercept = note
    with OpenWeights(auth_token=token, settings=settings) as client:
        assert client.organization_id == LOCAL_ORGANIZATION_ID
        assert seen == ["/functions/v1/exchange"]


def test_without_a_database_there_are_no_notifications() -> None:
    """The listener waits for ever and costs nothing, instead of ending the loop that listens."""

    async def listen() -> list[str]:
        return [payload async for payload in notifications("", "ow_pod")]

    async def wait() -> None:
        await asyncio.wait_for(listen(), timeout=0.3)

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def test_a_pod_is_told_public_addresses_only() -> None:
    """The provider shows a pod's environment to its whole account."""
    told = public_addresses(
        Settings(
            supabase_url="https://x.supabase.co",
            supabase_key="sb_publishable_x",
            prefect_api_url="https://prefect/api",
            file_store="s3://bucket/x",
            database_url="postgresql://u:secret@h/d",
            api_key="ow_secret",
            runpod_api_key="rpa_secret",
        )
    )
    assert told == {
        "SUPABASE_URL": "https://x.supabase.co",
        "SUPABASE_ANON_KEY": "sb_publishable_x",
        "PREFECT_API_URL": "https://prefect/api",
        "OW_FILE_STORE": "s3://bucket/x",
    }
    assert public_addresses(Settings(prefect_api_url="http://127.0.0.1:4200/api")) == {}


def test_a_pod_that_has_a_proxy_is_told_that_alone() -> None:
    """Of a local stack, too."""
    local = Settings(prefect_api_url="https://prefect/api", prefect_proxy_url="https://proxy/api")
    assert public_addresses(local) == {"OW_PREFECT_PROXY_URL": "https://proxy/api"}
    told = public_addresses(replace(local, supabase_url="https://x.supabase.co"))
    assert "https://prefect/api" not in told.values()


def test_a_ledger_without_http_has_no_access_tokens(tmp_path: Path) -> None:
    """And one with HTTP asks for a token before it asks anybody."""
    assert access_tokens(Settings(home=tmp_path, database_url="postgresql://x@/y")) is None
    with pytest.raises(ConfigurationError, match=r"OPENWEIGHTS_API_KEY.*|ow login"):
        connect(Settings(home=tmp_path, supabase_url="https://x.example", supabase_key="k"))
