"""The pull step of our deployments: the code is where the package is."""

from __future__ import annotations

from openweights_prefect import bundle


def use_bundle() -> dict[str, str]:
    """Name the folder of `flows/` on the machine where the flow runs; no path is stored in Prefect."""
    return {"directory": str(bundle.deploy_root())}
