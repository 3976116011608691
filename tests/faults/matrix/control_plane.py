"""The control plane without Prefect's server: the real observer, purchases and fleet, driven pass by pass.

The ledger is a real one, RunPod the simulator's process, and the pods are processes of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import psycopg
from psycopg.rows import dict_row

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.orchestration.flow_runs import Ends
from openweights_prefect.orchestration.queues import PoolState
from openweights_prefect.provisioning.runpod.client import RunPodClient
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings
from openweights_prefect.simulator.server import SimulatorServer
from openweights_prefect.worker.fleet import Fleet
from openweights_prefect.worker.observer import Observer
from openweights_prefect.worker.orders import pod_name
from openweights_prefect.worker.purchases import Purchases
from tests.callers import Callers, bootstrap_hash
from tests.simulation.model_flow_runs import ModelFlowRuns

IMAGE = "openweights/idle"
"""Of pods that start nothing of ours; whether they report is the test's to say."""
EXITS = "openweights/exits"
"""Of pods whose container ends at once."""
MAX_WORKERS = 3
BILL_SECONDS = 3.0
"""By so much the ledger's bill of a pod may differ from RunPod's."""
MOST_ORPHAN_SECONDS = 120.0

T = TypeVar("T")


class FlowRuns(ModelFlowRuns):
    """Prefect's side, where nobody paused or ended anything."""

    async def pool_state(self, pool: str) -> PoolState:
        return PoolState(paused=False, paused_queues=frozenset(), concurrency_limit=None)

    async def held_back(self, state: PoolState, flow_run_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, str]:
        return {}

    async def ends_among(self, flow_run_ids: Sequence[uuid.UUID]) -> Ends:
        return (await super().ends_among(flow_run_ids))._replace(ended=[])

    async def restore(self, flow_run_id: uuid.UUID) -> None:
        raise AssertionError("nobody ended anything")


