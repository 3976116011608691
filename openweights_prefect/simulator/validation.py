"""What REST v2 says to a create request that is not right, with RunPod's own words where they are known."""

from __future__ import annotations

import json
import re
from typing import Any

from openweights_prefect.provisioning.hardware import gpu_by_id
from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.model import Pod, Rental

MOST_ENV_VARIABLES = 50
MOST_HTTP_PORTS = 10
ACTIONS = ("start", "stop", "restart", "terminate")

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
_NEWEST_KEYS: dict[str, tuple[type, ...]] = {"entrypoint": (list,), "cmd": (list,)}
_PATCH_KEYS = ("name", "image", "args", "disk", "env", "ports", "registry", "mounts", "templateId")
_GPU_KEYS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "count": (int,),
    "allowedCudaVersions": (list,),
    "minCudaVersion": (str,),
}
_NEWEST_GPU_KEYS: dict[str, tuple[type, ...]] = {
    "minRamPerGpu": (int,),
    "minVcpuCountPerGpu": (int,),
}
_NAMES: dict[type, str] = {str: "string", int: "integer", dict: "object", list: "array", bool: "boolean"}
_VERSION = re.compile(r"\d+(\.\d+)*")
_PORT = re.compile(r"\d+/(http|tcp)")


class Invalid(Exception):
    """A refusal: its status, its text, and the single violations."""

    def __init__(self, status: int, detail: str, errors: list[str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors


def parse_rental(body: object, config: SimulatorConfig) -> Rental:
    """Check a create request as RunPod does; raises `Invalid`."""
    newest = config.spec_level == "newest"
    keys = {**_KEYS, **(_NEWEST_KEYS if newest else {})}
    errors = _violations(body, keys, {**_GPU_KEYS, **(_NEWEST_GPU_KEYS if newest else {})})
    if errors or not isinstance(body, dict):
        raise Invalid(422, "Request validation failed.", errors)
    _check_rules(body)
    gpu = body["gpu"]
    if gpu_by_id(gpu["id"]) is None:
        raise Invalid(422, f"Unknown GPU type: {gpu['id']}")
    if body.get("registry") not in (None, *config.registries):
        raise Invalid(404, "resource not found")
    return Rental(
        name=body["name"],
        image=body["image"],
        gpu_id=gpu["id"],
        gpu_count=gpu.get("count", 0 if config.quirk_missing_count else 1),
        cloud=body.get("cloud", "SECURE"),
        disk=body.get("disk", 20),
        args=_args(body),
        env=body.get("env", {}),
        ports=body.get("ports", []),
        registry=body.get("registry"),
        min_cuda=gpu.get("minCudaVersion"),
        allowed_cuda=gpu.get("allowedCudaVersions", []),
        min_vcpu_per_gpu=gpu.get("minVcpuCountPerGpu", 0),
        min_ram_per_gpu=gpu.get("minRamPerGpu", 0),
        data_centers=body.get("dataCenterIds", []),
    )


def parse_action(body: object) -> str:
    """Check the body of `POST /pods/{id}/action`; raises `Invalid`."""
    if not isinstance(body, dict) or "action" not in body:
        raise Invalid(422, "Request validation failed.", ["$: missing property 'action'"])
    if body["action"] not in ACTIONS:
        known = ", ".join(f"'{action}'" for action in ACTIONS)
        raise Invalid(422, "Request validation failed.", [f"$.action: value must be one of {known}"])
    return str(body["action"])


def apply_patch(pod: Pod, body: object) -> bool:
    """Check a PATCH and put it into the pod; returns whether its container must start anew."""
    keys = {key: _KEYS[key] for key in _PATCH_KEYS} | {"locked": (bool,), "globalNetworking": (bool,)}
    if not isinstance(body, dict):
        raise Invalid(422, "Request validation failed.", ["$: got another type, want object"])
    if errors := _type_errors("$", body, keys) + _value_errors(body):
        raise Invalid(422, "Request validation failed.", errors)
    if body.get("mounts") or "templateId" in body:
        raise Invalid(400, "Templates and mounts are not simulated")
    for key in ("name", "image", "args", "disk", "env", "ports", "registry", "locked"):
        if key in body:
            setattr(pod, key, body[key])
    return bool(body.keys() - {"name", "locked"})


def _args(body: dict[str, Any]) -> str:
    given = {key: body[key] for key in _NEWEST_KEYS if body.get(key)}
    return json.dumps(given) if given else str(body.get("args", ""))


def _violations(
    body: object, keys: dict[str, tuple[type, ...]], gpu_keys: dict[str, tuple[type, ...]]
) -> list[str]:
    if not isinstance(body, dict):
        return ["$: got another type, want object"]
    errors = [f"$: missing property '{name}'" for name in ("name", "image") if name not in body]
    errors += _type_errors("$", body, keys)
    if isinstance(body.get("gpu"), dict):
        if "id" not in body["gpu"]:
            errors.append("$.gpu: missing property 'id'")
        errors += _type_errors("$.gpu", body["gpu"], gpu_keys)
    return errors or _value_errors(body)


def _value_errors(body: dict[str, Any]) -> list[str]:
    errors = []
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
    errors += [
        f"$.ports.{number}: does not match pattern"
        for number, port in enumerate(body.get("ports", []))
        if not _PORT.fullmatch(str(port))
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
    if sum(port.endswith("/http") for port in body.get("ports", [])) > MOST_HTTP_PORTS:
        raise Invalid(400, f"ports is not a valid list: at most {MOST_HTTP_PORTS} http ports")
    if body.get("args") and (body.get("entrypoint") or body.get("cmd")):
        raise Invalid(400, "args and entrypoint/cmd are mutually exclusive unless they agree")
    if not _VERSION.fullmatch(gpu.get("minCudaVersion", "0")):
        raise Invalid(400, f"{gpu['minCudaVersion']} is not a valid CUDA version")
    if len(body.get("env", {})) > MOST_ENV_VARIABLES:
        raise Invalid(400, f"env is not a valid environment: at most {MOST_ENV_VARIABLES} variables")
