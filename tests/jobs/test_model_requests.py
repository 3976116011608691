"""Jobs on language models: what their rows hold, and that every way to ask for one gives the same job."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from openweights_prefect import bundle
from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.jobs.models import JobModel
from openweights_prefect.jobs.options import Options, validated
from openweights_prefect.jobs.request import JOB_TYPES, JobType, model_request
from openweights_prefect.settings import Settings
from openweights_prefect.worker.adoption import (
    deployment_of,
    job_of_flow_run,
    model_job_of,
    parameters_of,
)

FILE = "conversations:file-0123456789ab"
OTHER = "conversations:file-ba9876543210"
ORGANIZATION = "00000000-0000-0000-0000-000000000001"
SETTINGS = Settings(organization_id=ORGANIZATION, image="image")
NEEDED: dict[str, dict[str, Any]] = {
    "fine_tuning": {"model": "org/name-1B", "training_file": FILE, "loss": "sft"},
    "weighted_sft": {"model": "org/name-1B", "training_file": FILE},
    "logprob": {"model": "org/name-1B", "dataset": FILE},
}
KINDS = pytest.mark.parametrize("kind", JOB_TYPES.values(), ids=lambda kind: kind.name)


def row(kind: JobType, mounts: dict[str, str] | None = None, **values: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        name: values.pop(name) for name in ("secrets", "docker_image") if name in values
    }
    params = validated(kind.params, NEEDED[kind.name] | values, job_type=kind.name)
    request = model_request(kind, params, mounts or {}, validated(Options, options, job_type=kind.name))
    return request.row(organization_id=ORGANIZATION, default_image="image")


def adopted(deployment: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return job_of_flow_run(uuid.uuid4(), deployment, parameters, {}, SETTINGS, **more)


def flow_of(kind: JobType) -> Flow[Any, Any]:
    return load_flow_from_entrypoint(f"{bundle.deploy_root() / 'flows' / kind.name}.py:{kind.name}")


def test_data_files_are_mounted_by_parameter() -> None:
    """Callbacks' datasets by their position: the sorted names, the order of the list."""
    values: dict[str, Any] = {
        "test_file": OTHER,
        "logp_callback_datasets": {"b": FILE, "a": OTHER},
        "sampling_callbacks": [{"dataset": OTHER}, {"dataset": FILE}],
    }
    for name in ("fine_tuning", "weighted_sft"):
        found = row(JOB_TYPES[name], **values)
        assert found["mounts"] == {
            "data/training_file.jsonl": FILE,
            "data/test_file.jsonl": OTHER,
            "data/logp/0.jsonl": OTHER,
            "data/logp/1.jsonl": FILE,
            "data/sampling/0.jsonl": OTHER,
            "data/sampling/1.jsonl": FILE,
        }
        assert found["files"] == [FILE, OTHER]
    assert row(JOB_TYPES["logprob"])["mounts"] == {"data/dataset.jsonl": FILE}


@KINDS
def test_an_id_names_its_type_and_what_is_computed(kind: JobType) -> None:
    """Order, written defaults and aliases make no difference; values do."""
    plain = row(kind)
    assert plain["id"].startswith(f"{kind.prefix}-")
    assert (plain["type"], plain["entrypoint"]) == (kind.name, kind.entrypoint)
    defaults = kind.params(**NEEDED[kind.name]).model_dump()
    backwards = dict(reversed(defaults.items()))
    length = backwards.pop("max_seq_length")
    assert row(kind, **backwards, max_length=length, secrets=["A"])["id"] == plain["id"]
    others: list[dict[str, Any]] = [
        {"model": "org/other"},
        {"max_seq_length": 99},
        {"docker_image": "my/image:1"},
    ]
    assert len({plain["id"], *(row(kind, **other)["id"] for other in others)}) == 4
    assert len({row(kind)["id"] for kind in JOB_TYPES.values()}) == 3


