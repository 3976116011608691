"""The token exchange over HTTP: the issuer and Supabase's edge function answer alike, so both run every test.

The edge function runs in Deno, as on Supabase, in front of a stand-in for PostgREST on the same database.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql

from openweights_prefect.errors import AuthenticationError
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.signing import SigningKey, verify
from tests.callers import Callers, FixedIdentity
from tests.exchange_services import ISSUER, SECRET_KEY, edge_service, issuer_service, postgrest
from tests.loopback import Service, serve

POD = {
    "docker_image": "openweights/test:latest",
    "hardware": "1x L4",
    "gpu_type": "NVIDIA L4",
    "gpu_count": 1,
    "vram_gb": 19,
    "cloud": "SECURE",
    "price_per_hour": 0.4,
}
IMPLEMENTATIONS = ("issuer", "edge function")

_addresses = (f"203.0.113.{number % 250}" for number in itertools.count(1))


def new_secret(kind: str) -> str:
    return f"{kind}_{secrets.token_urlsafe(32)}"


@pytest.fixture(scope="module")
def url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A ledger that all tests here share: starting the services takes longer than the tests."""
    name = f"exchange_{os.getpid()}"
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        make = sql.SQL("create database {} template ledger_template")
        connection.execute(make.format(sql.Identifier(name)))
        yield postgres.url(database=name, user="authenticator")
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def callers(url: str) -> Iterator[Callers]:
    opened = Callers(url)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One key for both, so that tokens of one must be good for the other."""
    path = tmp_path_factory.mktemp("keys") / "key.json"
    SigningKey.create(path)
    return path


@dataclass(frozen=True)
class Exchange:
    """One of the two, and a caller of it from an address of its own."""

    service: Service
    address: str

    def post(self, content: object, **options: Any) -> httpx.Response:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"X-Forwarded-For": self.address, **options.pop("headers", {})}
        return httpx.post(f"{self.service.url}/exchange", content=raw, headers=headers, timeout=30, **options)

    def jwks(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.service.url}/.well-known/jwks.json")
        assert answer.status_code == 200
        assert "max-age" in answer.headers["cache-control"]
        return dict(answer.json())

    def claims(self, token: str) -> dict[str, Any]:
        answer = self.post({"token": token})
        assert answer.status_code == 200, answer.text
        return verify(answer.json()["access_token"], self.jwks(), ISSUER, "authenticated")


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def service(
    request: pytest.FixtureRequest, url: str, key_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    output = tmp_path_factory.mktemp("service") / "output"
    with contextlib.ExitStack() as stack:
        if request.param == "issuer":
            yield stack.enter_context(issuer_service(url, key_file, output))
        else:
            supabase_url = stack.enter_context(serve(postgrest(url)))
            yield stack.enter_context(edge_service(supabase_url, key_file, output))


@pytest.fixture
def exchange(service: Service) -> Exchange:
    return Exchange(service, next(_addresses))


@pytest.fixture
def mint(callers: Callers) -> Callable[..., tuple[str, str]]:
    """Makes API tokens: the token and its id."""

    def make(**options: Any) -> tuple[str, str]:
        token = new_secret("ow")
        answer = callers.person.call(
            "create_token", token_name="test", hash=hash_secret(token), prefix=token[:7], **options
        )
        return token, answer[0]["token"]["id"]

    return make


def buy_pod(callers: Callers) -> tuple[str, str]:
    """A pod that was just bought: its one-time token and its id."""
    worker_id, bootstrap = f"pod-{uuid.uuid4().hex[:12]}", new_secret("owb")
    terms: dict[str, Any] = {"bootstrap_hash": hash_secret(bootstrap), "ttl_seconds": 3600, "max_pods": 1000}
    callers.control.call("intend_pod", pod={"id": worker_id, **POD}, **terms)
    return bootstrap, worker_id


def essence(answer: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    """All of an answer that its reader could learn from."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "vary")}
    return answer.status_code, answer.content, headers


