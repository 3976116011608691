"""Every function of the ledger against everybody who may come, checked against the database's catalogue."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest

from openweights_prefect.ledger.embedded import EmbeddedPostgres
from tests.attacks.functions import FUNCTIONS, call_of, may_call
from tests.attacks.world import MARK, Attempt, World, build

ROLES = {"p": "authenticated", "a": "authenticated", "w": "ow_worker", "h": "ow_pod", "s": "service_role"}
OURS_TO_CALL = "select proname from pg_proc where pronamespace = 'public'::regnamespace"
API_ROLES = ("anon", "authenticated", "ow_worker", "ow_pod", "service_role")

# Functions that run with their owner's rights, which row-level security does not bind. Each was read for what
# it lets its caller do; a new one needs a line here.
TABLES = """
    select c.relname, c.relrowsecurity and c.relforcerowsecurity,
           exists (select from pg_attribute a
                   where a.attrelid = c.oid and a.attname = 'organization_id' and a.attnotnull)
    from pg_class c where c.relnamespace = 'ledger'::regnamespace and c.relkind = 'r'
"""
GRANTS = """
    select table_name, grantee, lower(privilege_type) from information_schema.role_table_grants
    where table_schema in ('ledger', 'private')
      and grantee in ('anon', 'authenticated', 'ow_worker', 'ow_pod', 'PUBLIC')
"""
POLICIES = """
    select tablename, role::text, lower(cmd) from pg_policies, unnest(roles) as role where schemaname = 'ledger'
"""

PRIVATE_DEFINERS = set("""
    audit is_spent link_run_file lock_file missing_files missing_secrets my_orgs my_role over_budget pod_files pod_jobs pod_run pod_runs
    retire_failing_pod token_names token_rest token_spent track_interval
""".split())  # fmt: skip
PUBLIC_DEFINERS = set("""
    accept_invitation create_invitation create_organization create_token delete_secret extend_pod job_secrets list_audit
    list_invitations list_organizations list_sealed list_secrets list_tokens read_secret remove_member
    find_jobs open_run rename_organization renew_lease replace_sealed revoke_token set_budget set_member_role set_secret set_token_limit whoami
""".split())  # fmt: skip


@pytest.fixture(scope="module")
def world(postgres: EmbeddedPostgres) -> Iterator[World]:
    """Both organizations; every attempt is rolled back, so the module shares them."""
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        connection.execute("create database attacked template ledger_template")
        try:
            yield build(postgres.url(database="attacked", user="authenticator"))
        finally:
            connection.execute("drop database attacked with (force)")


@pytest.fixture(scope="module")
def connection(world: World) -> Iterator[psycopg.Connection]:
    with psycopg.connect(world.admin_url) as opened:
        yield opened


def test_every_function_has_a_row(connection: psycopg.Connection) -> None:
    """A new function must say who may call it."""
    assert {name for (name,) in connection.execute(OURS_TO_CALL)} == set(FUNCTIONS)


def test_roles_may_execute_what_the_table_says(connection: psycopg.Connection) -> None:
    for role in API_ROLES:
        query = OURS_TO_CALL + " and has_function_privilege(%s, oid, 'execute')"
        allowed = {name for (name,) in connection.execute(query, [role])}
        wanted = {
            name for name, function in FUNCTIONS.items() if role in {ROLES[kind] for kind in function.who}
        }
        assert allowed == wanted, role


def test_definer_functions_are_known_and_safe(connection: psycopg.Connection) -> None:
    """Only the allow-list runs with its owner's rights, and every function of ours has an empty search path."""
    query = """
        select n.nspname, p.proname, p.prosecdef, p.proconfig
        from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname in ('public', 'private', 'ledger')
    """
    definers: dict[str, set[str]] = {"public": set(), "private": set()}
    for schema, name, definer, config in connection.execute(query):
        assert 'search_path=""' in (config or []), f"{schema}.{name} has {config}"
        if definer:
            definers[schema].add(name)
    assert definers == {"public": PUBLIC_DEFINERS, "private": PRIVATE_DEFINERS}


