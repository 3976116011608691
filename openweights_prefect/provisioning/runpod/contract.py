"""Whether RunPod still takes the requests that we send, by its own description of its API."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from openweights_prefect.errors import ProviderError

CREATE_KEYS = ("name", "image", "gpu", "cloud", "disk", "env", "args")
"""Keys of our body of a creation; a key that RunPod does not know is refused with 422."""
GPU_KEYS = ("id", "count", "minCudaVersion")
HOST_MINIMA = ("minRamPerGpu", "minVcpuCountPerGpu")
"""Keys of `gpu` that only newer servers know; they are sent when one is asked for, and known."""

_OPERATIONS = (
    ("get", "/pods"),
    ("post", "/pods"),
    ("get", "/pods/{}"),
    ("delete", "/pods/{}"),
    ("get", "/pods/{}/logs"),
    ("get", "/catalog/gpus"),
)
_PLACEHOLDER = re.compile(r"\{[^}]*\}")
_DEEPEST = 20


class Specified(Protocol):
    """A server that describes itself."""

    async def specification(self) -> Mapping[str, Any]:
        """Its OpenAPI document; raises `ProviderError` when there is none to read."""
        ...


class Contract(NamedTuple):
    """How the server's description compares with what we send."""

    problems: list[str]
    """In words for people; empty when all is well."""
    host_minima: bool
    """The server knows `HOST_MINIMA`."""


async def check_contract(client: Specified) -> Contract:
    """Read the server's description and compare; one that cannot be read is a problem, not an error."""
    try:
        document = await client.specification()
    except ProviderError as exc:
        problem = f"RunPod's description of its API could not be read, so nothing was checked: {exc}"
        return Contract([problem], host_minima=False)
    return compare(document)


def compare(document: Mapping[str, Any]) -> Contract:
    """Compare an OpenAPI document with what we send."""
    described = _mapping(document.get("paths"))
    paths = {_plain(path): _mapping(operations) for path, operations in described.items()}
    problems = [
        f"RunPod's API has no `{method.upper()} {path.replace('{}', '{id}')}` any more. Update this package."
        for method, path in _OPERATIONS
        if method not in paths.get(path, {})
    ]
    body = _create_schema(document, _mapping(paths.get("/pods", {}).get("post")))
    if body is None:
        problem = "RunPod does not describe the body of a creation, so its keys were not checked."
        return Contract([*problems, problem], host_minima=False)
    properties, gpu = _properties(document, body), {}
    if "gpu" in properties:
        gpu = _properties(document, _mapping(properties["gpu"]))
    unknown = [key for key in CREATE_KEYS if key not in properties]
    unknown += [f"gpu.{key}" for key in GPU_KEYS if "gpu" in properties and key not in gpu]
    problems += [
        f"RunPod does not know the key `{key}` of a creation, and refuses ours for it. Update this package."
        for key in unknown
    ]
    problems += [
        f"RunPod demands the key `{key}` of a creation, which we do not send. Update this package."
        for key in sorted(_required(document, body) - {*CREATE_KEYS})
    ]
    return Contract(problems, host_minima=all(key in gpu for key in HOST_MINIMA))


def _create_schema(document: Mapping[str, Any], operation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    content = _mapping(_resolved(document, _mapping(operation.get("requestBody"))).get("content"))
    schema = _mapping(content.get("application/json")).get("schema")
    return schema if isinstance(schema, dict) else None


def _properties(document: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in _parts(document, schema):
        found.update(_mapping(part.get("properties")))
    return found


def _required(document: Mapping[str, Any], schema: Mapping[str, Any]) -> set[str]:
    lists = (part.get("required") for part in _parts(document, schema))
    return {str(key) for names in lists if isinstance(names, list) for key in names}


def _parts(
    document: Mapping[str, Any], schema: Mapping[str, Any], depth: int = 0
) -> Iterator[dict[str, Any]]:
    """A schema and all that it is composed of."""
    here = _resolved(document, schema)
    yield here
    composed = here.get("allOf")
    if depth < _DEEPEST and isinstance(composed, list):
        for part in composed:
            yield from _parts(document, _mapping(part), depth + 1)


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    for _ in range(_DEEPEST):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        target: object = document
        for key in reference.removeprefix("#/").split("/"):
            target = _mapping(target).get(key)
        schema = _mapping(target)
    return dict(schema)


def _plain(path: str) -> str:
    return _PLACEHOLDER.sub("{}", path).removeprefix("/v2")


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
