"""Two organizations with something of everything, and every kind of caller that could come to them."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from openweights_prefect.ledger.identity import LOCAL_USER_ID, hash_secret
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from openweights_prefect.stack.databases import create_organization
from tests.callers import Callers, bootstrap_hash

OURS, THEIRS = LOCAL_ORGANIZATION_ID, "00000000-0000-0000-0000-0000000000b0"
ADMIN, NOBODY = LOCAL_USER_ID, str(uuid.UUID(int=0xEE))
MEMBER, COLLEAGUE = str(uuid.UUID(int=0xA2)), str(uuid.UUID(int=0xA3))
MARK = "canary-of-ours"
IMAGE = "openweights/test:latest"
POD = {"docker_image": IMAGE, "hardware": "1x L4", "gpu_type": "NVIDIA L4", "gpu_count": 1, "vram_gb": 19,
       "cloud": "SECURE", "price_per_hour": 0.4}  # fmt: skip

Claims = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Ids of what the first organization has, and the claims of everybody."""

    admin_url: str
    ids: dict[str, Any]
    callers: dict[str, Claims]

    def outsiders(self) -> dict[str, Claims]:
        """Callers whose claims hold no longer, or never did."""
        return {name: claims for name, claims in self.callers.items() if name.startswith("nobody:")}

    def insiders(self) -> dict[str, Claims]:
        return {name: claims for name, claims in self.callers.items() if ":" not in name}

    def strangers(self) -> dict[str, Claims]:
        """Callers of the other organization."""
        return {name: claims for name, claims in self.callers.items() if name.startswith("other:")}


def build(url: str) -> World:
    """Fill a fresh ledger: `url` is the `authenticator`'s."""
    ours, ids = _furnish(Callers(url, OURS), MARK)
    create_organization(url, THEIRS)
    theirs, _ = _furnish(Callers(url, THEIRS), "theirs")
    person = {"role": "authenticated", "aud": "authenticated", "organization_id": OURS, "sub": ADMIN}
    callers: dict[str, Claims] = {
        "admin": person,
        "member": {**person, "sub": MEMBER},
        "admin_token": ours["admin"],
        "token": ours["user"],
        "worker": ours["worker"],
        "pod": ours["pod-1"],
        "idle_pod": ours["pod-2"],
        "other:admin": {**person, "organization_id": THEIRS},
        "other:token": theirs["user"],
        "other:worker": theirs["worker"],
        "other:pod": theirs["pod-1"],
        "nobody:no organization": {**person, "sub": NOBODY},
        "nobody:no claims": {"role": "authenticated"},
        "nobody:revoked": ours["revoked"],
        "nobody:expired token": ours["expired"],
        "nobody:expired claims": {**ours["admin"], "exp": int(time.time()) - 1},
        "nobody:wrong audience": {**person, "aud": "somewhere-else"},
        "nobody:a token with another role": {**ours["user"], "role": "ow_worker"},
        "nobody:a member as the control plane": {**person, "sub": MEMBER, "role": "ow_worker"},
        "nobody:another organization's token": {**theirs["admin"], "organization_id": OURS},
        "nobody:a pod with a wrong session": {**ours["pod-1"], "session": "0" * 64},
        "nobody:a pod of the other organization": {**theirs["pod-1"], "organization_id": OURS},
        "nobody:a pod that has ended": ours["pod-3"],
    }
    admin_url = url.replace("authenticator@", "postgres@")
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute("update ledger.api_tokens set expires_at = now() where name = 'expired'")
        row = [OURS, COLLEAGUE]
        connection.execute(
            "insert into ledger.members (organization_id, user_id, role) values (%s, %s, 'user')", row
        )
    return World(admin_url, ids, callers)