def test_a_token_becomes_a_jwt(
    exchange: Exchange, callers: Callers, mint: Callable[..., tuple[str, str]]
) -> None:
    """Of at most 15 minutes, for the token's organization and person; no cache keeps it."""
    token, token_id = mint()
    before = int(time.time())
    answer = exchange.post({"token": token})
    body = answer.json()
    claims = verify(body["access_token"], exchange.jwks(), ISSUER, "authenticated")
    assert claims["role"] == "authenticated"
    assert claims["organization_id"] == callers.organization_id
    assert claims["token_id"] == token_id
    assert before <= claims["iat"] <= time.time()
    assert claims["exp"] - claims["iat"] <= 900
    assert body.keys() == {"access_token", "token_type", "expires_in"}
    assert body["token_type"] == "bearer"
    assert 890 <= body["expires_in"] <= 900
    assert answer.headers["cache-control"] == "no-store"
    assert token not in json.dumps(claims)


def test_the_ledger_believes_the_claims(
    exchange: Exchange, url: str, callers: Callers, mint: Callable[..., tuple[str, str]]
) -> None:
    """Until the token is revoked: from then on the JWT that is still valid is worth nothing."""
    token, token_id = mint()
    ledger = PostgresLedger(url, identity=FixedIdentity(exchange.claims(token)))
    try:
        assert ledger.call("whoami")[0]["token_id"] == token_id
        callers.person.call("revoke_token", token_id=token_id)
        with pytest.raises(AuthenticationError):
            ledger.call("whoami")
    finally:
        ledger.close()
    assert exchange.post({"token": token}).status_code == 401


def test_the_role_of_a_token(exchange: Exchange, mint: Callable[..., tuple[str, str]]) -> None:
    assert exchange.claims(mint(token_role="worker")[0])["role"] == "ow_worker"
    assert exchange.claims(mint(token_role="admin")[0])["role"] == "authenticated"


def test_a_token_that_ends_sooner(exchange: Exchange, mint: Callable[..., tuple[str, str]]) -> None:
    """No JWT outlives its token."""
    body = exchange.post({"token": mint(valid_seconds=60)[0]}).json()
    assert 0 < body["expires_in"] <= 60
    claims = verify(body["access_token"], exchange.jwks(), ISSUER, "authenticated")
    assert claims["exp"] - claims["iat"] <= 61


def test_every_refusal_looks_the_same(
    exchange: Exchange, callers: Callers, mint: Callable[..., tuple[str, str]]
) -> None:
    """Unknown, revoked, expired, misspelled or of another kind: status, headers and body do not tell."""
    revoked, token_id = mint()
    callers.person.call("revoke_token", token_id=token_id)
    short, short_id = mint(valid_seconds=1)
    deadline = time.monotonic() + 10
    while callers.person.call("list_tokens", max_rows=1000) and state_of(callers, short_id) != "expired":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bootstrap, _ = buy_pod(callers)
    tried = [
        new_secret("ow"),
        new_secret("owp"),
        new_secret("owi"),
        revoked,
        short,
        bootstrap,
        "",
        "ow_",
        "\u0000",
    ]
    tried += [new_secret("ow") + "\n", new_secret("ow") + "A", "OW" + revoked[2:], "\ud800", "' or true --"]
    answers = [essence(exchange.post({"token": token})) for token in tried]
    half = {"bootstrap": new_secret("owb"), "session_hash": "0" * 64}
    for change in ({}, {"session_hash": "A" * 64}, {"bootstrap": "x"}, {"session_hash": "0" * 63}):
        answers.append(essence(exchange.post({**half, **change})))
    assert answers[0][0] == 401
    assert answers == [answers[0]] * len(answers)


def state_of(callers: Callers, token_id: str) -> str:
    rows = callers.person.call("list_tokens", max_rows=1000)
    return str(next(row["state"] for row in rows if row["id"] == token_id))


