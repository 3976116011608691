"""The local protocol between a job, its flow and their agent: one JSON line each way over a Unix socket.

Standard library only: a job's interpreter has nothing else of ours.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from openweights_prefect.errors import OpenWeightsError

SOCKET_VARIABLE = "OW_AGENT_SOCKET"
SPOOL_VARIABLE = "OW_EVENT_SPOOL"
RUN_VARIABLE = "OPENWEIGHTS_RUN_ID"
POD_SOCKET = "agent.sock"
"""In the folder of the agent: a link to the socket on which it answers whoever is on its machine."""
JOB_VARIABLE = "OPENWEIGHTS_JOB_ID"
MAX_LINE = 64 * 1024 * 1024


class AgentError(OpenWeightsError):
    """The agent of this pod refused a request; the message is the agent's."""


def request(
    call: str, *, socket_path: str | None = None, timeout_seconds: float = 600.0, **arguments: Any
) -> dict[str, Any]:
    """Ask the agent of this pod for something and return its answer.

    Raises:
        AgentError: The agent refused, with its reason, or is gone.
    """
    path = socket_path or os.environ[SOCKET_VARIABLE]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_seconds)
            connection.connect(path)
            connection.sendall(json.dumps({"call": call, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as stream:
                answer = json.loads(stream.readline(MAX_LINE))
    except (OSError, ValueError) as exc:
        raise AgentError(f"The agent of this pod did not answer `{call}` ({exc}).") from exc
    if "error" in answer:
        raise AgentError(answer["error"])
    return dict(answer)