class ControlPlane:
    """One worker's parts on a fresh ledger, and an account of a simulator that others have used before."""

    def __init__(
        self, callers: Callers, runpod: SimulatorServer, folder: Path, settings: Mapping[str, Any]
    ) -> None:
        self.callers = callers
        self.runpod = runpod
        self.announced: list[tuple[str, str]] = []
        self.troubles: list[str] = []
        """What passes ended with, as the worker's loop would log it."""
        self.extra_pods = 0
        """How many the provider rents out beyond what it was asked for."""
        self.settings = Settings(
            home=folder,
            organization_id=LOCAL_ORGANIZATION_ID,
            image=IMAGE,
            min_cuda="",
            **{"max_workers": MAX_WORKERS, "first_log_seconds": 60, "boot_seconds": 600, **settings},
        )
        self.flow_runs = FlowRuns(random.Random(0))
        self.provider = RunPodClient(base_url=runpod.rest, api_key=runpod.api_key)
        self.bill_seconds = BILL_SECONDS
        self._before = self._Baseline(runpod)
        self.start()

    class _Baseline:
        """What the simulator had seen before the test."""

        def __init__(self, runpod: SimulatorServer) -> None:
            report = runpod.report()
            self.violations = len(report["violations"])
            self.foreign = _foreign(runpod)
            self.pods = set(report["cost_by_pod"])
            self.journal = len(runpod.control("GET", "journal")["entries"])

    def start(self, *, ledger: Ledger | None = None) -> None:
        """A worker that knows nothing but what the ledger says; the one before it is forgotten."""
        ledger = ledger or self.callers.control
        parts: dict[str, Any] = {
            "provider": self.provider,
            "ledger": ledger,
            "settings": self.settings,
            "announce": lambda kind, worker, _: self.announced.append((kind, worker)),
        }
        self.purchases = Purchases(**parts)
        self.fleet = Fleet(**parts, purchases=self.purchases)
        self.observer = Observer(
            ledger=ledger,
            flow_runs=cast(Any, self.flow_runs),
            purchases=self.purchases,
            fleet=self.fleet,
            settings=self.settings,
        )

    # What people, machines and time do -----------------------------------------------------------

    def submit(self, job_id: str | None = None, **needs: Any) -> str:
        """A job that needs a pod; returns its id."""
        job = {
            "id": job_id or f"job-{uuid.uuid4().hex[:8]}",
            "type": "probe",
            "docker_image": IMAGE,
            "entrypoint": "true",
            "params": {"validated_params": {}},
            "mounts": {},
            "requires_vram_gb": 0,
            **needs,
        }
        assert self.callers.call("submit_job", job=job)[0]["outcome"] == "new"
        return str(job["id"])

    def fault(
        self, name: str, *, times: int | None = 1, match: dict[str, Any] | None = None, **params: Any
    ) -> None:
        """A rule of the simulator."""
        rule = {"name": name, "times": times, "match": match or {}, "params": params}
        self.runpod.control("POST", "faults", rule)

    def age(self, worker_id: str, seconds: float) -> None:
        """As if the pod had been bought so much earlier; its bill is left alone."""
        self.sql(
            "update ledger.worker set created_at = created_at - make_interval(secs => %s) where id = %s",
            seconds,
            worker_id,
        )
        self.fleet._seen.pods.pop(worker_id, None)  # It counts by its own clock from the first sight.

    def jump(self, hours: float) -> None:
        """As if the clock of the ledger's machine were set forward: every time in it lies further back.

        Its bill is wrong by that, and nobody can know.
        """
        self.bill_seconds += 3600 * abs(hours)
        times = {
            "pod_intervals": ("started_at", "ended_at"),
            "worker": (
                "created_at",
                "active_at",
                "heartbeat_at",
                "idle_since",
                "lease_expires_at",
                "deadline_at",
            ),
            "runs": ("created_at", "hinted_at", "started_at", "lease_expires_at", "logged_at"),
            "refusals": ("until",),
        }
        for table, columns in times.items():
            changes = ", ".join(f"{name} = {name} - make_interval(hours => {hours})" for name in columns)
            self.sql(f"update ledger.{table} set {changes}")

    def add_foreign(self, *names: str) -> list[str]:
        """Pods of somebody else with these names; returns their ids."""
        ids = []
        for name in names:
            env = {"SECRET": f"SIM_CANARY_{uuid.uuid4().hex}"}
            ids.append(self.runpod.control("POST", "pods/foreign", {"name": name, "env": env})["id"])
        self._before.foreign = _foreign(self.runpod)
        return ids

    def forget_refusals(self) -> None:
        """As if the time of every refusal had passed."""
        self.sql("update ledger.refusals set until = now() - interval '1 second'")

    def report_in(self, worker_id: str) -> uuid.UUID:
        """The pod's agent registers; returns its boot."""
        self.sql(
            "update ledger.worker set bootstrap_hash = %s where id = %s", bootstrap_hash(worker_id), worker_id
        )
        boot = uuid.uuid4()
        answer = self.callers.call(
            "register_pod", for_worker=worker_id, as_boot=boot, lease_seconds=600, models=[]
        )
        assert answer[0]["outcome"] == "registered", answer
        return boot

    # The passes ----------------------------------------------------------------------------------

    async def work(self) -> None:
        """One pass of each loop; trouble is kept and the next pass tries again, as in the worker."""
        for once in (self.observer.place_once, self.observer.reconcile_once):
            try:
                await once()
            except OpenWeightsError as exc:
                self.troubles.append(f"{type(exc).__name__}: {exc}")

    async def until(self, look: Callable[[], T], what: str, *, seconds: float = 20) -> T:
        """Work until `look` gives something true, and return that."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not (seen := look()):
            assert loop.time() < deadline, f"not within {seconds:g} s: {what}; {self.troubles} {self.rows()}"
            await self.work()
            await asyncio.sleep(0.05)
        return seen

    async def all_bought(self) -> None:
        """Wait for the purchases that are under way."""
        await asyncio.gather(*self.observer._buying.values())

    # What there is -------------------------------------------------------------------------------

    def sql(self, statement: str, *values: Any) -> list[Row]:
        """A statement as the owner of the tables."""
        url = self.callers.url.replace("authenticator@", "postgres@")
        with psycopg.connect(url, row_factory=dict_row) as connection:
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def rows(self) -> list[Row]:
        """The pods of the ledger, oldest first."""
        return self.sql(
            "select id, status, pod_id, host, reason, price_per_hour from ledger.worker order by created_at"
        )

    def living(self) -> list[Row]:
        """Those that have not ended."""
        return [row for row in self.rows() if row["status"] != "terminated"]

    def job(self, job_id: str) -> Row:
        """The ledger's row of a job."""
        return self.callers.call("get_job", job_id=job_id)[0]

    def rented(self) -> list[str]:
        """The provider's ids of pods of ours that it has not ended, whatever it shows."""
        return [pod for pod in self.runpod.report()["alive"] if pod not in self._before.pods]

    def bought(self) -> list[str]:
        """The provider's ids of all pods of this test."""
        return [pod for pod in self.runpod.report()["cost_by_pod"] if pod not in self._before.pods]

    def refusals(self) -> dict[str, str]:
        """What is refused, and why."""
        return {
            row["subject"]: row["reason"] for row in self.sql("select subject, reason from ledger.refusals")
        }

    def name_of(self, worker_id: str) -> str:
        """The provider's name for a pod."""
        return pod_name(LOCAL_ORGANIZATION_ID, worker_id)

    # The end of a scenario -----------------------------------------------------------------------

    async def clear(self) -> None:
        """After a scenario that failed: nothing of it may reach the next one."""
        self._heal()
        for pod in self.rented():
            await self.provider.terminate(pod)

    def _heal(self) -> None:
        self.runpod.control("DELETE", "faults")
        healthy = {"revoked": False, "spend_limit_per_hour": 1e6, "balance": 1e6}
        self.runpod.control("PUT", "accounts/main", healthy)

    async def wind_down(self) -> None:
        """Let everything be well again, and end all pods in the way in which the worker ends them."""
        self._heal()
        for row in self.sql("select id from ledger.jobs where status in ('pending', 'in_progress')"):
            self.callers.call("cancel_job", job_id=row["id"])
        for row in self.living():
            if row["status"] not in ("draining", "lost"):
                self.callers.call("lose_pod", for_worker=row["id"], why="the test is over", counts=False)
            if row["pod_id"] is None:
                self.age(row["id"], 3600)
        await self.until(lambda: not self.living() and not self.rented(), "all pods have ended")

    async def close(self) -> None:
        """Close the connections."""
        buying = [*self.observer._buying.values()]
        for task in buying:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*buying, return_exceptions=True)
        await self.provider.aclose()

    def check(self, logs: Path) -> None:
        """What holds after every scenario."""
        leaks = self._scan(logs)
        report = self.runpod.report()
        assert report["violations"][self._before.violations :] == []
        assert leaks == []
        assert _foreign(self.runpod) == self._before.foreign, "foreign pods are as they were"
        mine = {pod: usd for pod, usd in report["cost_by_pod"].items() if pod not in self._before.pods}
        orphans = {pod: seconds for pod, seconds in report["orphans"].items() if pod in mine}
        assert sum(orphans.values()) <= MOST_ORPHAN_SECONDS, orphans
        assert self.sql("select * from ledger.reservations") == []
        assert self._most_at_once() <= self.settings.max_workers + self.extra_pods
        self._compare_bills(mine)

    def _compare_bills(self, bill: Mapping[str, float]) -> None:
        rows = self.callers.call("list_costs", group_by="worker")
        ledger_usd = sum(float(row["total_usd"]) for row in rows)
        dearest = max((float(row["price_per_hour"]) for row in self.rows()), default=0.0)
        tolerance = self.bill_seconds * dearest / 3600 * len(bill)
        assert abs(ledger_usd - sum(bill.values())) <= tolerance + 1e-6, (rows, bill, tolerance)

    def _scan(self, logs: Path) -> list[str]:
        """Files of ours, the log and the ledger's tables, with the environment of a foreign pod in them."""
        tables = ("worker", "jobs", "runs", "events", "refusals", "catalogues")
        rows = {table: self.sql(f"select to_jsonb(t) as row from ledger.{table} t") for table in tables}
        (logs / "ledger.json").write_text(json.dumps(rows, default=str), encoding="utf-8")
        found: list[str] = self.runpod.control("POST", "scan", {"paths": [str(logs)]})["leaks"]
        return found

    def created(self) -> list[str]:
        """The provider's ids of all pods of this test, in the order in which they were rented."""
        created = [entry for entry in self._journal() if entry["event"] == "pod_created"]
        return [entry["pod"] for entry in created if entry["owner"] == "client"]

    def _journal(self) -> list[Row]:
        entries: list[Row] = self.runpod.control("GET", f"journal?after={self._before.journal}")["entries"]
        return entries

    def _most_at_once(self) -> int:
        alive: set[str] = set()
        most = 0
        for entry in self._journal():
            if entry["event"] == "pod_created" and entry["owner"] == "client":
                alive.add(entry["pod"])
            elif entry["event"] == "pod_gone" or entry.get("phase") == "terminated":
                alive.discard(entry["pod"])
            most = max(most, len(alive))
        return most


def _foreign(runpod: SimulatorServer) -> list[Row]:
    """Somebody else's pods, without what time alone changes."""
    pods = runpod.control("GET", "state")["pods"]
    return [{**pod, "bill": None} for pod in pods if pod["owner"] == "foreign"]
