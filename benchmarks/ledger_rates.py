"""Submits and claims by eight clients at once, beside the bare statements; and the SDK's round trips."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import Figure
from ledger_site import LedgerSite, Pod, PodInTurn, a_job

from openweights_prefect import OpenWeights
from openweights_prefect.ledger.postgres import PostgresLedger
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings

CLIENTS = 8

_BARE_INSERT = (
    "insert into bare_jobs"
    " (organization_id, id, type, model, params, docker_image, entrypoint, requires_vram_gb)"
    " values (%s, %s, %s, %s, %s, %s, %s, %s) on conflict do nothing"
)
_BARE_CLAIM = (
    "update bare_queue set status = 'in_progress', worker_id = %s, started_at = now() where id = ("
    " select id from bare_queue where status = 'pending' order by priority desc, created_at"
    " for update skip locked limit 1) returning id"
)


def time_submits(site: LedgerSite, *, seconds: float, rounds: int) -> dict[str, Figure]:
    """New jobs through `submit_job`, beside `insert ... on conflict do nothing` of the same row."""
    with site.admin() as connection:
        connection.execute("create table bare_jobs (like ledger.jobs including all)")
    numbers = itertools.count()
    ledgers = [site.ledger() for _ in range(CLIENTS)]
    connections = [site.admin() for _ in range(CLIENTS)]

    def ours(client: int) -> None:
        number = next(numbers)
        [answer] = ledgers[client].call("submit_job", job=a_job(f"submit-{number}", number))
        assert answer["outcome"] == "new", answer

    def bare(client: int) -> None:
        number = next(numbers)
        row = a_job(f"submit-{number}", number)
        connections[client].execute(
            _BARE_INSERT,
            (
                LOCAL_ORGANIZATION_ID,
                *(row["id"], row["type"], row["model"], json.dumps(row["params"])),
                *(row["docker_image"], row["entrypoint"], row["requires_vram_gb"]),
            ),
        )

    for call in (ours, bare):
        _rate(call, 0.3)
    pairs = [(_rate(ours, seconds), _rate(bare, seconds)) for _ in range(rounds)]
    for ledger in ledgers:
        ledger.close()
    for connection in connections:
        connection.close()
    site.clear()
    return _figures("submit", pairs)


def time_claims(site: LedgerSite, *, claims: int, rounds: int) -> dict[str, Figure]:
    """What a pod does for its next run, `renew_lease` and `open_run`, beside one claiming statement."""
    with site.admin() as connection:
        connection.execute(
            "create table bare_queue (like ledger.jobs including all, worker_id text);"
            "create index on bare_queue (priority desc, created_at) where status = 'pending'"
        )
    pairs = []
    for number in range(rounds):
        site.make_waiting(f"claim-{number}-", claims)
        pods = site.make_pods(number * claims, claims)
        ours = _claim_all(site, pods)
        with site.admin() as connection:
            connection.execute(
                "insert into bare_queue select *, null from ledger.jobs where id like %s || '%%'",
                (f"claim-{number}-",),
            )
            connection.execute("update bare_queue set status = 'pending'; analyze bare_queue")
            connection.execute("vacuum bare_queue")
        pairs.append((ours, _claim_bare(site, claims)))
        with site.admin() as connection:
            connection.execute("truncate bare_queue")
        site.clear()
    return _figures("claim", pairs)


def _claim_all(site: LedgerSite, pods: list[Pod]) -> float:
    """Claims per second; each pod claims one run, eight of them at a time."""
    opened: list[str] = []

    def client(number: int, start: threading.Barrier) -> None:
        identity = PodInTurn(pods[0])
        ledger = PostgresLedger(site.url, identity=identity, connections=1)
        for turn, pod in enumerate(pods[number::CLIENTS]):
            if turn == 1:  # The first one opened the connection and planned the functions.
                start.wait()
            identity.pod = pod
            opened.append(_claim_one(ledger, pod))
        ledger.close()

    seconds = _timed(client)
    assert len(set(opened)) == len(opened) == len(pods)
    return (len(pods) - CLIENTS) / seconds


def _claim_one(ledger: PostgresLedger, pod: Pod) -> str:
    """Try until a run is ours, as an agent does."""
    lease: dict[str, Any] = {"for_worker": pod.worker_id, "as_boot": pod.boot}
    while True:
        [found] = ledger.call("renew_lease", **lease, lease_seconds=86400, models=[])
        run = str(found["next_run"])
        [answer] = ledger.call("open_run", for_run=run, **lease)
        if answer["outcome"] == "opened":
            return run


def _claim_bare(site: LedgerSite, claims: int) -> float:
    opened: list[int] = []

    def client(number: int, start: threading.Barrier) -> None:
        with site.admin() as connection:
            for turn in range(claims // CLIENTS):
                if turn == 1:
                    start.wait()
                opened.append(connection.execute(_BARE_CLAIM, (f"bench-{number}",)).rowcount)

    seconds = _timed(client)
    assert sum(opened) == len(opened)
    return (len(opened) - CLIENTS) / seconds


def count_round_trips(site: LedgerSite, folder: Path) -> dict[str, Figure]:
    """Calls of the ledger: a client, a fine-tune whose file is stored, the same one again."""
    conversations = folder / "conversations.jsonl"
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    conversations.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    settings = Settings.load({"OW_HOME": str(folder / "home"), "OW_DATABASE_URL": site.url})
    figures: dict[str, Figure] = {}
    with _counted() as calls, OpenWeights(settings=settings) as ow:
        figures["construct_round_trips"] = len(calls)
        ow.files.upload(conversations, "conversations")
        for name in ("new_fine_tune", "known_job"):
            calls.clear()
            ow.fine_tuning.create(model="unsloth/Qwen3-8B", training_file=str(conversations), loss="sft")
            figures[f"{name}_round_trips"] = len(calls)
    return figures


@contextmanager
def _counted() -> Iterator[list[str]]:
    calls: list[str] = []
    original = PostgresLedger.call

    def call(self: PostgresLedger, function: str, **arguments: Any) -> list[Row]:
        calls.append(function)
        return original(self, function, **arguments)

    PostgresLedger.call = call  # type: ignore[method-assign]  # counts the clients that the SDK makes itself
    try:
        yield calls
    finally:
        PostgresLedger.call = original  # type: ignore[method-assign]


def _rate(call: Callable[[int], None], seconds: float) -> float:
    """Calls per second by all clients together."""
    done = [0] * CLIENTS

    def client(number: int, start: threading.Barrier) -> None:
        start.wait()
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            call(number)
            done[number] += 1

    elapsed = _timed(client)
    return sum(done) / elapsed


def _timed(client: Callable[[int, threading.Barrier], None]) -> float:
    """Seconds from when all clients have reached the barrier until the last one has ended."""
    started: list[float] = []
    start = threading.Barrier(CLIENTS, action=lambda: started.append(time.perf_counter()), timeout=60)
    with ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(client, number, start) for number in range(CLIENTS)]:
            future.result()
        return time.perf_counter() - started[0]


def _figures(name: str, pairs: list[tuple[float, float]]) -> dict[str, Figure]:
    ours, bare = (sum(rates) / len(pairs) for rates in zip(*pairs, strict=True))
    return {
        f"{name}_per_second": round(ours, 1),
        f"bare_{name}_per_second": round(bare, 1),
        f"{name}_ratio": round(ours / bare, 3),
    }
