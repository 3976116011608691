"""What REST v2 says to a create request that is not right, with RunPod's own words where they are known."""

from __future__ import annotations

import re
from typing import Any

from openweights_prefect.provisioning.hardware import gpu_by_id
from openweights_prefect.simulator.fleet import Rental

MOST_ENV_VARIABLES = 50

_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "image": (str,),
    "args": (str,),
    "disk": (int,),
    "env": (dict,),
    "ports": (list,),
    "registry": (str, type(None)),
    "cloud": (str,),
    "dataCenterIds": (list,),
    "gpu": (dict,),
    "cpu": (dict,),
    "mounts": (dict,),
    "globalNetworking": (bool,),
    "startSsh": (bool,),
    "startJupyter": (bool,),
    "templateId": (str,),
}
_GPU_KEYS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "count": (int,),
    "allowedCudaVersions": (list,),
    "minCudaVersion": (str,),
    "minRamPerGpu": (int,),
    "minVcpuCountPerGpu": (int,),
}
_NAMES: dict[type, str] = {str: "string", int: "integer", dict: "object", list: "array", bool: "boolean"}
_VERSION = re.compile(r"\d+(\.\d+)*")


class Invalid(Exception):
    """A refusal: its status, its text, and the single violations."""

    def __init__(self, status: int, detail: str, errors: list[str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors


def parse_rental(body: object) -> Rental:
    """Check a create request as RunPod does; raises `Invalid`."""
    errors = _violations(body)
    if errors or not isinstance(body, dict):
        raise Invalid(422, "Request validation failed.", errors)
    _check_rules(body)
    gpu = body["gpu"]
    if gpu_by_id(gpu["id"]) is None:
        raise Invalid(422, f"Unknown GPU type: {gpu['id']}")
    return Rental(
        name=body["name"],
        image=body["image"],
        gpu_id=gpu["id"],
        # Live, a create without a count found no instances, in spite of the documented default of 1.
        gpu_count=gpu.get("count", 0),
        cloud=body.get("cloud", "SECURE"),
        disk=body.get("disk", 20),
        args=body.get("args", ""),
        env=body.get("env", {}),
        min_cuda=gpu.get("minCudaVersion"),
        data_centers=body.get("dataCenterIds", []),
    )


def _violations(body: object) -> list[str]:
    if not isinstance(body, dict):
        return ["$: got another type, want object"]
    errors = [f"$: missing property '{name}'" for name in ("name", "image") if name not in body]
    errors += _type_errors("$", body, _KEYS)
    if isinstance(body.get("gpu"), dict):
        if "id" not in body["gpu"]:
            errors.append("$.gpu: missing property 'id'")
        errors += _type_errors("$.gpu", body["gpu"], _GPU_KEYS)
    if errors:
        return errors
    if body.get("name") == "":
        errors.append("$.name: minLength: got 0, want 1")
    errors += [f"$.disk: minimum: got {body['disk']}, want 1"] if body.get("disk", 1) < 1 else []
    count = body.get("gpu", {}).get("count", 1)
    errors += [f"$.gpu.count: minimum: got {count}, want 1"] if count < 1 else []
    errors += [
        f"$.env.{k}: got another type, want string"
        for k, v in body.get("env", {}).items()
        if type(v) is not str
    ]
    if body.get("cloud", "SECURE") not in ("SECURE", "COMMUNITY"):
        errors.append("$.cloud: value must be one of 'SECURE', 'COMMUNITY'")
    return errors


def _type_errors(path: str, body: dict[str, Any], keys: dict[str, tuple[type, ...]]) -> list[str]:
    errors = []
    for key, value in body.items():
        if key not in keys:
            errors.append(f"{path}: additional properties '{key}' not allowed")
        elif type(value) not in keys[key]:
            errors.append(f"{path}.{key}: got another type, want {_NAMES[keys[key][0]]}")
    return errors


def _check_rules(body: dict[str, Any]) -> None:
    gpu = body.get("gpu", {})
    if ("gpu" in body) == ("cpu" in body):
        raise Invalid(400, "gpu and cpu are mutually exclusive and one of them is required")
    if "cpu" in body or "templateId" in body or body.get("mounts"):
        raise Invalid(400, "CPU pods, templates and mounts are not simulated")
    if "allowedCudaVersions" in gpu and "minCudaVersion" in gpu:
        raise Invalid(400, "allowedCudaVersions and minCudaVersion are mutually exclusive")
    if not _VERSION.fullmatch(gpu.get("minCudaVersion", "0")):
        raise Invalid(400, f"{gpu['minCudaVersion']} is not a valid CUDA version")
    if len(body.get("env", {})) > MOST_ENV_VARIABLES:
        raise Invalid(400, f"env is not a valid environment: at most {MOST_ENV_VARIABLES} variables")
