"""Whatever is tested of the ledger holds over both transports."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["psycopg", "supabase"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)
