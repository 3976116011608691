"""Saves the Hugging Face account as a block document: `python blocks/hugging_face_credentials.py [NAME]`."""

from __future__ import annotations

import os

from openweights_prefect.credentials import HuggingFaceCredentials
from openweights_prefect.orchestration.block_documents import Variables, run


def hugging_face_credentials(variables: Variables) -> HuggingFaceCredentials:
    """From HF_TOKEN."""
    [token] = variables.required("HF_TOKEN")
    return HuggingFaceCredentials(token=token)


if __name__ == "__main__":
    run(hugging_face_credentials, os.environ)