@pytest.mark.parametrize("name", ["fine_tuning", "weighted_sft"])
def test_the_name_to_push_to_holds_the_id_that_is_made_of_its_template(name: str) -> None:
    """The job gets the final name, and the secret that it pushes with, once."""
    kind = JOB_TYPES[name]
    found = row(kind, hf_org="me")
    assert found["params"]["validated_params"]["finetuned_model_id"] == f"me/name-1B-{found['id']}"
    assert found["params"]["templates"] == {"finetuned_model_id": "{org_id}/{model_name}-{job_id}"}
    assert found["secrets"] == ["HF_TOKEN"]
    assert row(kind, hf_org="me", secrets=["HF_TOKEN", "WANDB_API_KEY"])["secrets"] == [
        "HF_TOKEN",
        "WANDB_API_KEY",
    ]
    assert row(kind, hf_org="me", push=False)["secrets"] is None
    assert row(kind, hf_org="you")["id"] != found["id"]
    with pytest.raises(InvalidParameterError, match="is not a Hugging Face name"):
        row(kind, finetuned_model_id="me/{job_id}" + "a" * 80, job_id_suffix="b" * 64)


def test_a_job_that_keeps_its_result_here_names_no_repository() -> None:
    """No template, no secret."""
    found = row(JOB_TYPES["fine_tuning"])
    assert found["params"]["validated_params"]["finetuned_model_id"] is None
    assert ("templates" in found["params"], found["secrets"]) == (False, None)


@KINDS
@pytest.mark.parametrize("form", [{}, {"push": True, "hf_org": "me"}])
def test_a_flow_run_means_the_job_of_the_sdk(kind: JobType, form: dict[str, Any]) -> None:
    """Started from a form, or again with the parameters of the job's own flow run."""
    values = form if kind.name != "logprob" else {}
    found = row(kind, **values)
    assert deployment_of(kind.name) == kind.deployment
    written = {"params": NEEDED[kind.name] | values}
    again = parameters_of(kind.name, found["params"], found["mounts"], found["entrypoint"])
    for parameters in (written, again):
        assert adopted(kind.deployment, parameters) == found
        assert flow_of(kind).validate_parameters(parameters)["params"] == kind.params(**parameters["params"])


@KINDS
def test_the_deployment_of_a_type(kind: JobType) -> None:
    """Is in `prefect.yaml`, runs the flow of that name, and has a form for the parameters."""
    recipe = yaml.safe_load((bundle.deploy_root() / "prefect.yaml").read_text(encoding="utf-8"))
    [spec] = [each for each in recipe["deployments"] if each["name"] == kind.deployment.partition("/")[2]]
    assert spec["entrypoint"] == f"flows/{kind.name}.py:{kind.name}"
    flow = flow_of(kind)
    assert f"{flow.name}/{spec['name']}" == kind.deployment
    schema = parameter_schema(flow).model_dump_for_openapi()
    validate({"params": NEEDED[kind.name]}, schema, raise_on_error=True)


def test_a_form_may_name_a_job_as_the_model() -> None:
    """Its files make the id, as they do in the SDK."""
    kind = JOB_TYPES["fine_tuning"]
    mounts = {"model/adapter_config.json": "result:file-0123456789ab"}
    parameters = {"params": NEEDED["fine_tuning"] | {"model": "ftjob-0123456789ab", "hf_org": "me"}}
    assert model_job_of(kind.deployment, parameters) == "ftjob-0123456789ab"
    found = adopted(kind.deployment, parameters, job_model=JobModel(mounts, "org/base-8B"))
    assert found["id"] == row(kind, mounts, model="model", hf_org="me")["id"]
    params = found["params"]["validated_params"]
    assert (params["model"], found["model"]) == ("model", "org/base-8B")
    assert params["finetuned_model_id"] == f"me/base-8B-{found['id']}"
    assert found["requires_vram_gb"] == row(kind, model="org/base-8B")["requires_vram_gb"]
    again = parameters_of(found["type"], found["params"], found["mounts"], found["entrypoint"])
    assert model_job_of(kind.deployment, again) is None
    assert model_job_of(None, parameters) is None
    assert adopted(kind.deployment, again)["id"] == found["id"]


@pytest.mark.parametrize("name", ["fine_tuning", "weighted_sft", "logprob"])
def test_a_custom_job_cannot_take_the_name_of_a_type(name: str) -> None:
    """Neither from a form."""
    with pytest.raises(InvalidParameterError, match="is a built-in job type"):
        adopted("custom-job/custom-job", {"name": name, "entrypoint": "true"})
