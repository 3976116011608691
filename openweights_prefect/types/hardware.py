"""What a pod computes with: a number of cards of one GPU type."""

from __future__ import annotations

from dataclasses import dataclass, field


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
