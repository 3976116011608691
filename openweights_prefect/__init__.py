"""GPU jobs as if they were OpenAI calls: `from openweights_prefect import OpenWeights, Jobs, register`."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openweights_prefect.client import OpenWeights
    from openweights_prefect.errors import (
        AuthenticationError,
        BudgetExceeded,
        ConfigurationError,
        ConflictError,
        InvalidFileError,
        InvalidParameterError,
        InvalidRequestError,
        JobFailed,
        LedgerUnavailable,
        NotFoundError,
        OpenWeightsError,
        PermissionDeniedError,
        ProviderError,
        StackError,
        WaitTimeout,
    )
    from openweights_prefect.resources.custom import Jobs, register
    from openweights_prefect.resources.job import Job

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "BudgetExceeded",
    "ConfigurationError",
    "ConflictError",
    "InvalidFileError",
    "InvalidParameterError",
    "InvalidRequestError",
    "Job",
    "JobFailed",
    "Jobs",
    "LedgerUnavailable",
    "NotFoundError",
    "OpenWeights",
    "OpenWeightsError",
    "PermissionDeniedError",
    "ProviderError",
    "StackError",
    "WaitTimeout",
    "register",
]

_MODULES = {
    "Job": "openweights_prefect.resources.job",
    "Jobs": "openweights_prefect.resources.custom",
    "register": "openweights_prefect.resources.custom",
}


def __getattr__(name: str) -> Any:
    """Import on first use: inside jobs there is only the standard library, and commands start quickly."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _client_module() if name == "OpenWeights" else _MODULES.get(name, "openweights_prefect.errors")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _client_module() -> str:
    """Inside a job, the client that speaks to the pod's agent and needs nothing but the standard library."""
    inside = os.environ.get("OW_AGENT_SOCKET") and os.environ.get("OPENWEIGHTS_RUN_ID")
    return "openweights_prefect.runtime.inside" if inside else "openweights_prefect.client"
