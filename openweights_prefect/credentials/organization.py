"""An organization, and the client that acts for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prefect.blocks.abstract import CredentialsBlock
from pydantic import ConfigDict, Field, HttpUrl

from openweights_prefect.credentials import forms
from openweights_prefect.credentials.supabase import SupabaseCredentials
from openweights_prefect.types.identity import checked_organization_id

if TYPE_CHECKING:
    from openweights_prefect import OpenWeights


class OpenWeightsOrganization(CredentialsBlock):
    """The organization that a flow submits jobs for.

    Example:
        Submit a job from a flow:
        ```python
        from openweights_prefect.credentials import OpenWeightsOrganization

        organization = OpenWeightsOrganization.load("BLOCK_NAME")
        with organization.get_client() as ow:
            job = ow.fine_tuning.create(model="Qwen/Qwen3-4B", training_file=file_id)
        ```
    """

    _block_type_name = "OpenWeights Organization"
    _block_type_slug = "openweights-organization"
    _description = "The organization that a flow submits jobs for."
    _documentation_url = HttpUrl("https://docs.prefect.io/latest/develop/blocks")
    _logo_url = forms.SECRET_LOGO
    model_config: ClassVar[ConfigDict] = forms.HIDDEN

    organization_id: str = Field(
        title="Organization ID",
        description="The organization's id, a UUID.",
        examples=["6f1c2f5e-7a34-4a53-9a2c-0d7e3b1c9f10"],
    )
    name: str = Field(
        default="", description="The organization's name, for people to read.", examples=["Interpretability"]
    )
    credentials: SupabaseCredentials | None = Field(
        default=None, description="Who acts; empty means the settings of the process that loads the block."
    )

    def block_initialization(self) -> None:
        """Check the id; raises `InvalidParameterError`."""
        checked_organization_id(self.organization_id)

    def get_client(self) -> OpenWeights:
        """A client that acts for the organization; a context manager."""
        # At the first use: every process of Prefect imports this module, and few need the client.
        from openweights_prefect import OpenWeights

        if self.credentials is None:
            return OpenWeights(organization_id=self.organization_id)
        return OpenWeights(
            auth_token=self.credentials.token.get_secret_value(),
            organization_id=self.organization_id,
            supabase_url=self.credentials.url,
            supabase_key=self.credentials.key,
        )
