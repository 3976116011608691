"""Saves the file store as a block document: `python blocks/supabase_storage.py [NAME]`."""

from __future__ import annotations

import os

from openweights_prefect.credentials import SupabaseCredentials, SupabaseStorage
from openweights_prefect.orchestration.block_documents import Variables, run


def supabase_storage(variables: Variables) -> SupabaseStorage:
    """The organization's folder of flow results, in the bucket `files`.

    From SUPABASE_URL, SUPABASE_ANON_KEY, OPENWEIGHTS_API_KEY and OW_ORGANIZATION_ID. The credentials become a
    document of their own, of the same name.
    """
    url, key, token, organization_id = variables.required(
        "SUPABASE_URL", "SUPABASE_ANON_KEY", "OPENWEIGHTS_API_KEY", "OW_ORGANIZATION_ID"
    )
    return SupabaseStorage(
        bucket="files",
        basepath=f"{organization_id}/flow-results",
        credentials=SupabaseCredentials(url=url, key=key, token=token),
    )


if __name__ == "__main__":
    run(supabase_storage, os.environ)
