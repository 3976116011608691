"""Saves the Supabase project as a block document: `python blocks/supabase_credentials.py [NAME]`."""

from __future__ import annotations

import os

from openweights_prefect.credentials import SupabaseCredentials
from openweights_prefect.orchestration.block_documents import Variables, run


def supabase_credentials(variables: Variables) -> SupabaseCredentials:
    """From SUPABASE_URL, SUPABASE_ANON_KEY and OPENWEIGHTS_API_KEY."""
    url, key, token = variables.required("SUPABASE_URL", "SUPABASE_ANON_KEY", "OPENWEIGHTS_API_KEY")
    return SupabaseCredentials(url=url, key=key, token=token)


if __name__ == "__main__":
    run(supabase_credentials, os.environ)
