"""The environment that Prefect reads when it is imported: set before that."""

from __future__ import annotations

from collections.abc import MutableMapping

from openweights_prefect.pod.session import proxy_token
from openweights_prefect.settings import Settings


def prepare_environment(settings: Settings, environment: MutableMapping[str, str], session: str) -> None:
    """Name the API, patience in an outage, and silence towards others.

    With a proxy before the API, the pod knows that alone, by a token of its own.
    """
    if settings.prefect_proxy_url:
        environment["PREFECT_API_URL"] = settings.prefect_proxy_url
        # Not as an API key, which Prefect does not show to the sockets that task runs are told through.
        environment["PREFECT_API_AUTH_STRING"] = proxy_token(session)
        environment.pop("PREFECT_API_KEY", None)
    defaults = {
        "PREFECT_API_URL": settings.prefect_api_url,
        "PREFECT_CLIENT_MAX_RETRIES": "20",
        # Agent and server are of one installation: asking for its version in each run costs 30 ms.
        "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "DO_NOT_TRACK": "1",
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)
