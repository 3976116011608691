from __future__ import annotations

import base64
import copy
import json
import pickle
from typing import Any

import pytest
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.filesystems import LocalFileSystem
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from pydantic import ValidationError

import openweights_prefect
from openweights_prefect import collection, credentials
from openweights_prefect.credentials import (
    BLOCK_TYPES,
    HuggingFaceCredentials,
    OpenWeightsOrganization,
    RunPodCredentials,
    SupabaseCredentials,
    SupabaseStorage,
)
from openweights_prefect.errors import ConfigurationError, InvalidParameterError
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID, Settings

RUNPOD_KEY = "rpa_canary0runpod0key"
HUGGING_FACE_TOKEN = "hf_canary0hugging0face"
API_TOKEN = "ow_canary0api0token"
SECRETS = (RUNPOD_KEY, HUGGING_FACE_TOKEN, API_TOKEN)


def jwt(role: str) -> str:
    parts = [json.dumps({"alg": "HS256"}), json.dumps({"role": role}), "signature"]
    return ".".join(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in parts)


def supabase(**changes: Any) -> SupabaseCredentials:
    values = {"url": "https://x.supabase.co", "key": "sb_publishable_12345678", "token": API_TOKEN}
    return SupabaseCredentials(**{**values, **changes})


def examples() -> list[Block]:
    return [
        RunPodCredentials(api_key=RUNPOD_KEY),
        HuggingFaceCredentials(token=HUGGING_FACE_TOKEN),
        supabase(),
        SupabaseStorage(credentials=supabase()),
        OpenWeightsOrganization(organization_id=LOCAL_ORGANIZATION_ID, credentials=supabase()),
    ]


@pytest.mark.parametrize("block", BLOCK_TYPES, ids=lambda block: block.__name__)
class TestBlocks(BlockStandardTestSuite):
    @pytest.fixture
    def block(self, block: type[Block]) -> type[Block]:
        return block

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """The suite would download the picture; ours are pictures of blocks that come with Prefect."""
        assert str(block._logo_url) in {str(Secret._logo_url), str(LocalFileSystem._logo_url)}


def test_prefect_discovers_every_type() -> None:
    """The entry point's module has them all, and nothing of Prefect's that would be registered again."""
    for module in (collection, credentials):
        found = {value for value in vars(module).values() if Block.is_block_class(value)}
        assert found == set(BLOCK_TYPES)
    assert len({block.get_block_type_slug() for block in BLOCK_TYPES}) == len(BLOCK_TYPES) == 5


@pytest.mark.parametrize("block", examples(), ids=lambda block: type(block).__name__)
def test_no_text_of_a_block_holds_its_secrets(block: Block) -> None:
    """Logs, tracebacks and flow parameters show stars."""
    texts = [repr(block), str(block), f"{block.model_dump()}", block.model_dump_json()]
    assert not [text for text in texts for secret in SECRETS if secret in text]


@pytest.mark.parametrize("block", examples(), ids=lambda block: type(block).__name__)
def test_a_block_can_be_copied_and_pickled(block: Block) -> None:
    """Prefect copies blocks into parameters and sends them to other processes."""
    for twin in (copy.deepcopy(block), block.model_copy(deep=True), pickle.loads(pickle.dumps(block))):
        assert twin == block or twin.model_dump() == block.model_dump()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: RunPodCredentials(api_key="hf_canary0hugging0face"), "looks like a token of Hugging Face"),
        (lambda: RunPodCredentials(api_key=" "), "is empty"),
        (lambda: RunPodCredentials(api_key="rpa_canary0runpod0key\n"), "has blanks or line breaks"),
        (lambda: RunPodCredentials(api_key=RUNPOD_KEY, api_url="api.runpod.io/v2"), "`api_url`"),
        (
            lambda: RunPodCredentials(api_key=RUNPOD_KEY, api_url="https://me:canary@x"),
            "more than an address",
        ),
        (lambda: HuggingFaceCredentials(token="rpa_canary0runpod0key"), "looks like an API key of RunPod"),
        (lambda: supabase(token="owb_canary"), "looks like the one-time token of a pod"),
        (lambda: supabase(key="sb_secret_canary"), "is a secret key"),
        (lambda: supabase(key=jwt("service_role")), "is a secret key"),
        (lambda: supabase(key="canary key"), "has blanks"),
        (lambda: supabase(url="postgresql://canary"), "is not an address"),
        (lambda: supabase(url="http://x.supabase.co"), "would send tokens unencrypted"),
        (lambda: SupabaseStorage(bucket="../canary"), "cannot name a bucket"),
    ],
)
def test_a_wrong_value_is_named_without_being_quoted(make: Any, problem: str) -> None:
    """The error says which field of which block, and which variable; the value may be a secret."""
    with pytest.raises(ConfigurationError) as caught:
        make()
    assert problem in str(caught.value)
    assert "canary" not in str(caught.value)


def test_what_pydantic_refuses_is_not_quoted_either() -> None:
    """Its errors quote their input by default."""
    for make in (
        lambda: RunPodCredentials(api_key=[RUNPOD_KEY]),
        lambda: SupabaseStorage(credentials={"token": API_TOKEN}),
        lambda: OpenWeightsOrganization(organization_id=[API_TOKEN]),
    ):
        with pytest.raises(ValidationError) as caught:
            make()
        assert not [secret for secret in SECRETS if secret in str(caught.value)]


@pytest.mark.parametrize("key", ["sb_publishable_12345678", jwt("anon")])
def test_both_kinds_of_publishable_keys_are_taken(key: str) -> None:
    assert supabase(key=key, url="http://127.0.0.1:54321/").url == "http://127.0.0.1:54321"


def test_the_runpod_block_makes_a_client() -> None:
    """For the address of the block, with a key that the client does not show."""
    client = RunPodCredentials(api_key=RUNPOD_KEY, api_url="http://127.0.0.1:9/v2/").get_client()
    assert repr(client) == "RunPodClient(base_url='http://127.0.0.1:9/v2')"
    assert RunPodCredentials(api_key="A1" * 20).api_url == Settings.runpod_api_url


def test_the_hugging_face_block_logs_a_process_in() -> None:
    """By the variable that Hugging Face's libraries read."""
    block = HuggingFaceCredentials(token=HUGGING_FACE_TOKEN)
    assert block.get_environment() == {"HF_TOKEN": block.get_token()} == {"HF_TOKEN": HUGGING_FACE_TOKEN}


def test_the_organization_block_makes_a_client(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials, with the settings of the process."""
    monkeypatch.setenv("OW_DATABASE_URL", ledger_url)
    other = "6f1c2f5e-7a34-4a53-9a2c-0d7e3b1c9f10"
    with OpenWeightsOrganization(organization_id=other).get_client() as ow:
        assert isinstance(ow, openweights_prefect.OpenWeights)
        assert ow.organization_id == other
    with pytest.raises(InvalidParameterError, match="organization_id"):
        OpenWeightsOrganization(organization_id="../other")
