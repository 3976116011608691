"""Which services of the local stack are up."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from openweights_prefect.ledger import embedded_layout
from openweights_prefect.ledger.postmaster import find_postmaster
from openweights_prefect.settings import Settings
from openweights_prefect.stack import databases, processes, services
from openweights_prefect.stack.service import Folders, Service


@dataclass(frozen=True)
class ServiceStatus:
    """One service, as seen now."""

    name: str
    up: bool
    """It has its process and does its work."""
    pid: int | None
    address: str
    started_at: datetime | None
    log: Path | None


def status(settings: Settings) -> list[ServiceStatus]:
    """Every service of the stack in the order of their start; changes nothing."""
    folders = Folders(settings.home)
    planned = services.plan(settings, folders, prefect_database_url="", api_key="")
    return [_postgres(folders, settings), *(_status(service, folders) for service in planned)]


def _status(service: Service, folders: Folders) -> ServiceStatus:
    process = processes.find(service, folders)
    return ServiceStatus(
        name=service.name,
        up=process is not None and service.healthy(process),
        pid=None if process is None else process.pid,
        address=service.address,
        started_at=None if process is None else datetime.fromtimestamp(process.started_at, UTC),
        log=service.log(folders),
    )


def _postgres(folders: Folders, settings: Settings) -> ServiceStatus:
    where = databases.in_use(folders, settings)
    if not where.is_embedded:
        return ServiceStatus("postgres", databases.is_up(where), None, "OW_DATABASE_URL", None, None)
    layout = embedded_layout.locate(folders.postgres)
    postmaster = find_postmaster(layout)
    pid = None if postmaster is None else postmaster.pid
    return ServiceStatus(
        name="postgres",
        up=pid is not None and databases.is_up(where),
        pid=pid,
        address=str(layout.socket_folder),
        started_at=None if pid is None else _started_at(pid),
        log=layout.log,
    )


def _started_at(pid: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(psutil.Process(pid).create_time(), UTC)
    except psutil.Error:
        return None
