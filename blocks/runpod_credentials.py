"""Saves the RunPod account as a block document: `python blocks/runpod_credentials.py [NAME]`."""

from __future__ import annotations

import os

from openweights_prefect.credentials import RunPodCredentials
from openweights_prefect.orchestration.block_documents import Variables, run
from openweights_prefect.settings import Settings


def runpod_credentials(variables: Variables) -> RunPodCredentials:
    """From RUNPOD_API_KEY; OW_RUNPOD_API_URL where it is not RunPod's own."""
    [api_key] = variables.required("RUNPOD_API_KEY")
    api_url = variables.optional("OW_RUNPOD_API_URL") or Settings.runpod_api_url
    return RunPodCredentials(api_key=api_key, api_url=api_url)


if __name__ == "__main__":
    run(runpod_credentials, os.environ)
