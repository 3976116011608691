"""What only the transport over supabase-py has: access tokens, people's sessions, HTTP that fails."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jwt
import psycopg
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openweights_prefect.errors import (
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    LedgerUnavailable,
    OpenWeightsError,
    PermissionDeniedError,
)
from openweights_prefect.ledger.access import AccessToken, AccessTokens, AccessUnavailable, TokenExchange
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.identity import LocalIdentity, hash_secret
from openweights_prefect.ledger.sessions import Session, SessionFile, SessionRefresh, SupabaseAuth
from openweights_prefect.ledger.signing import SigningKey
from openweights_prefect.ledger.supabase import SupabaseLedger
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from tests.callers import Callers
from tests.ledger import test_transitions as ledger_calls
from tests.supabase_double import SupabaseDouble

CLAIMS = LocalIdentity(LOCAL_ORGANIZATION_ID).claims()
PASSWORD = "correct horse"


@pytest.fixture
def transport() -> str:
    return "supabase"


@pytest.fixture
def person(supabase: SupabaseDouble) -> Iterator[SupabaseLedger]:
    """The admin of the local organization."""
    ledger = supabase.ledger(CLAIMS)
    yield ledger
    ledger.close()


@pytest.fixture
def auth(supabase: SupabaseDouble) -> Iterator[SupabaseAuth]:
    opened = SupabaseAuth(supabase.url, supabase.key)
    yield opened
    opened.close()


def failing(times: int, answer: Callable[[], Response], path: str = "/rest/") -> Callable[[Request], Any]:
    """An interception that answers so many requests of a path in its own way."""
    left = iter(range(times))

    def intercept(request: Request) -> Response | None:
        if request.url.path.startswith(path) and next(left, None) is not None:
            return answer()
        return None

    return intercept


def error(status: int, code: str | None = None, **headers: str) -> Callable[[], Response]:
    content = {"code": code, "message": "broken on purpose", "details": None, "hint": None}
    return lambda: JSONResponse(content, status_code=status, headers=headers)


# Answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (error(401, "PGRST302"), OpenWeightsError),
        (error(403, "28000"), AuthenticationError),
        (error(403, "42501"), PermissionDeniedError),
        (error(401, "42501"), PermissionDeniedError),
        (error(400, "22P02"), InvalidRequestError),
        (error(409, "23505"), InvalidRequestError),
        (error(404, "PGRST202"), ConflictError),
        (error(404), ConfigurationError),
        (error(500, "XX000"), OpenWeightsError),
        (lambda: Response("<html>", 404), ConfigurationError),
        (
            lambda: Response(status_code=301, headers={"Location": "http://example.invalid"}),
            ConfigurationError,
        ),
    ],
)
def test_answers_become_our_errors(
    supabase: SupabaseDouble, person: SupabaseLedger, answer: Any, kind: type[OpenWeightsError]
) -> None:
    """By code where there is one, else by status; asked once."""
    supabase.intercept = failing(1, answer)
    with pytest.raises(kind, match="ping"):
        person.call("ping")
    assert person.call("ping")


@pytest.mark.parametrize(
    "answer",
    [
        error(503, "PGRST000"),
        error(503, "PGRST001"),
        error(503, "PGRST002"),
        error(504, "PGRST003"),
        error(500, "40001"),
        error(500, "40P01"),
        error(500, "55P03"),
        error(503, "57P01"),
        error(429, **{"Retry-After": "1"}),
        lambda: Response("bad gateway", 502),
        lambda: Response("cut", 200, {"Content-Length": "1000"}),
    ],
)
def test_what_may_pass_is_tried_again(supabase: SupabaseDouble, person: SupabaseLedger, answer: Any) -> None:
    """Three failures in a row, then an answer: the caller notices nothing."""
    supabase.intercept = failing(2, answer)
    assert person.call("ping")


def test_patience_ends_in_time_and_says_why(supabase: SupabaseDouble, person: SupabaseLedger) -> None:
    """The error names the address, the function and the cause."""
    person.call("ping")
    supabase.intercept = failing(10_000, error(503, "PGRST000"))
    started = time.monotonic()
    with pytest.raises(LedgerUnavailable, match=r"127\.0\.0\.1.*`ping` in 1 s.*PGRST000"):
        person.call("ping", patience_seconds=1)
    assert time.monotonic() - started < 2


def test_nobody_at_the_address(supabase: SupabaseDouble) -> None:
    """A refused connection is an outage, of the ledger and of the exchange alike."""
    access = AccessTokens(lambda: AccessToken("token", 900))
    ledger = SupabaseLedger("http://127.0.0.1:9", supabase.key, access=access, patience_seconds=0.5)
    with pytest.raises(LedgerUnavailable, match="ConnectError"):
        ledger.call("ping")
    ledger.close()


def test_the_projects_key_is_asked_for_first(supabase: SupabaseDouble) -> None:
    """A wrong key is a wrong setting, and says which: to the ledger and to the exchange."""
    ledger = SupabaseLedger(supabase.url, "wrong", access=AccessTokens(lambda: AccessToken("a.b.c", 9)))
    with pytest.raises(AuthenticationError, match="SUPABASE_ANON_KEY"):
        ledger.call("ping")
    ledger.close()
    exchange = TokenExchange(f"{supabase.url}/functions/v1/exchange", "ow_x", key="wrong")
    with pytest.raises(ConfigurationError, match="SUPABASE_ANON_KEY"):
        exchange()
    with pytest.raises(ConfigurationError, match="no token exchange"):
        TokenExchange(f"{supabase.url}/functions/v1/missing", "ow_x", key=supabase.key)()


@pytest.mark.parametrize("bad", [float("nan"), {"loss": [float("inf")]}, "\ud800", "a\0b"])
def test_what_json_cannot_hold_is_a_bad_argument(person: SupabaseLedger, bad: Any) -> None:
    with pytest.raises(InvalidRequestError):
        person.call("submit_job", job={"id": "a", "params": bad})


def test_a_transport_belongs_to_one_url() -> None:
    """What is no address is said at once."""
    with pytest.raises(ConfigurationError, match="SUPABASE_URL"):
        SupabaseLedger("project.supabase.co", "key", access=AccessTokens(lambda: AccessToken("a", 9)))


def test_killed_connections_of_the_database(
    person: SupabaseLedger, postgres: EmbeddedPostgres, ledger_url: str
) -> None:
    """Eight threads call on while the server ends all connections of their database, again and again."""
    database = ledger_url.rpartition("?")[0].rpartition("/")[2]
    kill = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and usename = %s"
    ends = time.monotonic() + 3

    def work(_: int) -> int:
        calls = 0
        while time.monotonic() < ends:
            assert person.call("ping")
            calls += 1
        return calls

    with (
        ThreadPoolExecutor(8) as pool,
        psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection,
    ):
        working = [pool.submit(work, number) for number in range(8)]
        killed = 0
        while time.monotonic() < ends:
            killed += len(connection.execute(kill, [database, "authenticator"]).fetchall())
            time.sleep(0.3)
        assert sum(future.result() for future in working) > 8
    assert killed > 8


def test_rows_are_never_cut_off_silently(open_ledger: Callable[[], Callers]) -> None:
    """PostgREST gives 1000 rows at most: a page of them is fine, more is an error and not less."""
    ledger = open_ledger()
    ledger_calls.submit(ledger)
    run = ledger_calls.flow_run_for(ledger, "probe-1")
    ledger_calls.buy(ledger)
    process = ledger_calls.boot(ledger)
    ledger_calls.open_run(ledger, run, process)
    for first in (0, 600):
        batch = [{"at": 1, "data": {"n": number}} for number in range(first, first + 600)]
        ledger.call("append_events", for_run=run, as_boot=process, first_sequence=first, batch=batch)
    page = ledger.call("list_events", for_job="probe-1", max_rows=1000)
    rest = ledger.call("list_events", for_job="probe-1", max_rows=1000, after_id=page[-1]["id"])
    assert [event["data"]["n"] for event in page + rest] == list(range(1200))
    with pytest.raises(InvalidRequestError, match="max_rows=5000"):
        ledger.call("list_events", for_job="probe-1", max_rows=5000)


# Access tokens -----------------------------------------------------------------------------------


def test_a_real_token_works_until_it_is_revoked(supabase: SupabaseDouble, person: SupabaseLedger) -> None:
    """Revocation acts on the next call, although the access token is still good for minutes."""
    token = f"ow_{'t' * 43}"
    made = person.call(
        "create_token", token_name="ci", token_role="user", hash=hash_secret(token), prefix=token[:8]
    )
    holder = supabase.ledger_of(token)
    assert holder.organization_id == LOCAL_ORGANIZATION_ID
    assert holder.call("whoami")[0]["token_name"] == "ci"
    person.call("revoke_token", token_id=uuid.UUID(made[0]["token"]["id"]))
    with pytest.raises(AuthenticationError, match="whoami"):
        holder.call("whoami")
    holder.close()


def test_an_unknown_token_is_refused_and_not_repeated(supabase: SupabaseDouble) -> None:
    """Neither the error nor its causes hold the token."""
    token = f"ow_{'u' * 43}"
    ledger = supabase.ledger_of(token)
    with pytest.raises(AuthenticationError, match="ow token create") as caught:
        ledger.call("ping")
    assert token not in repr(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)
    ledger.close()


@pytest.mark.parametrize("code", ["PGRST303", "PGRST301"])
def test_a_refused_access_token_is_replaced_once(supabase: SupabaseDouble, code: str) -> None:
    """Our clock may be wrong, or the key was changed: one new token, then the refusal is believed."""
    ledger = supabase.ledger_of(supabase.exchange.grant(CLAIMS))
    supabase.intercept = failing(1, error(401, code))
    assert ledger.call("ping")
    assert supabase.exchange.exchanges == 2
    supabase.intercept = failing(10_000, error(401, code))
    with pytest.raises(AuthenticationError, match="refused a new access token for `ping`"):
        ledger.call("ping")
    assert supabase.exchange.exchanges == 3
    ledger.close()


def test_tokens_that_live_two_seconds_under_load(supabase: SupabaseDouble) -> None:
    """Sixteen threads, no skew allowed: no call fails, and about one exchange a lifetime."""
    supabase.rest.leeway_seconds = 0
    ledger = supabase.ledger_of(supabase.exchange.grant(CLAIMS, lifetime_seconds=2))
    ends = time.monotonic() + 7

    def work(_: int) -> int:
        calls = 0
        while time.monotonic() < ends:
            assert ledger.call("ping")
            calls += 1
        return calls

    with ThreadPoolExecutor(16) as pool:
        calls = sum(pool.map(work, range(16)))
    assert calls > 50
    # A token of two seconds, its times cut to whole ones, lives between one and two.
    assert 3 <= supabase.exchange.exchanges <= 8
    ledger.close()


def test_the_exchange_may_be_away_for_a_while(supabase: SupabaseDouble) -> None:
    """Too many attempts and outages are waited for."""
    answers = iter([error(429, **{"Retry-After": "1"})(), error(503)()])
    supabase.intercept = failing(2, lambda: next(answers), path="/functions/")
    ledger = supabase.ledger_of(supabase.exchange.grant(CLAIMS))
    started = time.monotonic()
    assert ledger.call("ping")
    assert time.monotonic() - started >= 1
    ledger.close()


def test_an_early_replacement_that_fails_goes_unnoticed() -> None:
    """While the old token lasts it is used, and the exchange is not asked at every call."""
    tokens = iter([AccessToken("old", 30.0, time.monotonic() - 28, time.time() - 28)])
    fetched = []

    def fetch() -> AccessToken:
        fetched.append(1)
        if (token := next(tokens, None)) is None:
            raise AccessUnavailable("away")
        return token

    access = AccessTokens(fetch)
    assert [access.bearer() for _ in range(10)] == ["old"] * 10
    assert len(fetched) == 2


def test_one_failure_is_that_of_all_who_wait_for_it() -> None:
    """Sixteen threads behind a dead exchange wait for one attempt, not for sixteen."""
    gate, fetched = threading.Event(), []

    def fetch() -> AccessToken:
        fetched.append(1)
        gate.wait(5)
        raise AccessUnavailable("away")

    access = AccessTokens(fetch)
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(access.bearer) for _ in range(16)]
        deadline = time.monotonic() + 5
        while not all(future.running() for future in waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # Until the last of them has reached the lock.
        gate.set()
        assert all(isinstance(future.exception(), AccessUnavailable) for future in waiting)
    assert len(fetched) == 1


def test_forged_access_tokens_are_refused(supabase: SupabaseDouble, tmp_path: Path) -> None:
    """No key, another one, a key of another issuer, another algorithm, audience or time."""
    key, foreign = supabase.exchange_key, SigningKey.create(tmp_path / "foreign.jwk")
    good = {**CLAIMS, "iss": supabase.exchange_issuer}
    public = key.jwks()["keys"][0]["x"]
    hs256 = jwt.encode({**good, "exp": time.time() + 99}, public, algorithm="HS256", headers={"kid": key.kid})
    forged = [
        jwt.encode(good, "", algorithm="none", headers={"kid": key.kid}),
        hs256,
        foreign.sign(good),
        key.sign({**good, "iss": f"{supabase.url}/auth/v1"}),
        key.sign({**good, "aud": "anon"}),
        key.sign({**good, "exp": int(time.time()) - 31}),
        key.sign(good)[:-4] + "AAAA",
    ]

    def status(token: str) -> int:
        headers = {"apikey": supabase.key, "Authorization": f"Bearer {token}"}
        return httpx.post(f"{supabase.url}/rest/v1/rpc/ping", headers=headers, json={}).status_code

    assert status(key.sign(good)) == 200
    assert [status(token) for token in forged] == [401] * len(forged)
    assert status(supabase.key) == 401  # `anon` may call nothing.


# People ------------------------------------------------------------------------------------------


def test_a_person_signs_up_and_makes_an_organization(
    supabase: SupabaseDouble, auth: SupabaseAuth, tmp_path: Path
) -> None:
    """The session's token names no organization: a header does, and membership decides."""
    session = auth.sign_up("ada@example.org", PASSWORD)
    assert session is not None
    file = SessionFile(tmp_path / "session.json")
    file.save(session)
    assert file.load() == session
    access, organization = AccessTokens(SessionRefresh(auth, file)), str(uuid.uuid4())
    own = SupabaseLedger(supabase.url, supabase.key, access=access, organization_id=organization)
    own.call("create_organization", organization_id=organization, name="ada's", email=session.email)
    answer = own.call("whoami")[0]
    assert (answer["user_id"], answer["organization_id"]) == (session.user_id, organization)
    assert (answer["role"], answer["secret_storage"]) == ("admin", "vault")
    local = SupabaseLedger(supabase.url, supabase.key, access=access, organization_id=LOCAL_ORGANIZATION_ID)
    with pytest.raises(AuthenticationError, match="whoami"):
        local.call("whoami")
    for opened in (own, local):
        opened.close()


