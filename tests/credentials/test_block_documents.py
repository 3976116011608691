from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.blocks.core import Block
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_server import PrefectServer

import openweights_prefect
from openweights_prefect.credentials import (
    BLOCK_TYPES,
    OpenWeightsOrganization,
    RunPodCredentials,
    SupabaseCredentials,
    SupabaseStorage,
)
from openweights_prefect.errors import ConfigurationError, OpenWeightsError
from openweights_prefect.files.layout import result_path
from openweights_prefect.orchestration import block_documents
from openweights_prefect.orchestration.block_documents import MissingVariables, Variables
from openweights_prefect.settings import Settings

BLOCKS = Path(openweights_prefect.__file__).parent.parent / "blocks"
NAMES = sorted(path.stem for path in BLOCKS.glob("*.py"))
ORGANIZATION = "6f1c2f5e-7a34-4a53-9a2c-0d7e3b1c9f10"
VARIABLES = {
    "RUNPOD_API_KEY": "rpa_canary0runpod0key",
    "HF_TOKEN": "hf_canary0hugging0face",
    "SUPABASE_URL": "https://x.supabase.co",
    "SUPABASE_ANON_KEY": "sb_publishable_12345678",
    "OPENWEIGHTS_API_KEY": "ow_canary0api0token",
    "OW_ORGANIZATION_ID": ORGANIZATION,
    "OW_ORGANIZATION_NAME": "Interpretability",
}
SECRETS = ("rpa_canary0runpod0key", "hf_canary0hugging0face", "ow_canary0api0token")


def call(server: PrefectServer, command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**server.environment, **variables}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=server.home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ow(server: PrefectServer, *arguments: str, **variables: str) -> Any:
    done = call(server, ("-m", "openweights_prefect.cli", *arguments, "--json"), **variables)
    assert done.returncode == 0, done.stderr
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]
    return json.loads(done.stdout)


def load(server: PrefectServer, block: type[Block], name: str) -> Any:
    with temporary_settings(updates={PREFECT_API_URL: server.url}):
        return block.load(name)


def documents(server: PrefectServer, block: type[Block], *, secrets: bool) -> str:
    body = {
        "block_types": {"slug": {"any_": [block.get_block_type_slug()]}},
        "include_secrets": secrets,
    }
    answer = httpx.post(f"{server.url}/block_documents/filter", json=body, trust_env=False)
    answer.raise_for_status()
    return answer.text


