"""Checks of a Prefect API that wants to know who asks: a server with a password, and Prefect Cloud."""

from __future__ import annotations

import base64
import dataclasses

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from openweights_prefect.settings import Settings
from openweights_prefect.stack import health
from tests.loopback import serve

PASSWORD = base64.b64encode(b"admin:p\xc3\xa4ss").decode()


async def version(request: Request) -> Response:
    known = request.headers.get("Authorization") in (f"Basic {PASSWORD}", "Bearer pnu_key")
    return JSONResponse("3.8.8") if known else Response(status_code=401)


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        (Settings(prefect_auth="admin:päss"), 200),
        (Settings(prefect_api_key="pnu_key"), 200),
        (Settings(prefect_auth="admin:wrong"), 401),
        (Settings(), 401),
    ],
)
def test_the_credential_is_sent_as_prefects_own_client_sends_it(settings: Settings, status: int) -> None:
    """Of the settings, and none where there is none."""

    with serve(Starlette(routes=[Route("/api/admin/version", version)])) as url:
        answer = health.ask_prefect(
            dataclasses.replace(settings, prefect_api_url=f"{url}/api"), "/admin/version"
        )
    assert answer is not None
    assert answer.status == status
