"""What the outside is shown of a pod, in REST v2's words."""

from __future__ import annotations

from typing import Any

from openweights_prefect.simulator.config import SimulatorConfig
from openweights_prefect.simulator.hosts import fingerprint
from openweights_prefect.simulator.model import ENDED, Phase, Pod, iso

_ENDED_STATUS = {Phase.STOPPED: "EXITED", Phase.ERRORED: "ERROR", Phase.TERMINATED: "TERMINATED"}
_DOCUMENTED = {
    Phase.ALLOCATING: "PROVISIONING",
    Phase.PULLING: "STARTING",
    Phase.CREATING: "STARTING",
    Phase.STUCK: "STARTING",
}
_ACTIONS = {
    "RUNNING": ["stop", "restart", "terminate"],
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "TERMINATED": [],
}
_INTERNAL_PORT = 19123
"""RunPod shows a port of its own beside those of the request."""


def status_of(pod: Pod, config: SimulatorConfig) -> str:
    """The word of the REST API."""
    if pod.phase in _ENDED_STATUS:
        return _ENDED_STATUS[pod.phase]
    return _DOCUMENTED.get(pod.phase, "RUNNING") if config.status_mode == "documented" else "RUNNING"


def allowed_actions(pod: Pod, config: SimulatorConfig) -> list[str]:
    """What `POST /action` accepts now."""
    return _ACTIONS[status_of(pod, config)]


def pod_body(
    pod: Pod, now: float, config: SimulatorConfig, *, skew_seconds: float = 0, fresh: bool = False
) -> dict[str, Any]:
    """The pod as REST v2 shows it; `fresh`: in the answer to its creation."""
    documented = config.status_mode == "documented"
    as_example = documented and fresh  # The documents' example of a create has these two oddities.
    started = pod.container_started_at if documented else pod.created_at
    free = config.cost_when_exited == "zero" and pod.phase in ENDED
    body = {
        "id": pod.id,
        "name": pod.name,
        "status": status_of(pod, config),
        "actions": ["start", "terminate"] if as_example else allowed_actions(pod, config),
        "image": pod.image,
        "args": pod.args,
        "disk": pod.disk,
        "env": pod.env,
        "ports": pod.ports,
        "registry": pod.registry,
        "cloud": pod.cloud,
        "dataCenterId": None if pod.phase is Phase.ALLOCATING else pod.data_center,
        "cudaVersion": pod.cuda,
        "mounts": {},
        "gpu": {"id": pod.gpu_id, "count": pod.gpu_count, "vcpuCount": pod.vcpu, "memory": pod.ram_gb},
        "ssh": _ssh(pod),
        "template": None,
        "cost": 0.0 if free else pod.price,
        "locked": pod.locked,
        "globalNetworking": {"enabled": False},
        "runtime": {} if as_example else runtime(pod, now),
        "createdAt": iso(pod.created_at + skew_seconds),
        "startedAt": None if started is None else iso(started),
    }
    if config.spec_level == "newest":
        body |= {"entrypoint": [], "cmd": []}
    return body


def runtime(pod: Pod, now: float) -> dict[str, Any] | None:
    """Telemetry of the container; None while there is none, or while none arrives."""
    is_up = pod.phase is Phase.UP or (pod.has("runtime_stale", now) and pod.phase not in ENDED)
    if not is_up or pod.container_started_at is None or pod.has("runtime_null", now):
        return None
    moment = pod.ailments.get("runtime_stale_since") or now
    ports = [
        {"private": _INTERNAL_PORT, "public": 60000 + pod.number, "type": "http", "ip": _address(pod)},
        *(_port(pod, text) for text in pod.ports),
    ]
    return {
        "uptime": max(1, int(moment - pod.container_started_at)),
        "gpus": [{"util": 0, "memoryUtil": 0} for _ in range(pod.gpu_count)],
        "cpu": {"util": 0},
        "memory": {"util": 1},
        "ports": ports,
    }


def _port(pod: Pod, text: str) -> dict[str, Any]:
    private, _, kind = text.partition("/")
    if kind == "http":
        return {"private": int(private), "public": 60000 + pod.number, "type": kind, "ip": _address(pod)}
    return {"private": int(private), "public": pod.public_ports.get(private), "type": kind, "ip": "127.0.0.1"}


def _address(pod: Pod) -> str:
    return f"100.65.{pod.number // 250 % 250}.{pod.number % 250 + 1}"


def _ssh(pod: Pod) -> dict[str, Any]:
    if pod.phase in (Phase.ALLOCATING, *ENDED):
        return {"proxy": None, "direct": None}
    username = f"{pod.id}-{fingerprint(pod.host)}"
    proxy = {"host": "ssh.runpod.io", "port": 22, "username": username}
    public, direct = pod.public_ports.get("22"), None
    if public is not None:
        command = f"ssh root@127.0.0.1 -p {public}"
        direct = {"host": "127.0.0.1", "port": public, "username": "root", "command": command}
    return {"proxy": {**proxy, "command": f"ssh {username}@ssh.runpod.io"}, "direct": direct}
