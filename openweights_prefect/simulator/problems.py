"""Errors as `application/problem+json`."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

OUTAGE = (
    'Variable "$input" got invalid value {name: "pod", objectMounts: null, tags: null}; Field "objectMounts" '
    'is not defined by type "PodFindAndDeployOnDemandInput".'
)
"""What every create got in RunPod's outage of 2026-08-28."""

_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def problem(status: int, detail: str, *, errors: list[str] | None = None) -> JSONResponse:
    """An error in RunPod's shape."""
    body: dict[str, Any] = {"title": _TITLES.get(status, "Error"), "status": status, "detail": detail}
    if errors:
        body["errors"] = errors
    return JSONResponse(body, status_code=status, media_type="application/problem+json")
