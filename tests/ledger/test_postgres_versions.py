"""The ledger on every installed major version of PostgreSQL, and under both kinds of default grants."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql

from openweights_prefect import bundle
from openweights_prefect.errors import AuthenticationError, PermissionDeniedError
from openweights_prefect.ledger import embedded, migrator
from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.identity import LocalIdentity, hash_secret
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from openweights_prefect.stack.databases import create_organization
from tests.callers import Callers, bootstrap_hash
from tests.postgres_versions import MAJORS, binaries_of

POD: dict[str, Any] = {
    "docker_image": "openweights/test:latest",
    "hardware": "1x L4",
    "gpu_type": "NVIDIA L4",
    "gpu_count": 1,
    "vram_gb": 19,
    "cloud": "SECURE",
    "price_per_hour": 0.4,
}
JOB = {
    "id": "probe-1",
    "type": "probe",
    "docker_image": POD["docker_image"],
    "entrypoint": "true",
    "files": [],
}
# What projects of Supabase that were made before 2026 give to everything new in `public`.
GENEROUS = """
    alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
    alter default privileges in schema public grant all on functions to anon, authenticated, service_role;
    alter default privileges in schema public grant all on sequences to anon, authenticated, service_role
"""
API_ROLES = ("anon", "authenticated", "service_role", "ow_worker", "ow_pod")


class Installation(NamedTuple):
    """A migrated ledger: the superuser's URL, and the one of `authenticator`."""

    owner_url: str
    url: str


@pytest.fixture(scope="module", params=MAJORS, ids=lambda major: f"PostgreSQL {major}")
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedPostgres]:
    binaries = binaries_of(request.param)
    folder = Path(tempfile.mkdtemp(prefix="ow-test-pg-"))
    folder.chmod(0o755)
    try:
        yield embedded.start(folder / "postgres", fsync=False, binaries=binaries)
    finally:
        embedded.remove(folder / "postgres")
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["new", "old"], ids=lambda kind: f"{kind} grants")
def installation(server: EmbeddedPostgres, request: pytest.FixtureRequest) -> Installation:
    owner_url = server.url(database=f"{request.param}_grants")
    migrator.ensure_database(server.url(database="postgres"), f"{request.param}_grants")
    if request.param == "old":
        with psycopg.connect(owner_url, autocommit=True) as connection:
            connection.execute((bundle.migrations().parent / "shim.sql").read_text(encoding="utf-8"))
            connection.execute(GENEROUS)
    migrator.migrate(owner_url)
    url = server.url(database=f"{request.param}_grants", user="authenticator")
    create_organization(url, LOCAL_ORGANIZATION_ID)
    return Installation(owner_url, url)


@pytest.fixture
def callers(installation: Installation) -> Iterator[Callers]:
    opened = Callers(installation.url)
    yield opened
    opened.close()


def rows(url: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query, values).fetchall()


def test_a_job_from_submit_to_finish(callers: Callers) -> None:
    """Through every caller: person, control plane, exchange and pod."""
    job_id, worker_id, boot = f"probe-{uuid.uuid4()}", f"pod-{uuid.uuid4()}"[:40], str(uuid.uuid4())
    run = str(uuid.uuid4())
    assert callers.call("submit_job", job={**JOB, "id": job_id})[0]["outcome"] == "new"
    recorded = callers.call("record_flow_run", for_job=job_id, for_attempt=1, flow_run=run)
    assert recorded[0]["outcome"] == "recorded"
    bought = callers.call(
        "intend_pod",
        pod={"id": worker_id, **POD},
        bootstrap_hash=bootstrap_hash(worker_id),
        ttl_seconds=3600,
        max_pods=8,
    )
    assert bought[0]["outcome"] == "intended", bought
    lease: dict[str, Any] = {"for_worker": worker_id, "as_boot": boot, "lease_seconds": 60, "models": []}
    assert callers.call("register_pod", **lease)[0]["outcome"] == "registered"
    assert callers.call("renew_lease", **lease)[0]["next_run"] == run
    opened = callers.call("open_run", for_run=run, for_worker=worker_id, as_boot=boot)
    assert opened[0]["outcome"] == "opened"
    pod = callers.pod(worker_id)
    batch = [{"data": {"loss": 1.5}}, {"data": {"loss": 0.5}}]
    stored = pod.call("append_events", for_run=run, as_boot=boot, first_sequence=0, batch=batch)
    assert stored[0] == {"outcome": "stored", "next_sequence": 2}
    pod.call("append_log", for_run=run, as_boot=boot, from_offset=0, to_offset=5, piece="hello")
    finished = pod.call("finish_run", for_run=run, as_boot=boot, result="completed")
    assert finished[0]["job"]["status"] == "completed"
    events = callers.call("list_events", for_run=run)
    assert [event["data"]["loss"] for event in events] == [1.5, 0.5]
    callers.call("end_pod", for_worker=worker_id, why="over")
    late = pod.call("append_log", for_run=run, as_boot=boot, from_offset=5, to_offset=6, piece="!")
    assert late[0]["outcome"] == "stale"
    with pytest.raises(AuthenticationError):
        pod.call("whoami")


def test_a_flow_of_the_user_is_adopted(callers: Callers) -> None:
    run, job_id = str(uuid.uuid4()), f"flow-{uuid.uuid4()}"
    adopt: dict[str, Any] = {
        "job": {**JOB, "id": job_id, "entrypoint": None},
        "flow_run": run,
        "created": "2026-01-01T00:00:00Z",
    }
    for _ in range(2):
        callers.call("adopt_flow_run", **adopt)
    assert [row["id"] for row in callers.call("list_runs", for_job=job_id)] == [run]


