"""The server's own description of its API against what the client sends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from answering_server import AnsweringServer, answer

from openweights_prefect.provisioning.provider import PodRequest
from openweights_prefect.provisioning.runpod.client import RunPodClient
from openweights_prefect.provisioning.runpod.contract import (
    CREATE_KEYS,
    GPU_KEYS,
    HOST_MINIMA,
    Contract,
    check_contract,
    compare,
)
from openweights_prefect.provisioning.runpod.creation import create_body

KEY = "rpa_secret_key_of_a_test"
# In the form of RunPod's: composed of parts, which refer to each other.
DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "paths": {
        "/v2/pods": {
            "get": {},
            "post": {
                "requestBody": {
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/CreatePodRequest"}}
                    }
                }
            },
        },
        "/v2/pods/{podId}": {"parameters": [], "get": {}, "delete": {}},
        "/v2/pods/{podId}/logs": {"get": {}},
        "/v2/catalog/gpus": {"get": {}},
    },
    "components": {
        "schemas": {
            "Container": {
                "allOf": [
                    {"properties": {"image": {}, "disk": {}, "env": {}}},
                    {"properties": {"args": {}}},
                ]
            },
            "Gpu": {"required": ["id"], "properties": {"id": {}, "count": {}}},
            "CreateGpu": {
                "allOf": [{"$ref": "#/components/schemas/Gpu"}, {"properties": {"minCudaVersion": {}}}]
            },
            "CreatePodRequest": {
                "allOf": [
                    {"$ref": "#/components/schemas/Container"},
                    {
                        "required": ["name"],
                        "properties": {
                            "name": {},
                            "cloud": {},
                            "gpu": {"$ref": "#/components/schemas/CreateGpu"},
                        },
                    },
                ],
                "unevaluatedProperties": False,
            },
        }
    },
}


def _changed(**schemas: object) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    document["components"]["schemas"].update(schemas)
    return document


def test_the_keys_that_are_checked_are_those_that_are_sent() -> None:
    """A key that is sent without being in the list would never be checked."""
    request = PodRequest(
        name="n", image="i", gpu_id="g", gpu_count=1, cloud="SECURE", disk_gb=1, env={"A": "1"}, args="x",
        min_cuda="12.8", min_vcpu_per_gpu=2, min_ram_gb_per_gpu=3,
    )  # fmt: skip
    body = create_body(request, host_minima=True)
    assert {*body} == {*CREATE_KEYS}
    assert {*body["gpu"]} == {*GPU_KEYS, *HOST_MINIMA}
    assert {*create_body(request, host_minima=False)["gpu"]} == {*GPU_KEYS}


def test_a_server_as_expected_has_no_problems() -> None:
    """And whether it knows the minima of a machine is told apart: older servers do not."""
    assert compare(DOCUMENT) == ([], False)
    newer = {"properties": {key: {"type": "string"} for key in (*GPU_KEYS, *HOST_MINIMA)}}
    assert compare(_changed(CreateGpu=newer)) == ([], True)
    half = {"properties": {key: {"type": "string"} for key in (*GPU_KEYS, HOST_MINIMA[0])}}
    assert compare(_changed(CreateGpu=half)) == ([], False)


def test_what_is_gone_is_named() -> None:
    """Endpoints, keys of the body, keys of the GPU, and a key that is demanded."""
    document = _changed(
        CreateGpu={"properties": {"id": {}, "count": {}}},
        Container={"properties": {"image": {}, "disk": {}, "env": {}}, "required": ["region"]},
    )
    del document["paths"]["/v2/pods/{podId}"]["delete"]
    del document["paths"]["/v2/catalog/gpus"]
    problems = compare(document).problems
    expected = ("DELETE /pods/{id}", "GET /catalog/gpus", "`args`", "`gpu.minCudaVersion`", "`region`")
    assert len(problems) == len(expected)
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem
    without_body = copy.deepcopy(DOCUMENT)
    without_body["paths"]["/v2/pods"]["post"] = {}
    [problem] = compare(without_body).problems
    assert "not checked" in problem


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "#/components/schemas/CreatePodRequest"}, {"$ref": "elsewhere.json"}, {"allOf": 3}, {}],
)
def test_a_crooked_description_is_no_crash(schema: object) -> None:
    """References in circles, to nowhere or outside leave keys unknown."""
    problems = compare(_changed(CreatePodRequest=schema)).problems
    assert len(problems) == len(CREATE_KEYS)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_description_is_read_without_the_key(anyio_backend: str) -> None:
    """One unauthenticated request; a description that cannot be read is a problem in words, not an error."""
    server, outcome = await _checked(answer(200, DOCUMENT))
    assert outcome == ([], False)
    assert server.heads[0].startswith("GET /v2/openapi.json HTTP")
    assert KEY not in server.heads[0]
    async with RunPodClient(base_url=server.url, api_key=KEY) as client:
        assert "could not be read" in (await check_contract(client)).problems[0]
    for body in ("<html>", "[]", "{}", '{"paths": []}'):
        _, outcome = await _checked(answer(200, body))
        assert "could not be read" in outcome.problems[0]


async def _checked(said: str) -> tuple[AnsweringServer, Contract]:
    async with AnsweringServer(said) as server, RunPodClient(base_url=server.url, api_key=KEY) as client:
        return server, await check_contract(client)
