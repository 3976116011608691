"""Registers deployments and block types as soon as Prefect answers; `python -m` runs it.

A process of its own, because importing Prefect takes seconds: it does so while the server boots.
"""

from __future__ import annotations

import asyncio
import sys
import time

from openweights_prefect.credentials import BLOCK_TYPES
from openweights_prefect.orchestration.block_documents import register_types
from openweights_prefect.orchestration.deployments import register_deployments
from openweights_prefect.settings import Settings
from openweights_prefect.stack import health
from openweights_prefect.stack.registration import SECONDS

_POLL_SECONDS = 0.1


def main() -> None:
    """Wait for the API of the settings, then register."""
    settings = Settings.load()
    deadline = time.monotonic() + SECONDS
    while not health.answers(f"{settings.prefect_api_url}/health"):
        if time.monotonic() > deadline:
            sys.exit(f"No Prefect API answered at {settings.prefect_api_url}.")
        time.sleep(_POLL_SECONDS)
    for name in asyncio.run(_register(settings)):
        print(name)


async def _register(settings: Settings) -> list[str]:
    return [*await register_deployments(settings), *await register_types(BLOCK_TYPES, settings=settings)]


if __name__ == "__main__":
    main()