def test_tables_are_closed(connection: psycopg.Connection) -> None:
    """Forced row-level security, an organization in every row, a policy for exactly what is granted."""
    tables = connection.execute(TABLES).fetchall()
    assert len(tables) >= 16
    for name, closed, has_organization in tables:
        assert closed, name
        assert has_organization or name == "organizations", name
    policies = connection.execute(POLICIES).fetchall()
    assert sorted(policies) == sorted(connection.execute(GRANTS).fetchall())
    assert len(policies) == len(set(policies)), "one policy a table, verb and role"


def test_new_rows_are_checked(connection: psycopg.Connection) -> None:
    """No row is made for, or moves into, another organization."""
    query = """
        select tablename, policyname from pg_policies
        where schemaname = 'ledger' and cmd in ('UPDATE', 'INSERT') and coalesce(with_check, '') not like '%my_orgs%'
    """
    assert connection.execute(query).fetchall() == []


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_nobody_gets_nothing(world: World, connection: psycopg.Connection, function: str) -> None:
    """Revoked, expired, for another audience, without an organization: no rows, no change, whatever is asked."""
    arguments = call_of(world, function)
    for caller, claims in world.outsiders().items():
        if FUNCTIONS[function].personal and caller == "nobody:no organization":
            continue  # a person who has signed in and belongs to nothing yet
        attempt = Attempt(connection, claims, function, arguments)
        told = json.dumps(attempt.rows, default=str)
        assert not attempt.changed, (caller, told)
        assert MARK not in told, (caller, told)
        # Who speaks for nobody is told so; a pod that has ended is answered, and so learns that it has.
        told_so = attempt.refused or "pod" in caller or FUNCTIONS[function].who == "s"
        assert told_so, (caller, told, attempt.error)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_another_organization_gets_nothing(
    world: World, connection: psycopg.Connection, function: str
) -> None:
    """With our very ids, tokens of theirs read and change nothing of ours."""
    for caller, claims in world.strangers().items():
        attempt = Attempt(connection, claims, function, call_of(world, function))
        told = json.dumps(attempt.rows, default=str)
        assert not attempt.changed, (caller, told)
        about_ours = told.replace(json.dumps(call_of(world, function), default=str), "")
        assert MARK not in _without_arguments(about_ours, call_of(world, function)), (caller, told)


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_insiders_may_do_what_the_table_says(
    world: World, connection: psycopg.Connection, function: str
) -> None:
    """Who may call it is not refused, and has an effect where the function writes; everybody else is refused."""
    for caller, claims in world.insiders().items():
        attempt = Attempt(connection, claims, function, call_of(world, function))
        if not may_call(caller, function):
            assert attempt.refused, (caller, attempt.rows, attempt.error)
            assert not attempt.changed, caller
        elif caller == "idle_pod":
            # It may call what pods call, about itself: the other pod's run and row are closed to it.
            assert not attempt.changed or function == "abandon_run", (caller, attempt.rows)
            assert MARK not in json.dumps(attempt.rows, default=str) or function in ("whoami", "ping"), (
                attempt.rows
            )
        elif not (FUNCTIONS[function].personal and "token" in caller):
            assert not attempt.refused, (caller, attempt.error)
            assert attempt.error is None, (caller, attempt.error)
            if FUNCTIONS[function].writes and caller in ("admin", "worker", "pod"):
                assert attempt.changed, (caller, attempt.rows)


def test_anon_executes_nothing(world: World, connection: psycopg.Connection) -> None:
    for function in FUNCTIONS:
        attempt = Attempt(
            connection, {**world.callers["admin"], "role": "anon"}, function, call_of(world, function)
        )
        assert attempt.refused, function


def _without_arguments(text: str, arguments: dict[str, object]) -> str:
    """An answer may repeat what the caller said itself."""
    for value in arguments.values():
        text = text.replace(str(value), "")
    return text