def test_sessions_are_refreshed_by_one_of_several_processes(
    supabase: SupabaseDouble, auth: SupabaseAuth, tmp_path: Path
) -> None:
    """A refresh token that is used twice would end the session for all of them."""
    supabase.auth.session_seconds = 1
    auth.sign_up("ada@example.org", PASSWORD)
    file = SessionFile(tmp_path / "session.json")
    file.save(auth.sign_in("ada@example.org", PASSWORD))
    refreshes = [SessionRefresh(auth, SessionFile(tmp_path / "session.json")) for _ in range(4)]
    supabase.auth.session_seconds = 3600
    deadline = time.monotonic() + 5
    while (session := file.load()) and session.expires_at > time.time() and time.monotonic() < deadline:
        time.sleep(0.05)
    with ThreadPoolExecutor(4) as pool:
        tokens = list(pool.map(lambda refresh: refresh().value, refreshes))
    stored = file.load()
    assert stored is not None
    assert set(tokens) == {stored.access_token}
    assert refreshes[0]().value not in tokens
    assert (tmp_path / "session.json").stat().st_mode & 0o077 == 0


def test_a_session_ends_with_sign_out(auth: SupabaseAuth, tmp_path: Path) -> None:
    """Its refresh token is worth nothing then; a second sign-out says nothing."""
    auth.sign_up("ada@example.org", PASSWORD)
    session = auth.sign_in("ada@example.org", PASSWORD)
    other = auth.sign_in("ada@example.org", PASSWORD)
    auth.sign_out(session)
    auth.sign_out(session)
    with pytest.raises(AuthenticationError, match="ow login"):
        auth.refresh(session.refresh_token)
    assert auth.refresh(other.refresh_token).user_id == session.user_id


