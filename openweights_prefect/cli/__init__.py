"""The command `ow`."""

from __future__ import annotations
