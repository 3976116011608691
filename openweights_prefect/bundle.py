"""Where the deployable files are: `blocks/`, `flows/`, `infrastructure/`, `prefect.yaml`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def deploy_root() -> Path:
    """Folder of `blocks/`, `flows/`, `infrastructure/` and `prefect.yaml`, in a wheel or a checkout."""
    bundled = _PACKAGE / "_bundle"
    return bundled if bundled.is_dir() else _PACKAGE.parent


def migrations() -> Path:
    """Folder of the SQL migrations, in the layout of the Supabase CLI."""
    return deploy_root() / "infrastructure" / "supabase" / "migrations"
