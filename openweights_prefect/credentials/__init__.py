"""Prefect block types: the accounts and stores of a workspace.

Prefect finds them through `collection.py`. `ow up` makes its server offer them, and
`prefect block register -m openweights_prefect.credentials` any server.
"""

from __future__ import annotations

from openweights_prefect.credentials.accounts import HuggingFaceCredentials, RunPodCredentials
from openweights_prefect.credentials.organization import OpenWeightsOrganization
from openweights_prefect.credentials.supabase import SupabaseCredentials, SupabaseStorage

__all__ = [
    "BLOCK_TYPES",
    "HuggingFaceCredentials",
    "OpenWeightsOrganization",
    "RunPodCredentials",
    "SupabaseCredentials",
    "SupabaseStorage",
]

BLOCK_TYPES = (
    HuggingFaceCredentials,
    OpenWeightsOrganization,
    RunPodCredentials,
    SupabaseCredentials,
    SupabaseStorage,
)
"""All of them."""
