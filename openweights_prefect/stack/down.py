"""Stops the local stack; its data stays."""

from __future__ import annotations

from collections.abc import Mapping

from openweights_prefect.ledger import embedded
from openweights_prefect.stack import processes, services
from openweights_prefect.stack.addresses import forget_addresses, running_settings
from openweights_prefect.stack.locking import exclusive
from openweights_prefect.stack.service import HOME_VARIABLE, Folders
from openweights_prefect.stack.up import Progress


def down(*, environment: Mapping[str, str], progress: Progress) -> list[str]:
    """Stop every process of the stack, pods too, and return the names of the services that ran.

    Idempotent. Jobs that were running are lost and start again after the next `ow up`.
    """
    settings = running_settings(environment)
    folders = Folders(settings.home)
    if not folders.home.is_dir():
        return []
    with exclusive(folders, progress):
        stopped = []
        for service in reversed(services.plan(settings, folders, prefect_database_url="", api_key="")):
            if processes.stop(service, folders):
                stopped.append(service.name)
                progress(f"{service.title[0].upper()}{service.title[1:]} stopped")
        left = processes.sweep({HOME_VARIABLE: str(folders.home)})
        if left:
            progress(f"Processes that had been left over ended: {left}")
        if embedded.stop(folders.postgres):
            stopped.append("postgres")
            progress("PostgreSQL stopped")
        forget_addresses(folders)
    return stopped
