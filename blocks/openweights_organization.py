"""Saves the organization as a block document: `python blocks/openweights_organization.py [NAME]`."""

from __future__ import annotations

import os

from openweights_prefect.credentials import OpenWeightsOrganization, SupabaseCredentials
from openweights_prefect.orchestration.block_documents import Variables, run


def openweights_organization(variables: Variables) -> OpenWeightsOrganization:
    """From OW_ORGANIZATION_ID, and the variables of `supabase_credentials` when SUPABASE_URL is set.

    Without that the block acts with the settings of the process that loads it. The credentials become a
    document of their own, of the same name.
    """
    [organization_id] = variables.required("OW_ORGANIZATION_ID")
    credentials = None
    if variables.optional("SUPABASE_URL"):
        url, key, token = variables.required("SUPABASE_URL", "SUPABASE_ANON_KEY", "OPENWEIGHTS_API_KEY")
        credentials = SupabaseCredentials(url=url, key=key, token=token)
    return OpenWeightsOrganization(
        organization_id=organization_id,
        name=variables.optional("OW_ORGANIZATION_NAME") or "",
        credentials=credentials,
    )


if __name__ == "__main__":
    run(openweights_organization, os.environ)
