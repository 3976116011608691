"""Who a pod is: the one-time token that it was born with, and the session secret that it trades it for."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from openweights_prefect.errors import ConfigurationError


@dataclass(frozen=True)
class PodIdentity:
    """What a pod is told when it is created."""

    worker_id: str
    bootstrap: str
    provider_id: str | None = None
    """RunPod's id of it."""

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> PodIdentity:
        """Read the identity and remove the token, so that nothing started later inherits it."""
        try:
            return cls(
                worker_id=environment["OW_POD_ID"],
                bootstrap=environment.pop("OW_POD_TOKEN"),
                provider_id=environment.get("RUNPOD_POD_ID"),
            )
        except KeyError as exc:
            raise ConfigurationError(
                f"{exc.args[0]} is not set: the agent runs only in a pod that the `runpod` worker created."
            ) from None


def session_secret(path: Path) -> str:
    """The secret of this pod's disk, made at its first start: the provider's API shows a pod's environment
    to everybody in the account, but not its disk. A restarted agent finds it again.
    """
    with contextlib.suppress(FileExistsError):
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.touch(mode=0o600)
        unfinished.write_text(f"owp_{secrets.token_urlsafe(32)}", encoding="utf-8")
        try:
            os.link(unfinished, path)
        finally:
            unfinished.unlink()
    return path.read_text(encoding="utf-8")


def proxy_token(session: str) -> str:
    """The token that the proxy before the Prefect API takes; it tells nothing of the session."""
    return f"owx_{hashlib.sha256(f'prefect:{session}'.encode()).hexdigest()}"
