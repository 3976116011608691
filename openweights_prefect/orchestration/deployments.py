"""Registers the work pool and the deployments of `prefect.yaml`; `python -m` runs it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from openweights_prefect import bundle
from openweights_prefect.orchestration.queues import ensure_queues
from openweights_prefect.settings import Settings

WORK_POOL_TYPE = "runpod"


async def register_deployments(settings: Settings) -> list[str]:
    """Create the pool when it is missing and create or update every deployment; idempotent.

    The result is what `prefect deploy --all` makes of the same file.
    """
    root = bundle.deploy_root()
    recipe = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))
    async with get_client() as client:
        await ensure_work_pool(client, settings.work_pool)
        return [
            await _register(client, root, spec, recipe, settings.work_pool) for spec in recipe["deployments"]
        ]


async def ensure_work_pool(client: PrefectClient, name: str) -> None:
    """Create the work pool of type `runpod`, with the worker's template and the queues; what exists stays."""
    template = await asyncio.to_thread(work_pool_template)
    with contextlib.suppress(ObjectAlreadyExists):
        await client.create_work_pool(
            WorkPoolCreate(name=name, type=WORK_POOL_TYPE, base_job_template=template)
        )
    await ensure_queues(client, name)


def work_pool_template() -> dict[str, Any]:
    """The base job template of the pool: the job variables and their form."""
    from prefect.workers.base import BaseWorker  # seconds of imports that only this needs

    worker = BaseWorker.get_worker_class_from_type(WORK_POOL_TYPE)
    assert worker is not None, "the entry point `prefect.collections` of this package is not installed"
    return worker.get_default_base_job_template()


async def _register(
    client: PrefectClient, root: Path, spec: dict[str, Any], recipe: dict[str, Any], work_pool: str
) -> str:
    path, _, function = spec["entrypoint"].partition(":")
    flow: Flow[Any, Any] = load_flow_from_entrypoint(f"{root / path}:{function}")
    await client.create_deployment(
        flow_id=await client.create_flow(flow),
        name=spec["name"],
        description=spec.get("description") or flow.description,
        entrypoint=spec["entrypoint"],
        tags=spec.get("tags"),
        work_pool_name=work_pool,
        job_variables=spec.get("work_pool", {}).get("job_variables") or {},
        pull_steps=recipe["pull"],
        parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
        enforce_parameter_schema=True,
        path=".",
    )
    return f"{flow.name}/{spec['name']}"


if __name__ == "__main__":
    for name in asyncio.run(register_deployments(Settings.load())):
        print(name)
