"""One Prefect server for the session; a fresh ledger and a proxy between them for each module."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from psycopg import sql

# Before Prefect is imported: it would report to its makers.
os.environ["DO_NOT_TRACK"] = "1"

import services
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun

from openweights_prefect.ledger.embedded import EmbeddedPostgres
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID
from openweights_prefect.stack.databases import create_organization
from tests.callers import Callers, bootstrap_hash

POOL = "openweights"
FLOWS = Path(__file__).parent / "repository"
OTHER_ORGANIZATION_ID = "00000000-0000-0000-0000-00000000b001"
_POD = {"docker_image": "image", "hardware": "1x L4", "gpu_type": "NVIDIA L4", "gpu_count": 1, "vram_gb": 19,
        "cloud": "SECURE", "price_per_hour": 0.4}  # fmt: skip


class Pod(NamedTuple):
    """A registered pod with one flow run."""

    worker_id: str
    token: str
    run_id: uuid.UUID
    boot: uuid.UUID


class World:
    """A Prefect server, a ledger, and the proxy between them."""

    def __init__(self, *, api_url: str, proxy_url: str, callers: dict[str, Callers], log: Path) -> None:
        self.api_url = api_url
        self.proxy_url = proxy_url
        self.callers = callers
        self.log = log
        self._numbers = itertools.count(1)
        self._deployment: uuid.UUID | None = None

    def prefect(self) -> SyncPrefectClient:
        """The server itself, with its password."""
        return SyncPrefectClient(self.api_url, auth_string=services.PASSWORD)

    def flow_run(self, **parameters: object) -> FlowRun:
        """A scheduled flow run of `pkg/flows.py:etl`."""
        with self.prefect() as client:
            if self._deployment is None:
                client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
                step = {"prefect.deployments.steps.set_working_directory": {"directory": str(FLOWS)}}
                self._deployment = client.create_deployment(
                    flow_id=client.create_flow_from_name("etl"),
                    name="etl",
                    entrypoint="pkg/flows.py:etl",
                    work_pool_name=POOL,
                    pull_steps=[step],
                )
            return client.create_flow_run_from_deployment(self._deployment, parameters=parameters)

    def pod(self, organization_id: str = LOCAL_ORGANIZATION_ID, run: FlowRun | None = None) -> Pod:
        """A pod that is registered with a proxy token, and holds a flow run."""
        ledger, worker_id = self.callers[organization_id], f"pod-{next(self._numbers)}"
        run = run or self.flow_run(n=1)
        job = {"id": f"flow-{run.id}", "type": "flow", "docker_image": "image", "params": {}, "files": []}
        [answer] = ledger.call("adopt_flow_run", job=job, flow_run=run.id, created=None)
        assert answer["outcome"] == "adopted"
        [answer] = ledger.call(
            "intend_pod",
            pod={"id": worker_id, **_POD},
            bootstrap_hash=bootstrap_hash(worker_id),
            ttl_seconds=3600,
            max_pods=50,
        )
        assert answer["outcome"] == "intended"
        ledger.call("record_pod", for_worker=worker_id, provider_id=f"at-{worker_id}", price=0.4)
        token = f"owx_{hash_secret(worker_id)}"
        pod = Pod(worker_id, token, run.id, uuid.uuid4())
        ledger.call(
            "register_pod",
            for_worker=worker_id,
            as_boot=pod.boot,
            lease_seconds=600,
            models=[],
            proxy_hash=hash_secret(token),
        )
        ledger.call("hint_runs", hints={str(run.id): worker_id})
        [answer] = ledger.call("open_run", for_run=run.id, for_worker=worker_id, as_boot=pod.boot)
        assert answer["outcome"] == "opened", answer
        return pod

    def end(self, pod: Pod, organization_id: str = LOCAL_ORGANIZATION_ID) -> None:
        """The provider says that it is gone."""
        self.callers[organization_id].call("end_pod", for_worker=pod.worker_id, why="over")


@pytest.fixture(scope="session")
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API of a Prefect server with a password."""
    with services.prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        yield url


@pytest.fixture(scope="session")
def world(
    api_url: str, postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """Two organizations on one Prefect server, and one proxy."""
    name, folder = f"ledger_proxy_{os.getpid()}", tmp_path_factory.mktemp("proxy")
    with psycopg.connect(postgres.url(database="postgres"), autocommit=True) as connection:
        make = sql.SQL("create database {} template ledger_template")
        connection.execute(make.format(sql.Identifier(name)))
    url = postgres.url(database=name, user="authenticator")
    create_organization(url, OTHER_ORGANIZATION_ID)
    callers = {each: Callers(url, each) for each in (LOCAL_ORGANIZATION_ID, OTHER_ORGANIZATION_ID)}
    try:
        with services.proxy(folder, api_url=api_url, database_url=url) as proxy_url:
            yield World(api_url=api_url, proxy_url=proxy_url, callers=callers, log=folder / "proxy.log")
    finally:
        for each in callers.values():
            each.close()
