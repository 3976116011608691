from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import openweights_prefect
from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import ConfigurationError, ConflictError, InvalidParameterError
from openweights_prefect.resources.custom import RESERVED_NAMES, Jobs, register
from openweights_prefect.settings import Settings

NOWHERE = Settings(database_url="postgresql://nobody@127.0.0.1:1/none")


def test_constructing_makes_no_request() -> None:
    """A client of a ledger that is not there costs nothing until it is used."""
    with OpenWeights(settings=NOWHERE, organization_id="acme") as ow:
        assert ow.organization_id == "acme"
        assert ow.deploy_kwargs == {"max_model_len": 2048}


def test_no_ledger_says_what_to_do(tmp_path: Path) -> None:
    """Without settings the error names `ow up` and the variable."""
    with pytest.raises(ConfigurationError, match=r"`ow up`.*`OW_DATABASE_URL`"):
        OpenWeights(settings=Settings(home=tmp_path))


@pytest.mark.parametrize(
    "arguments", [{"auth_token": "sk-123"}, {"supabase_url": "https://x"}, {"supabase_key": "k"}]
)
def test_bad_credentials_are_named(arguments: dict[str, Any]) -> None:
    """A wrong token and what is not supported are refused at once, without the value of the secret."""
    with pytest.raises(ConfigurationError, match=next(iter(arguments))) as caught:
        OpenWeights(**arguments, settings=NOWHERE)
    assert "sk-123" not in str(caught.value)


def test_unknown_attributes_name_near_ones() -> None:
    """A typo is an `AttributeError` with a hint."""
    with OpenWeights(settings=NOWHERE) as ow:
        with pytest.raises(AttributeError, match="'fine_tuning'"):
            _ = ow.fine_tunin
        assert not hasattr(ow, "quantum")


def test_a_registered_type_is_on_every_client(ow: OpenWeights) -> None:
    """Clients that exist and those to come; a class without parameters takes none."""

    @register("sdk_hello")
    class Hello(Jobs):
        def get_entrypoint(self, validated_params: BaseModel) -> str:
            return "echo hello"

    job = ow.sdk_hello.create()
    assert (job.type, job.entrypoint, job.params["validated_params"]) == ("sdk_hello", "echo hello", {})
    assert job.id.startswith("sdk_hello-")
    assert ow.sdk_hello is ow.sdk_hello
    assert ow.sdk_hello.retrieve(job.id).id == job.id
    assert "sdk_hello" in dir(ow)
    with OpenWeights(settings=NOWHERE) as other:
        assert isinstance(other.sdk_hello, Hello)
    with pytest.raises(InvalidParameterError, match="'x' is unknown"):
        ow.sdk_hello.create(x=1)


def test_a_class_may_be_defined_again() -> None:
    """A notebook cell that runs twice replaces the class; another class of that name is refused."""

    def define(entrypoint: str) -> None:
        @register("sdk_again")
        class Again(Jobs):
            def get_entrypoint(self, validated_params: BaseModel) -> str:
                return entrypoint

    with OpenWeights(settings=NOWHERE) as ow:
        define("one")
        assert ow.sdk_again.get_entrypoint(None) == "one"
        define("two")
        assert ow.sdk_again.get_entrypoint(None) == "two"
    with pytest.raises(ConflictError, match=r"'sdk_again' is already registered, by .*Again"):

        @register("sdk_again")
        class Other(Jobs):
            pass


@pytest.mark.parametrize("name", ["files", "run", "fine_tuning", "chat"])
def test_names_of_the_client_are_taken(name: str) -> None:
    """A job type cannot hide what a client has."""
    with pytest.raises(ConflictError, match=name):
        register(name)


@pytest.mark.parametrize("name", ["", "a-b", "1a", "class", "Name", "_private", "a b", "x" * 41, 7])
def test_names_that_cannot_be_attributes(name: Any) -> None:
    """Names are identifiers and can begin a job id."""
    with pytest.raises(InvalidParameterError, match="cannot be the name"):
        register(name)


def test_only_job_types_are_registered() -> None:
    """The decorator goes above a subclass of `Jobs`."""
    with pytest.raises(InvalidParameterError, match="not a subclass"):
        register("sdk_wrong")(dict)  # type: ignore[type-var]


def test_every_attribute_of_the_client_is_reserved() -> None:
    """A new attribute must be added to the reserved names."""
    with OpenWeights(settings=NOWHERE) as ow:
        own = {name for name in [*vars(ow), *dir(OpenWeights)] if not name.startswith("_")}
    assert own <= RESERVED_NAMES


def test_options_and_parameters_of_one_name(ow: OpenWeights) -> None:
    """A parameters model that declares an option gets its value too."""

    class Params(BaseModel):
        requires_vram_gb: int = 60
        steps: int = 1

    @register("sdk_both")
    class Both(Jobs):
        params = Params
        base_image = "my/image:2"

        def get_entrypoint(self, validated_params: Params) -> str:
            return f"run --vram {validated_params.requires_vram_gb}"

    job = ow.sdk_both.create(requires_vram_gb=80)
    assert (job.requires_vram_gb, job.entrypoint, job.docker_image) == (80, "run --vram 80", "my/image:2")
    assert ow.sdk_both.create().requires_vram_gb == 24


def test_a_type_that_is_not_finished(ow: OpenWeights) -> None:
    """No name, no entrypoint: each says what is missing."""

    class Nameless(Jobs):
        pass

    with pytest.raises(InvalidParameterError, match="@register"):
        Nameless(ow._session).create()

    @register("sdk_empty")
    class Empty(Jobs):
        def get_entrypoint(self, validated_params: BaseModel) -> str:
            return " "

    with pytest.raises(InvalidParameterError, match="no shell command"):
        ow.sdk_empty.create()


def test_clients_are_not_kept_alive() -> None:
    """A registered type holds no client."""
    ow = OpenWeights(settings=NOWHERE)
    _ = ow.jobs
    ow.close()
    reference = weakref.ref(ow)
    del ow
    gc.collect()
    assert reference() is None


def run_python(program: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return result.stdout.strip()


def test_importing_is_cheap() -> None:
    """The package itself imports only the standard library; the client nothing that is slow."""
    program = (
        "import sys; before = set(sys.modules); import openweights_prefect\n"
        "new = set(sys.modules) - before; top = {name.partition('.')[0] for name in new}\n"
        "print(sorted(top - set(sys.stdlib_module_names)))\n"
        "from openweights_prefect import OpenWeights, Jobs, register, Job, JobFailed\n"
        "slow = {'prefect', 'torch', 'httpx', 'rich', 'pandas'}\n"
        "print(sorted(slow & set(sys.modules)), OpenWeights.__module__)\n"
    )
    assert run_python(program).splitlines() == ["['openweights_prefect']", "[] openweights_prefect.client"]


def test_inside_a_job_the_client_is_the_agents() -> None:
    """There `OpenWeights` needs the standard library alone."""
    program = (
        "import sys; from openweights_prefect import OpenWeights\n"
        "print(OpenWeights.__module__, 'pydantic' in sys.modules, 'psycopg' in sys.modules)\n"
    )
    answer = run_python(program, OW_AGENT_SOCKET="/nowhere", OPENWEIGHTS_RUN_ID="r")
    assert answer == "openweights_prefect.runtime.inside False False"


def test_the_public_names() -> None:
    """All of them can be imported; others are attribute errors."""
    for name in openweights_prefect.__all__:
        assert getattr(openweights_prefect, name).__name__ == name
    with pytest.raises(AttributeError, match="nope"):
        _ = openweights_prefect.nope
