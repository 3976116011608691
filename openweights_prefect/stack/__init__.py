"""The local stack: everything on one machine."""

from __future__ import annotations