def test_a_rotated_refresh_token_is_good_for_seconds_only(auth: SupabaseAuth) -> None:
    """The answer to the first refresh may have been lost: the same one is given again."""
    session = auth.sign_up("ada@example.org", PASSWORD)
    assert session is not None
    first, second = auth.refresh(session.refresh_token), auth.refresh(session.refresh_token)
    assert first.refresh_token == second.refresh_token != session.refresh_token


@pytest.mark.parametrize(
    ("email", "password", "kind"),
    [
        ("ada@example.org", "wrong", AuthenticationError),
        ("nobody@example.org", PASSWORD, AuthenticationError),
    ],
)
def test_wrong_credentials(
    auth: SupabaseAuth, email: str, password: str, kind: type[OpenWeightsError]
) -> None:
    """Unknown people and wrong passwords get the same answer."""
    auth.sign_up("ada@example.org", PASSWORD)
    with pytest.raises(kind, match="Invalid login credentials"):
        auth.sign_in(email, password)


def test_accounts_that_cannot_be(auth: SupabaseAuth) -> None:
    """A weak password, no address, an address that is taken."""
    auth.sign_up("ada@example.org", PASSWORD)
    for email, password in (("b@example.org", "short"), ("b", PASSWORD), ("ada@example.org", PASSWORD)):
        with pytest.raises(InvalidRequestError, match="Cannot sign up"):
            auth.sign_up(email, password)


def test_auth_that_does_not_answer(supabase: SupabaseDouble, auth: SupabaseAuth) -> None:
    """An outage is no wrong password."""
    supabase.intercept = failing(1, lambda: Response("bad gateway", 502), path="/auth/")
    with pytest.raises(LedgerUnavailable, match="sign in"):
        auth.sign_in("ada@example.org", PASSWORD)


def test_nobody_is_signed_in(auth: SupabaseAuth, tmp_path: Path) -> None:
    """No file, or a damaged one, is an error that says what to do and quotes nothing."""
    file = SessionFile(tmp_path / "session.json")
    with pytest.raises(AuthenticationError, match="ow login"):
        SessionRefresh(auth, file)()
    (tmp_path / "session.json").write_text('{"refresh_token": "secret"}')
    with pytest.raises(AuthenticationError, match="ow login") as caught:
        file.load()
    assert caught.value.__cause__ is None
    assert "secret" not in repr(Session("u", "e", "secret", "secret", 0))
