"""What a pod computes with, and what a job needs of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """Cards of one type; equal to another spelling of the same, and printed as `2x A100`."""

    count: int
    gpu: str
    """Short name of the GPU type."""
    gpu_id: str = field(compare=False)
    """The provider's own id of the GPU type."""
    gpu_memory_gb: int = field(compare=False)
    """Memory of one card."""

    def __str__(self) -> str:
        return f"{self.count}x {self.gpu}"

    @property
    def memory_gb(self) -> int:
        """Memory of all cards together."""
        return self.count * self.gpu_memory_gb


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a job needs of its pod. `allowed_hardware` decides alone; the rest narrows either."""

    docker_image: str = ""
    requires_vram_gb: int = 0
    allowed_hardware: tuple[str, ...] | None = None
    """Such as `2x A100`, in order of preference."""
    max_price_per_hour: float | None = None
    """USD for the whole pod."""
    cloud: str | None = None
    """`SECURE` or `COMMUNITY`; None: either."""
    min_cuda: str | None = None
    """Lowest CUDA version of the host's driver, such as `12.8`."""
    min_vcpu: int = 0
    """Of the whole pod."""
    min_ram_gb: int = 0
    """Of the whole pod."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Needs:
        """Read them from a row of a job."""
        allowed, ceiling = row["allowed_hardware"], row["max_price_per_hour"]
        return cls(
            docker_image=row["docker_image"],
            requires_vram_gb=row["requires_vram_gb"] or 0,
            allowed_hardware=None if allowed is None else tuple(allowed),
            max_price_per_hour=None if ceiling is None else float(ceiling),
            cloud=row["cloud"],
            min_cuda=row["min_cuda"],
            min_vcpu=row["min_vcpu"] or 0,
            min_ram_gb=row["min_ram_gb"] or 0,
        )