def test_a_pod_redeems_its_token_once(exchange: Exchange, callers: Callers) -> None:
    """Its agent may repeat the call; whoever comes later with another secret is refused, and audited."""
    bootstrap, worker_id = buy_pod(callers)
    session = new_secret("owp")
    request = {"bootstrap": bootstrap, "session_hash": hash_secret(session)}
    for _ in range(2):
        answer = exchange.post(request)
        assert answer.status_code == 200
        assert answer.json() == {"worker_id": worker_id, "organization_id": callers.organization_id}
        assert answer.headers["cache-control"] == "no-store"
    assert exchange.post({**request, "session_hash": "0" * 64}).status_code == 401
    assert [row["action"] for row in callers.person.call("list_audit", max_rows=1)] == ["replay_bootstrap"]
    claims = exchange.claims(session)
    assert (claims["role"], claims["worker_id"]) == ("ow_pod", worker_id)
    assert bootstrap not in json.dumps(claims)


def test_a_race_for_a_one_time_token(exchange: Exchange, callers: Callers) -> None:
    """Of many who bring it at the same moment, each with a secret of its own, one wins."""
    bootstrap, _ = buy_pod(callers)
    barrier = threading.Barrier(8)

    def redeem(_: int) -> int:
        barrier.wait()
        return exchange.post({"bootstrap": bootstrap, "session_hash": secrets.token_hex(32)}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(redeem, range(8))) == [200] + [401] * 7


def test_the_hash_of_a_session_is_no_session(exchange: Exchange, callers: Callers) -> None:
    """Who reads it in a JWT or in the database can exchange it for nothing."""
    bootstrap, _ = buy_pod(callers)
    session_hash = hash_secret(new_secret("owp"))
    answer = exchange.post({"bootstrap": bootstrap, "session_hash": session_hash})
    assert "access_token" not in answer.text
    for guess in (session_hash, f"owp_{session_hash}", f"owp_{session_hash[:43]}"):
        assert exchange.post({"token": guess}).status_code == 401


def test_a_pod_that_has_ended(exchange: Exchange, callers: Callers) -> None:
    """Neither its one-time token nor its session is worth anything any more."""
    used, unused = buy_pod(callers), buy_pod(callers)
    session = new_secret("owp")
    exchange.post({"bootstrap": used[0], "session_hash": hash_secret(session)})
    for _, worker_id in (used, unused):
        callers.control.call("end_pod", for_worker=worker_id, why="over")
    assert exchange.post({"token": session}).status_code == 401
    assert exchange.post({"bootstrap": unused[0], "session_hash": "1" * 64}).status_code == 401


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"null", 400),
        (b"[]", 400),
        (b'"ow_x"', 400),
        (b"{}", 400),
        (b'{"token": null}', 400),
        (b'{"token": 7}', 400),
        (b'{"token": ["ow_x"]}', 400),
        (b'{"token": {"$ne": null}}', 400),
        (b'{"token": NaN}', 400),
        (b'{"bootstrap": "owb_x"}', 400),
        (b'{"session_hash": "0"}', 400),
        (b'{"token": "ow_x", "bootstrap": "owb_x", "session_hash": "0"}', 400),
        (b'{"token": "ow_x", "source": "elsewhere"}', 400),
        (b'{"token": "ow_x", "role": "service_role"}', 400),
        (b'{"__proto__": {"token": "ow_x"}}', 400),
        (b'{"Token": "ow_x"}', 400),
        (b'\xef\xbb\xbf{"token": "ow_x"}', 400),
        ('{"token": "ow_x"}'.encode("utf-16"), 400),
        (b'{"token": "\xff"}', 400),
        (b"[" * 1000, 400),
        (b"token=ow_x", 400),
        (b" " * 1024, 400),
        (b" " * 1025, 413),
        (b'{"token": "' + b"A" * 5_000_000 + b'"}', 413),
        (b'{"token": "ow_x"}', 401),
    ],
    ids=range(27),
)
def test_requests_that_are_none(exchange: Exchange, content: bytes, status: int) -> None:
    """Nothing but the two shapes of a request comes near the ledger; none breaks the service."""
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # Not all of a huge body is read.
        answer = exchange.post(content)
        assert answer.status_code == status
        assert answer.json().keys() == {"error"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/exchange", 405),
        ("PUT", "/exchange", 405),
        ("DELETE", "/exchange", 405),
        ("POST", "/.well-known/jwks.json", 405),
        ("POST", "/", 404),
        ("POST", "/exchange/elsewhere", 404),
        ("GET", "/.well-known/", 404),
    ],
)
def test_other_addresses(exchange: Exchange, method: str, path: str, status: int) -> None:
    assert httpx.request(method, exchange.service.url + path).status_code == status


