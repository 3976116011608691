"""Every list page of the ledger over large tables, that several organizations share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from figures import Figure, p50
from ledger_site import ORGANIZATIONS, LedgerSite

from openweights_prefect.ledger.identity import Role
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID

_REPEATS = 5
_PAGE = 100
_LONG_PAGE = 500  # What the SDK asks for when it reads all events.

_FILL = Path(__file__).with_suffix(".sql")
_TABLES = "files, worker, jobs, runs, events, log_chunks, members, api_tokens, audit_log, pod_intervals"

_LONG_RUN = f"00000000-0000-4000-8000-{1000:012x}"
_LONG_JOB = "job-1000"


@dataclass(frozen=True)
class Filled:
    """What the pages are asked for."""

    middle_job: str
    middle_event: int
    last_event: int
    middle_file: str


def fill(site: LedgerSite, *, jobs: int, events: int) -> Filled:
    """Make the tables, on the server; their statistics are fresh, as autovacuum would have them."""
    values = {
        "jobs": jobs,
        "events": events,
        "organizations": list(ORGANIZATIONS),
        "local": LOCAL_ORGANIZATION_ID,
    }
    with site.admin() as connection:
        with psycopg.ClientCursor(connection) as cursor:
            cursor.execute(_FILL.read_bytes(), values)
        for table in _TABLES.split(", "):
            connection.execute(f"vacuum analyze ledger.{table}".encode())
        row = connection.execute(
            "select min(id), max(id) from ledger.events where run_id = %s", (_LONG_RUN,)
        ).fetchone()
    assert row is not None
    middle = jobs // 2 - jobs // 2 % 10
    return Filled(f"job-{middle}", (row[0] + row[1]) // 2, row[1] - 10, f"p{middle % 5}:file-{middle}")


def time_pages(site: LedgerSite, filled: Filled, say: Callable[[str], None]) -> dict[str, Figure]:
    """Milliseconds of each page, its transport and its parsing included."""
    figures: dict[str, Figure] = {}
    roles: dict[Role, dict[str, Page]] = {"authenticated": _person(filled), "ow_worker": _control()}
    for role, pages in roles.items():
        ledger = site.ledger(role)
        for name, (function, arguments) in pages.items():
            rows = ledger.call(function, **arguments)
            seconds = []
            for _ in range(_REPEATS):
                started = time.perf_counter()
                ledger.call(function, **arguments)
                seconds.append(time.perf_counter() - started)
            figures[f"page_ms: {name}"] = round(1000 * p50(seconds), 1)
            say(f"{figures[f'page_ms: {name}']:8} ms  {len(rows):5} rows  {name}")
        ledger.close()
    slowest = max(figures, key=lambda name: float(figures[name]))
    return figures | {
        "slowest_page": slowest.removeprefix("page_ms: "),
        "slowest_page_p50_ms": figures[slowest],
    }


Page = tuple[str, dict[str, Any]]


def _person(filled: Filled) -> dict[str, Page]:
    return {**_jobs(filled), **_found(filled), **_runs(), **_events(filled), **_tenancy(), **_others(filled)}


def _jobs(filled: Filled) -> dict[str, Page]:
    filters: dict[str, dict[str, Any]] = {
        "all": {},
        "a common status": {"with_status": "completed"},
        "a rare status": {"with_status": "canceled"},
        "no such status": {"with_status": "in_progress"},
        "a common type": {"with_type": "fine_tuning"},
        "a rare type": {"with_type": "evaluation"},
        "no such type": {"with_type": "nothing"},
        "status and type": {"with_status": "pending", "with_type": "inference"},
        "a status and a type that exclude each other": {"with_status": "canceled", "with_type": "nothing"},
        "from the middle": {"after_id": filled.middle_job},
        "a rare status from the middle": {"with_status": "failed", "after_id": filled.middle_job},
    }
    pages: dict[str, Page] = {
        f"list_jobs, {name}": ("list_jobs", {**given, "max_rows": _PAGE}) for name, given in filters.items()
    }
    return pages


def _found(filled: Filled) -> dict[str, Page]:
    wanted: dict[str, dict[str, Any]] = {
        "one job": {"seed": 4321},
        "a value that nobody has": {"seed": -1},
        "a key that nobody has": {"nothing": 1},
        "one in 500, nested": {"group": "sweep-3"},
        "one in 50, twice nested": {"name": "user-3"},
        "an object": {"author": {"name": "user-3"}},
        "one in 20": {"model": "org/model-3"},
        "one in 3": {"epochs": 2},
        "every job": {"loss": "sft"},
        "two common values": {"epochs": 2, "learning_rate": 3e-5},
        "two common values that exclude each other": {"epochs": 7, "loss": "sft"},
    }
    return {
        **{
            f"find_jobs, {name}": ("find_jobs", {"wanted": given, "max_rows": _PAGE})
            for name, given in wanted.items()
        },
        "find_jobs, one in 20 from the middle": (
            "find_jobs",
            {"wanted": {"model": "org/model-3"}, "max_rows": _PAGE, "after_id": filled.middle_job},
        ),
    }


def _runs() -> dict[str, Page]:
    filters: dict[str, dict[str, Any]] = {
        "all": {},
        "of a job": {"for_job": _LONG_JOB},
        "of a pod": {"for_worker": "page-101"},
        "a common status": {"with_status": "completed"},
        "a rare status": {"with_status": "failed"},
        "no such status": {"with_status": "lost"},
        "a pod and a status": {"for_worker": "page-101", "with_status": "failed"},
        "from the middle": {"after_id": _LONG_RUN},
    }
    return {
        f"list_runs, {name}": ("list_runs", {**given, "max_rows": _PAGE}) for name, given in filters.items()
    }


def _events(filled: Filled) -> dict[str, Page]:
    starts = {"first": 0, "middle": filled.middle_event, "last": filled.last_event}
    scopes: dict[str, dict[str, Any]] = {"a run": {"for_run": _LONG_RUN}, "a job": {"for_job": _LONG_JOB}}
    pages: dict[str, Page] = {}
    for scope, given in scopes.items():
        for place, after in starts.items():
            pages[f"list_events of {scope}, {place} page"] = (
                "list_events",
                {**given, "after_id": after, "max_rows": _LONG_PAGE},
            )
        pages[f"latest_events of {scope}, all fields"] = ("latest_events", given)
        pages[f"latest_events of {scope}, two fields"] = (
            "latest_events",
            {**given, "fields": ["loss", "step"]},
        )
        pages[f"latest_events of {scope}, a field that nobody logged"] = (
            "latest_events",
            {**given, "fields": ["x"]},
        )
    pages["read_log, first page"] = ("read_log", {"for_run": _LONG_RUN})
    pages["read_log, last page"] = ("read_log", {"for_run": _LONG_RUN, "after_offset": 3_900_000})
    return pages


def _tenancy() -> dict[str, Page]:
    names = (
        "list_tokens",
        "list_members",
        "list_audit",
        "list_invitations",
        "list_secrets",
        "list_organizations",
    )
    paged = ("list_tokens", "list_members", "list_audit", "list_invitations")
    return {name: (name, {"max_rows": _PAGE} if name in paged else {}) for name in names}


def _others(filled: Filled) -> dict[str, Page]:
    return {
        "list_files": ("list_files", {"max_rows": _PAGE}),
        "list_files, a purpose": ("list_files", {"for_purpose": "p3", "max_rows": _PAGE}),
        "list_files, no such purpose": ("list_files", {"for_purpose": "nothing", "max_rows": _PAGE}),
        "list_files, from the middle": ("list_files", {"max_rows": _PAGE, "after_id": filled.middle_file}),
        "list_workers": ("list_workers", {"max_rows": _PAGE}),
        "list_workers, alive": ("list_workers", {"with_status": ["active", "busy"], "max_rows": _PAGE}),
        "get_job": ("get_job", {"job_id": _LONG_JOB}),
        "get_budget": ("get_budget", {}),
        "whoami": ("whoami", {}),
    }


def _control() -> dict[str, Page]:
    return {
        "control_snapshot": ("control_snapshot", {}),
        "expire_leases": ("expire_leases", {}),
        "expire_scripts": ("expire_scripts", {}),
    }
