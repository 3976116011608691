"""Every function of the ledger: who may call it, and how a call for the first organization looks.

A function of the database that has no row here fails the tests.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openweights_prefect.ledger.identity import hash_secret
from tests.attacks.world import COLLEAGUE, IMAGE, POD, World

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Function:
    """`who`: p person or token, a admins alone, w control plane, h the pod that holds the run, s the token exchange."""

    who: str
    arguments: Callable[[dict[str, Any]], Arguments] = lambda ids: {}
    writes: bool = False
    personal: bool = False
    """About the person, not an organization: whoever has signed in may call it."""


def _job(ids: dict[str, Any], job_id: str) -> Arguments:
    return {
        "job": {
            "id": job_id,
            "type": "probe",
            "docker_image": IMAGE,
            "entrypoint": "true",
            "files": [ids["file"]],
        }
    }


def _run(ids: dict[str, Any]) -> Arguments:
    return {"for_run": ids["flow_run"], "as_boot": ids["boot"]}


def _pod(ids: dict[str, Any], pod: str = "pod-1") -> Arguments:
    return {"for_worker": ids[pod], "as_boot": ids[f"boot of {pod}"]}


def _token(name: str) -> Arguments:
    return {"token_name": name, "hash": hash_secret(name), "prefix": "ow_new"}


EVENT = {"at": 1.0, "data": {"intruder": True}, "file": None}
FUNCTIONS: dict[str, Function] = {
    "abandon_run": Function("wh", lambda i: {"for_run": i["waiting_run"], "why": "x"}, writes=True),
    "accept_invitation": Function("p", lambda i: {"code_hash": hash_secret("owi_guess")}, personal=True),
    "adopt_flow_run": Function("w", lambda i: {**_job(i, "adopted"), "flow_run": uuid.uuid4(), "created": "2026-01-01T00:00:00Z"}, writes=True),
    "append_events": Function("ph", lambda i: {**_run(i), "first_sequence": 1, "batch": [EVENT]}, writes=True),
    "append_log": Function("ph", lambda i: {**_run(i), "from_offset": 14, "to_offset": 15, "piece": "x"}, writes=True),
    "cancel_job": Function("pw", lambda i: {"job_id": i["run"]}, writes=True),
    "clear_refusal": Function("w", lambda i: {"subject": "account"}, writes=True),
    "control_snapshot": Function("w"),
    "create_invitation": Function("a", lambda i: {"code_hash": hash_secret("owi_new")}, writes=True),
    "create_organization": Function("p", lambda i: {"organization_id": uuid.uuid4(), "name": "new"}, personal=True),
    "create_token": Function("p", lambda i: _token("new"), writes=True),
    "delete_file": Function("p", lambda i: {"file_id": i["file"]}),
    "delete_secret": Function("a", lambda i: {"secret_name": "HF_TOKEN"}, writes=True),
    "end_pod": Function("w", lambda i: {"for_worker": i["pod-2"]}, writes=True),
    "exchange_token": Function("s", lambda i: {"hash": hash_secret("guess"), "source": "x"}),
    "expire_events": Function("w", lambda i: {"older_than_days": 1}),
    "expire_leases": Function("w"),
    "expire_scripts": Function("w"),
    "explain_job": Function("p", lambda i: {"job_id": i["wait"]}),
    "extend_pod": Function("ph", lambda i: {"for_worker": i["pod-1"], "deadline_seconds": 7200}, writes=True),
    "fail_job": Function("w", lambda i: {"for_job": i["wait"], "why": "x"}, writes=True),
    "find_jobs": Function("p", lambda i: {"wanted": {"tag": "canary-of-ours"}}),
    "finish_run": Function("ph", lambda i: {**_run(i), "result": "completed"}, writes=True),
    "get_budget": Function("pw"),
    "get_files": Function("pwh", lambda i: {"ids": [i["file"]]}),
    "get_job": Function("pw", lambda i: {"job_id": i["run"]}),
    "get_run": Function("pw", lambda i: {"run_id": i["flow_run"]}),
    "hint_runs": Function("w", lambda i: {"hints": {str(i["waiting_run"]): i["pod-2"]}}, writes=True),
    "intend_pod": Function("w", lambda i: {"pod": {"id": "pod-new", **POD}, "bootstrap_hash": hash_secret("owb_new"), "ttl_seconds": 60, "max_pods": 9}, writes=True),
    "job_cost": Function("p", lambda i: {"job_id": i["run"]}),
    "job_secrets": Function("h", _run, writes=True),
    "known_pods": Function("w", lambda i: {"worker_ids": [i["pod-1"]]}),
    "known_runs": Function("w", lambda i: {"flow_runs": [i["flow_run"]]}),
    "latest_events": Function("ph", lambda i: {"for_run": i["flow_run"]}),
    "list_audit": Function("a"),
    "list_costs": Function("p", lambda i: {"group_by": "token"}),
    "list_events": Function("pwh", lambda i: {"for_run": i["flow_run"]}),
    "list_files": Function("p"),
    "list_invitations": Function("a"),
    "list_jobs": Function("pw"),
    "list_members": Function("p"),
    "list_organizations": Function("p", personal=True),
    "list_runs": Function("pw"),
    "list_sealed": Function("a"),
    "list_secrets": Function("p"),
    "list_tokens": Function("p"),
    "list_workers": Function("pw"),
    "lose_pod": Function("w", lambda i: {"for_worker": i["pod-1"], "why": "x"}, writes=True),
    "mark_mirrored": Function("w", lambda i: {"run_ids": [i["waiting_run"]]}, writes=True),
    "note_refusal": Function("w", lambda i: {"subject": "account", "why": "x", "seconds": 9}, writes=True),
    "open_run": Function("h", lambda i: {"for_run": i["waiting_run"], **_pod(i)}),
    "open_script": Function("p", lambda i: {"for_job": "sjob-new", "for_run": uuid.uuid4(), "as_boot": uuid.uuid4(), "command": "x", "lease_seconds": 9}, writes=True),
    "ping": Function("pwh"),
    "pod_of_proxy": Function("w", lambda i: {"hash": hash_secret("proxy")}),
    "publish_catalogue": Function("w", lambda i: {"offers": [{"key": "x"}], "limits": {}}, writes=True),
    "read_log": Function("p", lambda i: {"for_run": i["flow_run"]}),
    "read_secret": Function("a", lambda i: {"secret_name": "HF_TOKEN"}, writes=True),
    "record_duplicate": Function("w", lambda i: {"for_worker": i["pod-1"], "provider_id": "twin", "price": 1, "seconds": 60}, writes=True),
    "record_flow_run": Function("w", lambda i: {"for_job": i["wait"], "for_attempt": 1, "flow_run": i["waiting_run"]}),
    "record_pod": Function("w", lambda i: {"for_worker": i["pod-2"], "provider_id": f"provider-{i['pod-2']}", "price": 9}, writes=True),
    "redeem_bootstrap": Function("s", lambda i: {"hash": hash_secret("guess"), "session_hash": hash_secret("mine")}),
    "register_file": Function("ph", lambda i: {"file": {"id": "result:file-000000000000", "purpose": "result", "filename": "x", "bytes": 1, "sha256": hash_secret("x")}}, writes=True),
    "register_pod": Function("h", lambda i: {"for_worker": i["pod-1"], "as_boot": uuid.uuid4(), "lease_seconds": 9, "models": []}, writes=True),
    "reject_pod": Function("h", lambda i: {"for_worker": i["pod-1"], "why": "x"}, writes=True),
    "release_pod": Function("h", lambda i: {**_pod(i), "why": "x"}),
    "remove_member": Function("a", lambda i: {"member": COLLEAGUE}, writes=True),
    "rename_organization": Function("a", lambda i: {"new_name": "x"}, writes=True),
    "renew_lease": Function("h", lambda i: {**_pod(i), "lease_seconds": 60, "models": []}, writes=True),
    "renew_script": Function("p", lambda i: {"for_run": i["script_run"], "as_boot": i["script_boot"], "lease_seconds": 9}, writes=True),
    "replace_sealed": Function("a", lambda i: {"secret_name": "HF_TOKEN", "old_value": "sealed:v1:canary-of-ours", "new_value": "sealed:v1:x"}, writes=True),
    "request_shutdown": Function("pw", lambda i: {"for_worker": i["pod-1"]}, writes=True),
    "restart_job": Function("pw", lambda i: {"job_id": i["done"]}, writes=True),
    "revoke_token": Function("p", lambda i: {"token_id": i["token user"]}, writes=True),
    "set_ceilings": Function("w", lambda i: {"ceilings": {str(i["waiting_run"]): 1.5}}, writes=True),
    "set_budget": Function("a", lambda i: {"limit_usd": 1}, writes=True),
    "set_member_role": Function("a", lambda i: {"member": COLLEAGUE, "new_role": "admin"}, writes=True),
    "set_pending_reasons": Function("w", lambda i: {"reasons": {i["wait"]: "x"}}, writes=True),
    "set_secret": Function("p", lambda i: {"secret_name": "HF_TOKEN", "secret_value": "sealed:v1:x"}, writes=True),
    "set_token_limit": Function("a", lambda i: {"token_id": i["token user"], "spend_limit_usd": 1}, writes=True),
    "submit_job": Function("pw", lambda i: _job(i, "new"), writes=True),
    "whoami": Function("pwh"),
}  # fmt: skip

KINDS = {
    "admin": "pa", "admin_token": "pa", "member": "p", "token": "p", "worker": "w", "pod": "h", "idle_pod": "h",
}  # fmt: skip


def may_call(caller: str, function: str) -> bool:
    """Whether the table lets this kind of insider call the function at all."""
    return bool(set(KINDS[caller]) & set(FUNCTIONS[function].who))


def call_of(world: World, function: str) -> Arguments:
    """Arguments that are about the first organization's things."""
    return FUNCTIONS[function].arguments(world.ids)
