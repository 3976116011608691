"""The two token exchanges as tests run them: the issuer's process, and the edge function in Deno."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from openweights_prefect.ledger.identity import ServiceIdentity
from openweights_prefect.ledger.postgres import PostgresLedger
from tests.loopback import Service, run_service
from tests.npm_packages import npm_program

FUNCTION = Path(__file__).parents[1] / "infrastructure" / "supabase" / "functions" / "exchange"
SECRET_KEY = "sb_secret_of_the_tests"
ISSUER = "https://ledger.example/exchange"

_DENO_VERSION = "2.9.6"


def deno() -> Path:
    """Deno, which runs Supabase's edge functions; skips the test where npm cannot bring it."""
    launcher = npm_program("deno", _DENO_VERSION)
    program = launcher.parents[1] / "deno" / "deno"
    if not program.exists():  # The launcher unpacks it, but as its child it would outlive a stopped test.
        done = subprocess.run(
            [launcher, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0 or not program.exists():
            pytest.skip(f"Deno does not run here: {done.stderr[-200:]}")
    return program


def deno_environment() -> dict[str, str]:
    """Keeps Deno's own files together, and keeps it from looking for updates."""
    return {"DENO_DIR": str(deno().parents[2] / "files"), "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}


@contextlib.contextmanager
def issuer_service(url: str, key_file: Path, output: Path) -> Iterator[Service]:
    """The issuer as an operator runs it behind a proxy."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "openweights_prefect.ledger.issuer",
        "--key",
        key_file,
        "--issuer",
        ISSUER,
    ]
    environment = {"OW_DATABASE_URL": url, "OW_HOME": str(output.parent)}
    with run_service(
        [*command, "--behind-proxy"], output=output, port=r'"port": (\d+)', environment=environment
    ) as service:
        yield service


@contextlib.contextmanager
def edge_service(
    supabase_url: str, key_file: Path, output: Path, *, keys: Mapping[str, str] | None = None
) -> Iterator[Service]:
    """The edge function as it is deployed; `keys` are the project's, as Supabase gives them to functions."""
    environment = {
        **deno_environment(),
        "DENO_SERVE_ADDRESS": "tcp:127.0.0.1:0",
        "SUPABASE_URL": supabase_url,
        "OW_SIGNING_KEY": key_file.read_text(),
        "OW_TOKEN_ISSUER": ISSUER,
        **(keys or {"SUPABASE_SECRET_KEYS": json.dumps({"default": SECRET_KEY})}),
    }
    program = FUNCTION / "index.ts"
    command: list[str | Path] = [
        deno(),
        "run",
        "--no-remote",
        "--allow-env",
        "--allow-net=127.0.0.1",
        program,
    ]
    with run_service(command, output=output, port=r"127\.0\.0\.1:(\d+)", environment=environment) as service:
        yield service


def postgrest(url: str) -> Starlette:
    """`/rest/v1/rpc/*` for the holder of the secret key."""
    ledger = PostgresLedger(url, identity=ServiceIdentity())

    async def call(request: Request) -> Response:
        keys = {
            request.headers.get("apikey"),
            request.headers.get("authorization", "").removeprefix("Bearer "),
        }
        if keys != {SECRET_KEY}:
            return Response(status_code=401)
        arguments = await request.json()
        rows = await run_in_threadpool(lambda: ledger.call(request.path_params["name"], **arguments))
        return JSONResponse(rows)

    return Starlette(routes=[Route("/rest/v1/rpc/{name}", call, methods=["POST"])])
