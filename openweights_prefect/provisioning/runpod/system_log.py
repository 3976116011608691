"""What a machine logs of a pod, and why it does not start one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence

import httpx

from openweights_prefect.errors import ProviderError
from openweights_prefect.provisioning.provider import HostUnusable, ImageError

_FIRST_SECONDS = 3.0
_QUIET_SECONDS = 0.5
"""A log that says nothing for so long has delivered what it had; it stays open for what is to come."""
_WHOLE_SECONDS = 6.0
_MOST_BYTES = 512 * 1024
_LONGEST_LINE = 2000
_LONGEST_QUOTE = 300

# The lines have no codes: these are fragments of Docker's, the registries' and NVIDIA's own words, matched
# without regard to case. The first list that knows a line decides, because the later words are the broader.
_OF_THE_DRIVER = ("unsatisfied condition", "nvidia-container-cli", "failed to initialize nvml")
_OF_THE_IMAGE = (
    "unauthorized",
    "manifest unknown",
    "pull access denied",
    "access to the resource is denied",
    "repository does not exist",
    "repository name not known",
    "name unknown",
    "no matching manifest",
    "no match for platform",
    "invalid reference format",
    "executable file not found",
    "exec format error",
)
_OF_THE_HOST = (
    "oci runtime create failed",
    "failed to create shim task",
    "could not select device driver",
    "no space left on device",
    # Registries count the pulls of a machine's address.
    "toomanyrequests",
)
_SUCCESS = ("start container", "status: downloaded newer image", "status: image is up to date")


def diagnose(lines: Sequence[str], *, image: str) -> ProviderError | None:
    """The error that keeps a container from starting, or None while nothing says that there is one.

    An error that was followed by a success was a passing one.
    """
    error: ProviderError | None = None
    for line in lines:
        text = line.lower()
        found = _trouble(line, text, image)
        if found is not None:
            error = found
        elif any(word in text for word in _SUCCESS):
            error = None
    return error


def _trouble(line: str, text: str, image: str) -> ProviderError | None:
    quoted = line.strip()[:_LONGEST_QUOTE]
    of_the_driver = any(word in text for word in _OF_THE_DRIVER)
    if not of_the_driver and any(word in text for word in _OF_THE_IMAGE):
        return ImageError(
            f"The image {image!r} cannot be run on any machine: {quoted!r}. "
            "Check its name and tag, and that everybody may pull it."
        )
    if of_the_driver or any(word in text for word in _OF_THE_HOST):
        return HostUnusable(f"This machine cannot start {image!r}: {quoted!r}. Another one may.")
    return None


async def read_backlog(chunks: AsyncIterator[bytes]) -> bytes:
    """What a log holds now: until it falls silent, or is long enough."""
    clock = asyncio.get_running_loop()
    until = clock.time() + _WHOLE_SECONDS
    body = bytearray()
    try:
        async with asyncio.timeout(_FIRST_SECONDS) as limit:
            async for chunk in chunks:
                body += chunk
                if len(body) > _MOST_BYTES:
                    break
                limit.reschedule(min(until, clock.time() + _QUIET_SECONDS))
    except TimeoutError:
        pass
    except httpx.HTTPError:
        if not body:
            raise
    return bytes(body)


def lines_of(stream: bytes) -> list[str]:
    """The lines in a stream of server-sent events, oldest first; what cannot be read is left out."""
    return [line[:_LONGEST_LINE] for line in _lines(stream.decode(errors="replace"))]


def _lines(text: str) -> Iterator[str]:
    # Only "\n" and "\r\n" end a line here: `splitlines` knows characters that may be part of a message.
    for row in text.split("\n"):
        name, _, value = row.rstrip("\r").partition(":")
        if name != "data":
            continue
        try:
            event = json.loads(value)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("source", "system") == "system":
            line = event.get("line")
            if isinstance(line, str):
                yield line
