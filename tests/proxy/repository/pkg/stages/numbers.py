"""What the flow imports."""

from __future__ import annotations


def doubled(number: int) -> int:
    """Twice the number."""
    return 2 * number
