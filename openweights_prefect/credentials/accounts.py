"""Accounts at RunPod and Hugging Face."""

from __future__ import annotations

from typing import ClassVar

from prefect.blocks.abstract import CredentialsBlock
from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr

from openweights_prefect.credentials import forms
from openweights_prefect.provisioning.runpod.client import RunPodClient
from openweights_prefect.settings import Settings


class RunPodCredentials(CredentialsBlock):
    """The RunPod account that pays for pods.

    Example:
        Ask RunPod for the pods of the account:
        ```python
        from openweights_prefect.credentials import RunPodCredentials

        credentials = RunPodCredentials.load("BLOCK_NAME")
        async with credentials.get_client() as runpod:
            pods = await runpod.list()
        ```
    """

    _block_type_name = "RunPod Credentials"
    _block_type_slug = "runpod-credentials"
    _description = "The RunPod account that pays for pods."
    _documentation_url = HttpUrl("https://docs.runpod.io/get-started/api-keys")
    _logo_url = forms.SECRET_LOGO
    model_config: ClassVar[ConfigDict] = forms.HIDDEN

    api_key: SecretStr = Field(
        title="API Key",
        description="An API key of RunPod that may create and terminate pods.",
        examples=["rpa_1A2B3C4D5E6F7G8H9I0J"],
    )
    api_url: str = Field(
        default=Settings.runpod_api_url,
        title="API URL",
        description="Base URL of RunPod's REST v2, or of a simulated RunPod.",
        examples=["https://api.runpod.io/v2"],
    )

    def block_initialization(self) -> None:
        """Check the form of the fields, without asking RunPod; raises `ConfigurationError`."""
        forms.check_token(self, "api_key", "RUNPOD_API_KEY", forms.RUNPOD_KEY)
        self.api_url = forms.checked_url(self, "api_url", "OW_RUNPOD_API_URL")

    def get_client(self) -> RunPodClient:
        """A client of the account; an async context manager."""
        return RunPodClient(base_url=self.api_url, api_key=self.api_key.get_secret_value())


class HuggingFaceCredentials(Block):
    """The Hugging Face account that reads private and gated models, and pushes trained ones.

    Example:
        Log a child process in:
        ```python
        from openweights_prefect.credentials import HuggingFaceCredentials

        credentials = HuggingFaceCredentials.load("BLOCK_NAME")
        subprocess.run(command, env={**os.environ, **credentials.get_environment()})
        ```
    """

    _block_type_name = "Hugging Face Credentials"
    _block_type_slug = "hugging-face-credentials"
    _description = "The Hugging Face account that reads private and gated models, and pushes trained ones."
    _documentation_url = HttpUrl("https://huggingface.co/docs/hub/security-tokens")
    _logo_url = forms.SECRET_LOGO
    model_config: ClassVar[ConfigDict] = forms.HIDDEN

    token: SecretStr = Field(
        description="A user access token of Hugging Face; `write` is needed to push models.",
        examples=["hf_1a2B3c4D5e6F7g8H9i0J"],
    )

    def block_initialization(self) -> None:
        """Check the form of the token, without asking Hugging Face; raises `ConfigurationError`."""
        forms.check_token(self, "token", "HF_TOKEN", forms.HUGGING_FACE_TOKEN)

    def get_token(self) -> str:
        """The token itself, for `token=` of Hugging Face's libraries."""
        return self.token.get_secret_value()

    def get_environment(self) -> dict[str, str]:
        """The variable by which Hugging Face's libraries log in."""
        return {"HF_TOKEN": self.get_token()}
