"""Puts the deployable folders into the wheel; an editable install finds them in the checkout."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUNDLED = ("blocks", "flows", "infrastructure", "prefect.yaml")


class BundleHook(BuildHookInterface[Any]):
    """Maps the deployable folders to `openweights_prefect/_bundle/`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folders to a standard wheel, and nothing to an editable one."""
        if version != "editable":
            build_data["force_include"].update(
                {name: f"openweights_prefect/_bundle/{name}" for name in BUNDLED}
            )