def test_tokens_and_secrets(callers: Callers) -> None:
    """A token works until it is revoked; a secret is written, named and never shown."""
    hashed = hash_secret(f"ow_{uuid.uuid4()}")
    made = callers.call("create_token", token_name="ci", hash=hashed, prefix="ow_abcd")[0]["token"]
    claims = callers.service.call("exchange_token", hash=hashed)[0]["claims"]
    bearer = callers.open_as(claims)
    try:
        assert bearer.call("whoami")[0]["token_id"] == made["id"]
        bearer.call("set_secret", secret_name="HF_TOKEN", secret_value="sealed:v1:canary")
        assert [row["name"] for row in bearer.call("list_secrets")] == ["HF_TOKEN"]
        with pytest.raises(PermissionDeniedError):
            callers.open_as({**claims, "role": "ow_worker"}).call("read_secret", secret_name="HF_TOKEN")
        callers.call("revoke_token", token_id=made["id"])
        with pytest.raises(AuthenticationError):
            bearer.call("whoami")
    finally:
        bearer.close()
    assert callers.service.call("exchange_token", hash=hashed) == [{"outcome": "refused"}]


def test_nobody_means_nothing(installation: Installation) -> None:
    """`anon` has no right on any table, view, sequence or function of ours, whatever the defaults were."""
    objects = """
        select c.oid::regclass::text from pg_class c
        where c.relnamespace in ('ledger'::regnamespace, 'private'::regnamespace, 'public'::regnamespace)
          and case when c.relkind = 'S' then has_sequence_privilege('anon', c.oid, 'usage, select, update')
                   when c.relkind in ('r', 'v', 'm', 'p') then has_any_column_privilege('anon', c.oid, %s)
                        or has_table_privilege('anon', c.oid, 'delete, truncate, trigger') end
    """
    functions = """
        select p.oid::regprocedure::text from pg_proc p
        where p.pronamespace in ('ledger'::regnamespace, 'private'::regnamespace, 'public'::regnamespace)
          and has_function_privilege('anon', p.oid, 'execute')
    """
    assert rows(installation.owner_url, objects, "select, insert, update, references") == []
    assert rows(installation.owner_url, functions) == []


def test_nobody_calls_nothing(installation: Installation) -> None:
    """The same from outside: each function that the API exposes is refused, each table is out of sight."""
    query = "select proname, pronargs from pg_proc where pronamespace = 'public'::regnamespace"
    functions = rows(installation.owner_url, query)
    tables = rows(installation.owner_url, "select tablename from pg_tables where schemaname = 'ledger'")
    assert len(functions) > 40
    calls = [call_with_nulls(name, count) for name, count in functions]
    calls += [sql.SQL("select from ledger.{}").format(sql.Identifier(table)) for (table,) in tables]
    with psycopg.connect(installation.url, autocommit=True) as connection:
        connection.execute("set role anon")
        for call in calls:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(call)


def call_with_nulls(function: str, count: int) -> sql.Composed:
    arguments = sql.SQL(", ").join([sql.NULL] * count)
    return sql.SQL("select * from public.{}({})").format(sql.Identifier(function), arguments)


def test_the_service_role_only_exchanges(installation: Installation) -> None:
    """Of the functions that the API exposes; it is the key that the edge function holds."""
    query = """
        select p.proname from pg_proc p where p.pronamespace = 'public'::regnamespace
          and has_function_privilege('service_role', p.oid, 'execute')
    """
    assert {name for (name,) in rows(installation.owner_url, query)} == {"exchange_token", "redeem_bootstrap"}


def test_grants_do_not_depend_on_the_defaults(server: EmbeddedPostgres, installation: Installation) -> None:
    """Both kinds of installation end with the same rights, to the letter."""
    query = """
        select p.oid::regprocedure::text, r.rolname from pg_proc p, pg_roles r
        where p.pronamespace in ('private'::regnamespace, 'public'::regnamespace) and r.rolname = any (%s)
          and has_function_privilege(r.rolname, p.oid, 'execute')
        union all
        select c.oid::regclass::text || ' ' || v, r.rolname from pg_class c, pg_roles r,
            unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger']) v
        where c.relnamespace in ('ledger'::regnamespace, 'private'::regnamespace) and c.relkind = 'r'
          and r.rolname = any (%s) and has_table_privilege(r.rolname, c.oid, v)
        order by 1, 2
    """
    fresh = f"fresh_{uuid.uuid4().hex[:8]}"
    migrator.ensure_database(server.url(database="postgres"), fresh)
    migrator.migrate(server.url(database=fresh))
    roles = list(API_ROLES)
    mine = rows(installation.owner_url, query, roles, roles)
    assert mine == rows(server.url(database=fresh), query, roles, roles)
    assert mine


def test_a_stranger_to_every_organization(callers: Callers) -> None:
    """A valid person who is no member sees nothing and learns nothing."""
    claims = LocalIdentity(LOCAL_ORGANIZATION_ID).claims()
    stranger = callers.open_as({**claims, "sub": str(uuid.uuid4())})
    try:
        with pytest.raises(AuthenticationError):
            stranger.call("whoami")
        assert stranger.call("list_organizations") == []
    finally:
        stranger.close()
