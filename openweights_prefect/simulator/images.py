"""Which command and environment an image stands for."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from openweights_prefect.simulator.config import Image
from openweights_prefect.simulator.hosts import fingerprint
from openweights_prefect.simulator.model import Pod

_BUILT_IN = ("sleep", "exit:*", "exit-after:*", "http:*", "ignore-term", "env-dump", "fork", "oom")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAM = Path(__file__).with_name("container_programs.py")


def find_image(name: str, configured: Mapping[str, Image]) -> Image | None:
    """The configured image whose glob matches first, else a built-in one (`sim/...`), else None."""
    for glob, image in configured.items():
        if fnmatchcase(name, glob):
            return image
    if any(fnmatchcase(name, f"sim/{built_in}") for built_in in _BUILT_IN):
        return Image(entrypoint=(sys.executable, "-I", "-S", str(_PROGRAM), name.removeprefix("sim/")))
    return None


def command(image: Image, args: str) -> list[str]:
    """The container's command line: `args` replaces the image's CMD, or, as JSON, its entrypoint too."""
    entrypoint, cmd = image.entrypoint, image.cmd
    override = _json_args(args)
    if override is not None:
        if "entrypoint" in override:
            entrypoint, cmd = tuple(override["entrypoint"]), ()
        cmd = tuple(override.get("cmd", cmd))
    elif args:
        cmd = tuple(shlex.split(args))
    return [*entrypoint, *cmd]


def environment(
    image: Image, pod: Pod, *, programs: Path, base_url: str, listen: Mapping[str, int]
) -> dict[str, str]:
    """The environment of a pod's container, from nothing: the image's, RunPod's, and last the request's.

    `programs` is the folder of the host's programs, first on the path; `listen` tells at which port of the
    loopback address the container must bind what it calls its port.
    """
    own = {
        "RUNPOD_POD_HOSTNAME": f"{pod.id}-{fingerprint(pod.host)}",
        "RUNPOD_DC_ID": pod.data_center or "",
        "RUNPOD_GPU_COUNT": str(pod.gpu_count),
        "RUNPOD_GPU_NAME": pod.gpu_id,
        "RUNPOD_CPU_COUNT": str(pod.vcpu),
        "RUNPOD_MEM_GB": str(pod.ram_gb),
        "RUNPOD_PUBLIC_IP": "127.0.0.1",
        "RUNPOD_API_KEY": f"rpa_pod_{pod.id}",
        # What a program of RunPod's in a pod reaches RunPod by; the real ones need no telling.
        "RUNPOD_API_BASE_URL": base_url,
        "CUDA_VERSION": pod.cuda,
        **{f"RUNPOD_TCP_PORT_{private}": str(public) for private, public in pod.public_ports.items()},
        **{f"RUNPOD_SIM_LISTEN_{private}": str(port) for private, port in listen.items()},
    }
    merged = {"PATH": _PATH, "LANG": "C.UTF-8", **image.env, **own, **pod.env}
    return {**merged, "PATH": f"{programs}:{merged['PATH']}"}


def _json_args(args: str) -> dict[str, list[str]] | None:
    try:
        document = json.loads(args)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None