def test_a_body_in_pieces(exchange: Exchange, mint: Callable[..., tuple[str, str]]) -> None:
    """A request without a length is read to its end, or to the limit."""
    token, _ = mint()
    pieces = [
        part.encode() for part in (json.dumps({"token": token})[:20], json.dumps({"token": token})[20:])
    ]
    target = f"{exchange.service.url}/exchange"
    assert httpx.post(target, content=iter(pieces)).status_code == 200
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):
        assert httpx.post(target, content=(b"x" * 100 for _ in range(100))).status_code == 413


def test_guessing_is_slowed_down(service: Service) -> None:
    """After thirty unknown tokens an address must wait; others need not."""
    guesser, other = Exchange(service, next(_addresses)), Exchange(service, next(_addresses))
    answers = [guesser.post({"token": new_secret("ow")}) for _ in range(40)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:20] == [401] * 20
    assert statuses[-1] == 429
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 300
    assert answers[-1].json() == {"error": "too_many_attempts"}
    redeemed = guesser.post({"bootstrap": new_secret("owb"), "session_hash": "0" * 64})
    assert redeemed.status_code == 429
    assert other.post({"token": new_secret("ow")}).status_code == 401


def test_an_address_cannot_be_chosen(service: Service) -> None:
    """Of `X-Forwarded-For` only what the proxy added counts: a guesser with many faces is one guesser."""
    address, statuses = next(_addresses), []
    for number in range(40):
        header = {"X-Forwarded-For": f"192.0.2.{number}, {address}"}
        guesser = Exchange(service, "unused")
        statuses.append(guesser.post({"token": new_secret("ow")}, headers=header).status_code)
    assert statuses[-1] == 429


def test_many_at_once(exchange: Exchange, mint: Callable[..., tuple[str, str]]) -> None:
    token, _ = mint()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: exchange.post({"token": token}).status_code, range(64)))
    assert answers == [200] * 64


def test_nothing_secret_is_printed(
    exchange: Exchange, callers: Callers, key_file: Path, mint: Callable[..., tuple[str, str]]
) -> None:
    """Neither tokens, good or bad, nor JWTs, nor the keys."""
    token, unknown, session = mint()[0], new_secret("ow"), new_secret("owp")
    bootstrap, _ = buy_pod(callers)
    signed = exchange.post({"token": token}).json()["access_token"]
    exchange.post({"token": unknown})
    exchange.post({"bootstrap": bootstrap, "session_hash": hash_secret(session)})
    exchange.post({"token": session})
    exchange.post({"token": token, "more": "canary"})
    printed = exchange.service.printed()
    private = json.loads(key_file.read_text())["d"]
    for secret in (token, unknown, bootstrap, session, signed, private, SECRET_KEY, "canary"):
        assert secret not in printed
    assert hash_secret(token) not in printed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_ledger_is_away(implementation: str, tmp_path: Path, key_file: Path) -> None:
    """That is no refusal: the caller shall come again."""
    with contextlib.ExitStack() as stack:
        if implementation == "issuer":
            nowhere = f"postgresql://authenticator@/nowhere?host={tmp_path}"
            service = stack.enter_context(issuer_service(nowhere, key_file, tmp_path / "output"))
        else:
            service = stack.enter_context(edge_service("http://127.0.0.1:9", key_file, tmp_path / "output"))
        token = new_secret("ow")
        answer = Exchange(service, "203.0.113.1").post({"token": token})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json() == {"error": "unavailable"}
        assert "exchange_token" in service.printed()
        assert token not in service.printed()
