"""The environment of the stack's processes: an allow-list of the user's, and a Prefect that phones nobody."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from openweights_prefect.settings import Settings
from openweights_prefect.stack.addresses import STORED
from openweights_prefect.stack.service import HOME_VARIABLE, Folders

_PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip

QUIET_PREFECT = {
    "DO_NOT_TRACK": "1",  # Amplitude events of Prefect's SDK.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",  # The server's heartbeat to its makers.
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_CLI_COLORS": "false",
}
"""Nothing of Prefect asks a question or reports to anybody."""

REFUSE_OUTSIDE = {
    # The server reads its list of integrations from GitHub, and falls back to the one it brings along.
    # No setting changes that, so its way out leads to a port where nobody listens.
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
}
"""Keeps a process from reaching anything over HTTPS but this machine."""


def common_environment(folders: Folders, environment: Mapping[str, str]) -> dict[str, str]:
    """What every service gets of the user's `environment`; `stack.json` tells the rest."""
    stored = {f.metadata["variable"] for f in dataclasses.fields(Settings) if f.name in STORED}
    ours = {n: v for n, v in environment.items() if n.startswith("OW_") and n not in stored}
    passed = {name: environment[name] for name in _PASSED if name in environment}
    return {
        **passed,
        **ours,
        **QUIET_PREFECT,
        "OW_HOME": str(folders.home),
        HOME_VARIABLE: str(folders.home),
        "PREFECT_HOME": str(folders.prefect),
        "PYTHONUNBUFFERED": "1",
    }