def _furnish(callers: Callers, mark: str) -> tuple[dict[str, Claims], dict[str, Any]]:
    """Jobs in every state, pods, files, events, logs, tokens, secrets; with `mark` in every text."""
    call = callers.call
    ids: dict[str, Any] = {"organization": callers.organization_id, "boot": uuid.uuid4()}
    file_id = f"conversations:file-{hash_secret(mark)[:12]}"
    call("register_file", file={"id": file_id, "purpose": "conversations", "filename": mark, "bytes": 1,
                                "sha256": hash_secret(mark)})  # fmt: skip
    call("set_secret", secret_name="HF_TOKEN", secret_value=f"sealed:v1:{mark}")
    for name in ("run", "wait", "done"):
        [answer] = call("submit_job", job=_job(f"{name}-{mark}", mark, file_id))
        assert answer["outcome"] == "new", answer
        ids[name] = f"{name}-{mark}"
    call("cancel_job", job_id=ids["done"])
    ids["flow_run"], ids["waiting_run"] = uuid.uuid4(), uuid.uuid4()
    call("record_flow_run", for_job=ids["run"], for_attempt=1, flow_run=ids["flow_run"])
    call("record_flow_run", for_job=ids["wait"], for_attempt=1, flow_run=ids["waiting_run"])
    for pod in ("pod-1", "pod-2", "pod-3"):
        name = f"{pod}-{mark}"
        ids[pod] = name
        token = bootstrap_hash(name)
        call("intend_pod", pod={"id": name, **POD}, bootstrap_hash=token, ttl_seconds=3600, max_pods=9)
        call("record_pod", for_worker=name, provider_id=f"provider-{name}", price=0.4)
        boot = ids["boot"] if pod == "pod-1" else uuid.uuid4()
        ids[f"boot of {pod}"] = boot
        call("register_pod", for_worker=name, as_boot=boot, lease_seconds=600, models=[mark])
    offer = {"key": "L4|1|SECURE", "hardware": mark}
    call("publish_catalogue", offers=[offer], limits={"max_workers": 8, "paused": mark})
    call("note_refusal", subject="account", why=mark, seconds=60)
    call("hint_runs", hints={str(ids["waiting_run"]): ids["pod-1"]})
    [answer] = call("open_run", for_run=ids["flow_run"], for_worker=ids["pod-1"], as_boot=ids["boot"])
    assert answer["outcome"] == "opened", answer
    event = {"at": time.time(), "data": {"said": mark}, "file": file_id}
    call("append_events", for_run=ids["flow_run"], as_boot=ids["boot"], first_sequence=0, batch=[event])
    call(
        "append_log",
        for_run=ids["flow_run"],
        as_boot=ids["boot"],
        from_offset=0,
        to_offset=len(mark),
        piece=mark,
    )
    ids["script_run"], ids["script_boot"] = uuid.uuid4(), uuid.uuid4()
    call("open_script", for_job=f"sjob-{mark}", for_run=ids["script_run"], as_boot=ids["script_boot"], command=mark,
         lease_seconds=60)  # fmt: skip
    call("set_budget", limit_usd=1000)
    code = hash_secret(f"owi_{mark}")
    call("create_invitation", code_hash=code, for_email=f"{mark}@example.org")
    ids["invitation"] = code
    claims = {
        name: _mint(callers, name, mark, ids) for name in ("user", "admin", "worker", "revoked", "expired")
    }
    call("revoke_token", token_id=ids["token revoked"])
    for pod in ("pod-1", "pod-2", "pod-3"):
        claims[pod] = _exchange(callers, hash_secret(f"owp_{ids[pod]}"))
    call("end_pod", for_worker=ids["pod-3"], why=mark)
    if callers.organization_id == OURS:
        member = {"role": "authenticated", "aud": "authenticated", "sub": MEMBER}
        callers.open_as(member).call("accept_invitation", code_hash=code, email=f"{mark}@example.org")
    ids["file"] = file_id
    callers.close()
    return claims, ids


def _job(job_id: str, mark: str, file_id: str) -> dict[str, Any]:
    return {
        "id": job_id, "type": "probe", "docker_image": IMAGE, "entrypoint": f"echo {mark}", "files": [file_id],
        "params": {"validated_params": {"tag": mark}}, "secrets": ["HF_TOKEN"], "env": {"MARK": mark},
    }  # fmt: skip


def _mint(callers: Callers, name: str, mark: str, ids: dict[str, Any]) -> Claims:
    token = f"ow_{name}-{mark}"
    role = name if name in ("user", "admin", "worker") else "user"
    [answer] = callers.call(
        "create_token", token_name=name, hash=hash_secret(token), prefix="ow_x", token_role=role
    )
    ids[f"token {name}"] = answer["token"]["id"]
    return _exchange(callers, hash_secret(token))


def _exchange(callers: Callers, token_hash: str) -> Claims:
    [answer] = callers.service.call("exchange_token", hash=token_hash, source="tests")
    return dict(answer["claims"])


class Attempt:
    """One call in a transaction that is rolled back: its rows or its error, and whether anything changed."""

    def __init__(
        self, connection: psycopg.Connection, claims: Claims, function: str, arguments: dict[str, Any]
    ) -> None:
        self.rows: list[Any] = []
        self.error: psycopg.Error | None = None
        role = claims["role"]
        with connection.transaction(force_rollback=True):
            before = snapshot(connection, OURS)
            try:
                with connection.transaction():
                    connection.execute(sql.SQL("set local role {}").format(sql.Identifier(role)))
                    connection.execute(
                        "select set_config('request.jwt.claims', %s, true)", [json.dumps(claims)]
                    )
                    self.rows = [
                        row[0]
                        for row in connection.execute(_statement(function, arguments), _adapt(arguments))
                    ]
            except psycopg.Error as exc:
                self.error = exc
            connection.execute("reset role")
            self.changed = snapshot(connection, OURS) != before

    @property
    def refused(self) -> bool:
        """Whether the caller was told that it may not: not authorized, or not identified."""
        return self.error is not None and self.error.sqlstate in ("28000", "42501")


def snapshot(connection: psycopg.Connection, organization_id: str) -> dict[str, str]:
    """A digest of every row of the organization, by table."""
    names = connection.execute(
        "select relname from pg_class where relnamespace = 'ledger'::regnamespace and relkind = 'r'"
    )
    digests = {}
    for (name,) in names.fetchall():
        column = "id" if name == "organizations" else "organization_id"
        query = sql.SQL(
            "select coalesce(md5(string_agg(t::text, '|' order by t::text)), '') from ledger.{} t where {} = %s"
        )
        [(digest,)] = connection.execute(
            query.format(sql.Identifier(name), sql.Identifier(column)), [organization_id]
        )
        digests[name] = digest
    return digests


def _statement(function: str, arguments: dict[str, Any]) -> sql.Composed:
    named = sql.SQL(", ").join(
        sql.SQL("{} => {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in arguments
    )
    return sql.SQL("select * from public.{}({})").format(sql.Identifier(function), named)


def _adapt(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: Jsonb(value)
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
        else value
        for name, value in arguments.items()
    }
