"""Supabase's edge function `exchange` beside what it shares with the issuer (`test_exchange.py`)."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.signing import SigningKey, verify
from tests.callers import Callers
from tests.exchange_services import (
    FUNCTION,
    ISSUER,
    SECRET_KEY,
    deno,
    deno_environment,
    edge_service,
    postgrest,
)
from tests.loopback import serve
from tests.npm_packages import npm_program


@pytest.fixture
def transport() -> str:
    """The function itself is a client of the other transport."""
    return "psycopg"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**deno_environment(), **environment}
    return subprocess.run(
        list(command), capture_output=True, text=True, timeout=120, env=variables, check=False
    )


@pytest.mark.parametrize(
    "arguments", [["check"], ["lint"], ["fmt", "--check", "--line-width", "120"]], ids=str
)
def test_types_and_style(arguments: list[str]) -> None:
    """Deno's own checks, without a package from elsewhere."""
    done = run(deno(), *arguments, *sorted(FUNCTION.glob("*.ts")))
    assert done.returncode == 0, done.stderr


def test_only_its_own_files_are_imported() -> None:
    """What signs for everybody runs no code that somebody else can change."""
    for path in FUNCTION.glob("*.ts"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.startswith("import ") or line.endswith('from "./exchange.ts";'), line


def test_keys_of_an_older_project(ledger: Callers, ledger_url: str, tmp_path: Path) -> None:
    """Projects without the new kind of secret key give the function a `service_role` JWT."""
    SigningKey.create(tmp_path / "key")
    ledger.person.call("create_token", token_name="t", hash=hash_secret("ow_" + "a" * 43), prefix="ow_aaaa")
    keys = {"SUPABASE_SERVICE_ROLE_KEY": SECRET_KEY}
    with (
        serve(postgrest(ledger_url)) as supabase_url,
        edge_service(supabase_url, tmp_path / "key", tmp_path / "output", keys=keys) as service,
    ):
        answer = httpx.post(f"{service.url}/exchange", json={"token": "ow_" + "a" * 43})
    assert answer.status_code == 200


def test_a_wrong_secret_key(ledger_url: str, tmp_path: Path) -> None:
    """The operator reads why; the caller does not take it for a refusal, and the key is not printed."""
    SigningKey.create(tmp_path / "key")
    keys = {"SUPABASE_SECRET_KEYS": '{"default": "sb_secret_wrong"}'}
    with (
        serve(postgrest(ledger_url)) as supabase_url,
        edge_service(supabase_url, tmp_path / "key", tmp_path / "output", keys=keys) as service,
    ):
        answer = httpx.post(f"{service.url}/exchange", json={"token": "ow_" + "a" * 43})
    assert (answer.status_code, answer.json()) == (500, {"error": "internal"})
    assert "status 401" in service.printed()
    assert "sb_secret_wrong" not in service.printed()


def test_key_of_the_supabase_cli(ledger: Callers, ledger_url: str, tmp_path: Path) -> None:
    """The key that the instructions make signs in both, under the name that Supabase knows it by."""
    cli = npm_program("supabase", "3.1.0")
    made = subprocess.run(
        [cli, "gen", "signing-key", "--algorithm", "ES256"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
        env={**deno_environment(), "SUPABASE_TELEMETRY_DISABLED": "1", "HOME": str(tmp_path)},
    )
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text(made.stdout)
    key = SigningKey.load(path)
    assert key.kid == json.loads(made.stdout)["kid"]
    token = "ow_" + "b" * 43
    ledger.person.call("create_token", token_name="t", hash=hash_secret(token), prefix="ow_bbbb")
    with (
        serve(postgrest(ledger_url)) as supabase_url,
        edge_service(supabase_url, path, tmp_path / "output") as service,
    ):
        signed = httpx.post(f"{service.url}/exchange", json={"token": token}).json()["access_token"]
        published = httpx.get(f"{service.url}/exchange/.well-known/jwks.json").json()
    assert published == key.jwks()
    assert verify(signed, key.jwks(), ISSUER, "authenticated")["aud"] == "authenticated"
    own = key.sign({"iss": ISSUER, "aud": "authenticated", "exp": int(time.time()) + 60})
    assert verify(own, published, ISSUER, "authenticated")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OW_SIGNING_KEY", ""),
        ("OW_SIGNING_KEY", "canary-of-a-key"),
        ("OW_SIGNING_KEY", '{"kty": "oct", "k": "canary-of-a-key"}'),
        ("OW_SIGNING_KEY", '{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "d": "canary-of-a-key"}'),
        ("OW_SIGNING_KEY", "null"),
        ("SUPABASE_SECRET_KEYS", "canary-of-a-key"),
        ("SUPABASE_SECRET_KEYS", '{"other": "canary-of-a-key"}'),
        ("SUPABASE_URL", ""),
    ],
)
def test_a_missing_or_damaged_secret(tmp_path: Path, name: str, value: str) -> None:
    """The function does not start, says which secret is wrong, and does not show it."""
    key = SigningKey.create(tmp_path / "key")
    good = {
        "SUPABASE_URL": "http://127.0.0.1:9",
        "SUPABASE_SECRET_KEYS": '{"default": "sb_secret_canary"}',
        "OW_SIGNING_KEY": (tmp_path / "key").read_text(),
        "DENO_SERVE_ADDRESS": "tcp:127.0.0.1:0",
    }
    done = run(
        deno(), "run", "--allow-env", "--allow-net=127.0.0.1", FUNCTION / "index.ts", **{**good, name: value}
    )
    assert done.returncode != 0
    assert name in done.stderr
    assert "canary" not in done.stderr
    assert key.kid not in done.stderr
