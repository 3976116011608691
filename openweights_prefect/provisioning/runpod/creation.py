"""What is asked of RunPod for one pod, and whether that is what came."""

from __future__ import annotations

from typing import Any

from openweights_prefect.provisioning.provider import PodRequest, ProviderPod


def create_body(request: PodRequest, *, host_minima: bool) -> dict[str, Any]:
    """The body of `POST /pods`: no key more than needed, for one that the server does not know is refused.

    `host_minima`: the server knows `contract.HOST_MINIMA`.
    """
    gpu: dict[str, Any] = {"id": request.gpu_id, "count": request.gpu_count}
    if request.min_cuda:
        gpu["minCudaVersion"] = request.min_cuda
    if host_minima and request.min_ram_gb_per_gpu:
        gpu["minRamPerGpu"] = request.min_ram_gb_per_gpu
    if host_minima and request.min_vcpu_per_gpu:
        gpu["minVcpuCountPerGpu"] = request.min_vcpu_per_gpu
    body: dict[str, Any] = {
        "name": request.name,
        "image": request.image,
        "gpu": gpu,
        "cloud": request.cloud,
        "disk": request.disk_gb,
        "env": dict(request.env),
    }
    if request.args:
        body["args"] = request.args
    return body


def disappointment(request: PodRequest, pod: ProviderPod) -> str | None:
    """What the pod that came lacks of what was asked for; what it does not tell is not held against it."""
    ceiling = request.price_ceiling
    if ceiling is not None and pod.cost_per_hour > ceiling:
        return f"Pod {pod.id!r} costs {pod.cost_per_hour!r} USD/h, more than the ceiling {ceiling!r}"
    vcpu = request.gpu_count * (request.min_vcpu_per_gpu or 0)
    if 0 < pod.vcpu < vcpu:
        return f"Pod {pod.id!r} has {pod.vcpu} vCPU, and {vcpu} were asked for"
    ram_gb = request.gpu_count * (request.min_ram_gb_per_gpu or 0)
    if 0 < pod.ram_gb < ram_gb:
        return f"Pod {pod.id!r} has {pod.ram_gb} GB of RAM, and {ram_gb} were asked for"
    return None
