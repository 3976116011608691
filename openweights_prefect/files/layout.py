"""Where an object lies in a folder or a bucket; in Supabase Storage, policies begin with the organization."""

from __future__ import annotations

from openweights_prefect.types.identity import checked_organization_id, parse_file_id
from openweights_prefect.types.paths import safe_relative_path

# Not a purpose, which has no hyphen: a file id and the key of a result never name one object.
_RESULTS = "flow-results"


def file_path(file_id: str, organization_id: str) -> str:
    """`organizations/{organization_id}/{purpose}/{file-...}`; raises `InvalidParameterError`."""
    parsed = parse_file_id(file_id)
    return f"{_organization(organization_id)}/{parsed.purpose}/{parsed.name}"


def result_path(key: str, organization_id: str) -> str:
    """`organizations/{organization_id}/flow-results/{key}`; raises `InvalidParameterError` for a bad key.

    A key is what Prefect makes of a cache policy or a user's `result_storage_key`: any text, hence checked.
    """
    return f"{_organization(organization_id)}/{_RESULTS}/{safe_relative_path(key)}"


def _organization(organization_id: str) -> str:
    return f"organizations/{checked_organization_id(organization_id)}"
