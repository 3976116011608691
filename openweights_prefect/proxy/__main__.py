"""`python -m openweights_prefect.proxy --port N`: serve pods, before the Prefect API of the settings."""

from __future__ import annotations

import argparse
import asyncio
import logging
import socket
import sys

import uvicorn

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.proxy.app import serving
from openweights_prefect.proxy.event_stream import MAX_MESSAGE_BYTES
from openweights_prefect.settings import Settings

_MOST_CONNECTIONS = 2000


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m openweights_prefect.proxy", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; TLS ends before it")
    parser.add_argument("--port", type=int, default=4201, help="port; 0 takes a free one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # It logs addresses with their queries.
    try:
        settings = Settings.load()
        if not settings.prefect_api_url:
            sys.exit("No Prefect API is configured. Set `PREFECT_API_URL` to the server behind the proxy.")
        listener = socket.create_server((arguments.host, arguments.port))
        asyncio.run(_serve(settings, listener))
    except (OpenWeightsError, OSError) as exc:
        sys.exit(f"The proxy cannot start: {exc}")


async def _serve(settings: Settings, listener: socket.socket) -> None:
    async with serving(settings) as app:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            ws_max_size=MAX_MESSAGE_BYTES,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        host, port = listener.getsockname()[:2]
        print(f"http://{host}:{port}/api", flush=True)
        await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    main()
