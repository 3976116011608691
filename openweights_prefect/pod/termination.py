"""A pod asks RunPod to end it. Best effort: the worker ends it in any case."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from typing import NoReturn
from urllib.parse import urlsplit

from openweights_prefect import __version__
from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.settings import Settings

logger = logging.getLogger(__name__)

_MOST_SECONDS = 15.0
_AGAIN_SECONDS = 60.0
_GONE = "POD_NOT_FOUND"
_TERMINATE = "mutation { podTerminate(input: { podId: %s }) }"


class TerminationRefused(OpenWeightsError):
    """RunPod did not agree to end this pod; the worker has to."""


def ask_for_termination(environment: Mapping[str, str], *, seconds: float = _MOST_SECONDS) -> bool:
    """Ask once, within a bounded time; True when RunPod agreed. Failures are logged, never raised.

    With the pod's own key, which RunPod puts there and which can end this pod alone.
    """
    pod_id, key = environment.get("RUNPOD_POD_ID"), environment.get("RUNPOD_API_KEY")
    if not pod_id or not key:
        logger.info("There is no `RUNPOD_POD_ID` or `RUNPOD_API_KEY`: the worker has to end this pod.")
        return False
    agreed = threading.Event()

    def ask() -> None:
        try:
            _ask(pod_id, key, _address(environment), seconds)
            agreed.set()
        except Exception as exc:  # Whatever a foreign library raises: the pod must come to rest.
            logger.warning("RunPod did not end this pod: %s", str(exc).replace(key, "***"))

    # Neither library bounds the whole of a request.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        logger.warning("RunPod did not answer within %g s.", seconds)
    return agreed.is_set()


def rest(environment: Mapping[str, str]) -> NoReturn:
    """Ask to be ended, again and again; a container that exits would be started again, and bill on."""
    while True:
        ask_for_termination(environment)
        time.sleep(_AGAIN_SECONDS)


def _address(environment: Mapping[str, str]) -> str:
    """RunPod's address, as its own library or else the settings name it, so that a simulated one is found."""
    if base := environment.get("RUNPOD_API_BASE_URL"):
        return base.rstrip("/")
    parts = urlsplit(Settings.load(environment).runpod_api_url)
    return f"{parts.scheme}://{parts.netloc}"


def _ask(pod_id: str, key: str, base: str, seconds: float) -> None:
    try:
        import runpod  # An extra, and slow to import.
    except ImportError:
        _ask_over_http(f"{base}/graphql", pod_id, key, seconds)
        return
    runpod.api_key = key
    runpod.terminate_pod(pod_id)


def _ask_over_http(url: str, pod_id: str, key: str, seconds: float) -> None:
    import urllib.error  # Slow to import, and most pods never need it.
    import urllib.request

    request = urllib.request.Request(
        url,
        # A string is written in GraphQL as in JSON; RunPod's own library sends no variables either.
        data=json.dumps({"query": _TERMINATE % json.dumps(pod_id)}).encode(),
        headers={
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/json",
            # The library's own name is refused before the key is looked at.
            "User-Agent": f"openweights-prefect/{__version__}",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as exc:
        raise TerminationRefused(f"HTTP {exc.code}") from None
    errors = answer.get("errors") or []
    codes = {(error.get("extensions") or {}).get("code") for error in errors}
    if errors and codes != {_GONE}:
        raise TerminationRefused(f"{errors[0].get('message')}")