def stored(server: PrefectServer) -> str:
    """Every value of every table, and what has not been moved out of the write-ahead log."""
    with sqlite3.connect(server.database) as connection:
        tables = [row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")]
        rows = [connection.execute(f'select * from "{table}"').fetchall() for table in tables]
    files = [path.read_bytes() for path in server.home.glob("prefect.db*")]
    return repr(rows) + repr(files)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_holds_one_function_of_its_own_name(name: str) -> None:
    """`ow blocks` loads scripts by path, and finds the function by the file's name."""
    script = block_documents._load(BLOCKS / f"{name}.py")
    assert script.__name__ == name
    assert block_documents._type_of(script) in BLOCK_TYPES
    assert name not in sys.modules


def test_every_block_type_has_a_script() -> None:
    """And each script is in the table of the folder's page, with the variables that it reads."""
    types = {block_documents._type_of(block_documents._load(BLOCKS / f"{name}.py")) for name in NAMES}
    assert types == set(BLOCK_TYPES)
    page = (BLOCKS / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        missing = block_documents._missing(block_documents._load(BLOCKS / f"{name}.py"), {})
        assert missing
        assert not [variable for variable in missing if f"`{variable}`" not in row]


def test_apply_saves_what_can_be_loaded(prefect_server: PrefectServer) -> None:
    """`ow blocks apply` saves every block; nested ones as documents of their own; it overwrites."""
    applied = ow(prefect_server, "blocks", "apply", **VARIABLES)
    assert [block["block"] for block in applied["applied"]] == NAMES
    assert applied["skipped"] == []
    assert ow(prefect_server, "blocks", "apply", **VARIABLES) == applied

    runpod = load(prefect_server, RunPodCredentials, "openweights")
    assert runpod.api_key.get_secret_value() == VARIABLES["RUNPOD_API_KEY"]
    assert runpod.api_url == Settings.runpod_api_url
    account = load(prefect_server, SupabaseCredentials, "openweights")
    storage = load(prefect_server, SupabaseStorage, "openweights")
    organization = load(prefect_server, OpenWeightsOrganization, "openweights")
    assert f"organizations/{storage.basepath}/key" == result_path("key", ORGANIZATION)
    assert organization.name == "Interpretability"
    for block in (storage, organization):
        assert block.credentials.token.get_secret_value() == VARIABLES["OPENWEIGHTS_API_KEY"]
        assert block.credentials._block_document_id == account._block_document_id


def test_a_rotated_secret_reaches_the_blocks_that_refer_to_it(prefect_server: PrefectServer) -> None:
    """It is in one document only."""
    ow(prefect_server, "blocks", "apply", "--document", "rotated", **VARIABLES)
    new = {**VARIABLES, "OPENWEIGHTS_API_KEY": "ow_canary0api0token0new"}
    ow(prefect_server, "blocks", "apply", "supabase-credentials", "--document", "rotated", **new)
    storage = load(prefect_server, SupabaseStorage, "rotated")
    assert storage.credentials.token.get_secret_value() == "ow_canary0api0token0new"


def test_secrets_are_encrypted_in_the_database_and_hidden_in_answers(prefect_server: PrefectServer) -> None:
    """No row and no file of the database has one in plain text; the API gives them only when asked to."""
    ow(prefect_server, "blocks", "apply", **VARIABLES)
    everything = stored(prefect_server)
    assert "openweights" in everything
    assert not [secret for secret in SECRETS if secret in everything]
    assert "fernet_key" not in everything, "the key is in the server's environment"
    with sqlite3.connect(prefect_server.database) as connection:
        data = [row[0] for row in connection.execute("select data from block_document")]
    assert len(data) >= len(NAMES)
    assert not [value for value in data if not value.startswith('"gAAAA')], "each is a Fernet token"
    for block in BLOCK_TYPES:
        assert not [s for s in SECRETS if s in documents(prefect_server, block, secrets=False)], block
    assert VARIABLES["RUNPOD_API_KEY"] in documents(prefect_server, RunPodCredentials, secrets=True)


def test_apply_skips_what_has_no_variables(prefect_server: PrefectServer) -> None:
    """And says which; a block that was named must not be skipped."""
    done = ow(prefect_server, "blocks", "apply", HF_TOKEN=VARIABLES["HF_TOKEN"], RUNPOD_API_KEY=" ")
    assert [block["block"] for block in done["applied"]] == ["hugging_face_credentials"]
    assert {block["block"]: block["missing"] for block in done["skipped"]} == {
        "openweights_organization": ["OW_ORGANIZATION_ID"],
        "runpod_credentials": ["RUNPOD_API_KEY"],
        "supabase_credentials": ["SUPABASE_URL", "SUPABASE_ANON_KEY", "OPENWEIGHTS_API_KEY"],
        "supabase_storage": [
            "SUPABASE_URL",
            "SUPABASE_ANON_KEY",
            "OPENWEIGHTS_API_KEY",
            "OW_ORGANIZATION_ID",
        ],
    }
    done = call(prefect_server, ("-m", "openweights_prefect.cli", "blocks", "apply", "runpod_credentials"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "RUNPOD_API_KEY is not set" in done.stderr


def test_ls_shows_what_is_there_and_what_is_missing(prefect_server: PrefectServer) -> None:
    """For every script."""
    ow(prefect_server, "blocks", "apply", "runpod_credentials", "--document", "second", **VARIABLES)
    rows = ow(prefect_server, "blocks", "ls", RUNPOD_API_KEY="rpa_other0key0value")["blocks"]
    assert [row["block"] for row in rows] == NAMES
    [runpod] = [row for row in rows if row["block"] == "runpod_credentials"]
    assert runpod["type"] == "runpod-credentials"
    assert runpod["missing"] == []
    assert "second" in runpod["documents"]
    done = call(prefect_server, ("-m", "openweights_prefect.cli", "blocks", "ls"))
    assert done.stdout.startswith("NAME\tBLOCK TYPE\tNOT SET\tDOCUMENTS\n"), done.stderr


def test_a_script_runs_by_itself(prefect_server: PrefectServer) -> None:
    """`python blocks/runpod_credentials.py NAME` says what it saved, without the secret."""
    script = str(BLOCKS / "runpod_credentials.py")
    done = call(prefect_server, (script, "mine"), **VARIABLES)
    assert done.stdout.startswith("Saved runpod-credentials/mine: RunPodCredentials("), done.stderr
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]
    assert load(prefect_server, RunPodCredentials, "mine").api_url == Settings.runpod_api_url
    done = call(prefect_server, (script,))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: RUNPOD_API_KEY is not set; the block needs it.\n"


def test_an_error_of_the_command_is_one_line(prefect_server: PrefectServer) -> None:
    """With exit code 1, without a traceback and without the secret."""
    arguments = ("-m", "openweights_prefect.cli", "blocks", "apply", "runpod-credentials")
    done = call(prefect_server, arguments, RUNPOD_API_KEY="hf_canary0hugging0face")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("Error: `api_key` of RunPodCredentials is not an API key of RunPod")
    assert "canary" not in done.stderr


@pytest.mark.parametrize(
    ("names", "document", "url", "problem"),
    [
        (["runpod_credential"], "x", None, "Did you mean 'runpod_credentials'?"),
        (["y"], "x", None, "There is no block 'y'. There are 'hugging_face_credentials'"),
        ([], "My Block", None, "'My Block' cannot name a block document"),
        ([], "a--b", None, "'a--b' cannot name a block document"),
        ([], "x", "http://127.0.0.1:9/api", "does not answer"),
        ([], "x", "", "Run `ow up`, or set `PREFECT_API_URL`"),
    ],
)
def test_what_cannot_be_done_is_said(
    prefect_server: PrefectServer, names: list[str], document: str, url: str | None, problem: str
) -> None:
    """A name, an address: the error says what is wrong with it."""
    settings = (
        prefect_server.settings if url is None else replace(prefect_server.settings, prefect_api_url=url)
    )
    coroutine = block_documents.apply(names, document=document, environment=VARIABLES, settings=settings)
    with temporary_settings(updates={PREFECT_API_URL: None}), pytest.raises(OpenWeightsError) as caught:
        asyncio.run(coroutine)
    assert problem in str(caught.value)


def test_nothing_is_saved_when_one_value_is_wrong(prefect_server: PrefectServer) -> None:
    """All blocks are made before the first is saved."""
    wrong = {**VARIABLES, "OPENWEIGHTS_API_KEY": "nonsense"}
    settings = prefect_server.settings
    with pytest.raises(ConfigurationError, match="OPENWEIGHTS_API_KEY"):
        asyncio.run(block_documents.apply([], document="wrong", environment=wrong, settings=settings))
    listed = asyncio.run(block_documents.listing(environment={}, settings=settings))
    assert not [block for block in listed if "wrong" in block.documents]


def test_variables_name_all_that_are_missing() -> None:
    """Not one after the other; blanks around a value are not part of it."""
    variables = Variables({"A": " a\n", "B": ""})
    assert variables.required("A") == ["a"]
    with pytest.raises(MissingVariables, match="B, C are not set") as caught:
        variables.required("A", "B", "C")
    assert caught.value.names == ("B", "C")


def test_prefect_registers_the_types(prefect_server: PrefectServer) -> None:
    """By its own command from the module; and by ours, again and again."""
    done = call(
        prefect_server, ("-m", "prefect", "block", "register", "-m", "openweights_prefect.credentials")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Successfully registered 5 blocks" in done.stdout
    for _ in range(2):
        slugs = asyncio.run(block_documents.register_types(BLOCK_TYPES, settings=prefect_server.settings))
        assert slugs == [block.get_block_type_slug() for block in BLOCK_TYPES]
    answer = httpx.post(f"{prefect_server.url}/block_types/filter", json={}, trust_env=False).json()
    assert set(slugs) <= {block_type["slug"] for block_type in answer}
    described = {block_type["slug"]: block_type for block_type in answer}["supabase-storage"]
    assert described["description"]
    assert described["documentation_url"].startswith("https://supabase.com/docs/guides/storage")


def test_prefect_finds_the_types_by_the_entry_point(prefect_server: PrefectServer) -> None:
    """`Block.load` with a slug needs no import of ours."""
    ow(prefect_server, "blocks", "apply", "runpod_credentials", **VARIABLES)
    program = "from prefect.blocks.core import Block\nprint(Block.load('runpod-credentials/openweights'))"
    done = call(prefect_server, ("-c", program))
    assert done.stdout.startswith("RunPodCredentials("), done.stderr
    assert not [secret for secret in SECRETS if secret in done.stdout + done.stderr]
