"""`ow.fine_tuning`, `ow.weighted_sft` and `ow.logprob`: files and models of this machine, models of jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.resources.job import Job


@pytest.fixture
def trained(ow: OpenWeights, pod: Any, tmp_path: Path) -> Callable[..., Job]:
    """Completes a job that leaves these files."""

    def train(job: Job, **files: str) -> Job:
        pod.open(job)
        for number, (path, text) in enumerate(files.items()):
            source = tmp_path / f"result-{number}"
            source.write_text(text)
            file = ow.files.upload(source, "result")["id"]
            pod.log({"path": path, "file": file}, file=file)
        pod.log({"loss": 0.1, "path": 7, "file": "no file id"})
        pod.finish()
        return job.refresh()

    return train


def adapter(base: str) -> dict[str, str]:
    config = json.dumps({"base_model_name_or_path": base})
    return {"adapter/adapter_config.json": config, "adapter/adapter_model.safetensors": "weights"}


def test_every_local_data_file_is_stored_under_its_purpose(
    ow: OpenWeights, conversations: Callable[..., Path], tmp_path: Path
) -> None:
    """Preferences for the losses that compare, conversations for what only watches."""
    pairs = tmp_path / "pairs.jsonl"
    message = [{"role": "user", "content": "hi"}]
    pairs.write_text(json.dumps({"prompt": message, "chosen": message, "rejected": message}) + "\n")
    watched, sampled = conversations("watched.jsonl", "w"), conversations("sampled.jsonl", "s")
    arguments: dict[str, Any] = {
        "model": "org/m-1B",
        "training_file": pairs,
        "loss": "dpo",
        "logp_callback_datasets": {"watched": str(watched)},
        "sampling_callbacks": [{"dataset": sampled}],
    }
    job = ow.fine_tuning.create(**arguments)
    purposes = {target: file.partition(":")[0] for target, file in job.mounts.items()}
    assert purposes == {
        "data/training_file.jsonl": "preference",
        "data/logp/0.jsonl": "conversations",
        "data/sampling/0.jsonl": "conversations",
    }
    params = job.params["validated_params"]
    assert params["logp_callback_datasets"] == {"watched": job.mounts["data/logp/0.jsonl"]}
    assert params["sampling_callbacks"][0]["dataset"] == job.mounts["data/sampling/0.jsonl"]
    assert ow.files.content(job.mounts["data/sampling/0.jsonl"]) == sampled.read_bytes()
    assert arguments["sampling_callbacks"] == [{"dataset": sampled}]
    with pytest.raises(InvalidFileError, match="has no `prompt`"):
        ow.fine_tuning.create(**{**arguments, "training_file": str(watched)})
    with pytest.raises(InvalidParameterError, match=r"logp_callback_datasets\.x='nowhere\.jsonl' is neither"):
        ow.fine_tuning.create(**{**arguments, "logp_callback_datasets": {"x": "nowhere.jsonl"}})
    missing = "conversations:file-0123456789ab"
    with pytest.raises(InvalidParameterError, match=rf"sampling_callbacks\.0\.dataset='{missing}'"):
        ow.fine_tuning.create(**{**arguments, "sampling_callbacks": [{"dataset": missing}]})


def test_weighted_training_and_measurements(ow: OpenWeights, conversations: Callable[..., Path]) -> None:
    """Each with its own prefix; memory is estimated with `guess`, as OpenWeights calls it."""
    path = conversations()
    weighted = ow.weighted_sft.create(model="org/m-1B", training_file=path, requires_vram_gb="guess")
    assert weighted.id.startswith("sftjob-")
    assert (weighted.type, weighted.params["validated_params"]["optim"]) == ("weighted_sft", "adamw_torch")
    assert 0 < weighted.requires_vram_gb < 24
    measured = ow.logprob.create(model="org/m-1B", dataset=path)
    assert measured.id.startswith("logprobjob-")
    assert measured.mounts == {"data/dataset.jsonl": weighted.mounts["data/training_file.jsonl"]}
    assert [job.id for job in ow.logprob.list(type="logprob")] == [measured.id]
    with pytest.raises(InvalidParameterError, match="'datase' is unknown; did you mean 'dataset'"):
        ow.logprob.create(model="org/m-1B", datase=path)


def test_pushing_needs_the_secret(ow: OpenWeights, conversations: Callable[..., Path]) -> None:
    """It is asked for where the name to push to is given, and the job holds the final name."""
    arguments = {"model": "org/m-1B", "training_file": conversations(), "loss": "sft", "hf_org": "me"}
    with pytest.raises(
        InvalidParameterError, match=r"no secret 'HF_TOKEN'\. Store it with `ow env set HF_TOKEN`"
    ):
        ow.fine_tuning.create(**arguments)
    kept = ow.fine_tuning.create(**arguments, push=False)
    assert kept.params["validated_params"]["finetuned_model_id"] is None


def test_the_adapter_of_a_job_is_trained_further(
    ow: OpenWeights, conversations: Callable[..., Path], trained: Callable[..., Job]
) -> None:
    """Its files are mounted, and make the id; names and memory are those of the base model."""
    data = {"training_file": conversations(), "loss": "sft"}
    first = trained(
        ow.fine_tuning.create(model="org/m-8B", **data), **adapter("org/m-8B"), **{"other.txt": "x"}
    )
    job = ow.fine_tuning.create(model=first.id, **data)
    assert {target for target in job.mounts if not target.startswith("data/")} == {
        "model/adapter_config.json",
        "model/adapter_model.safetensors",
    }
    assert (job.params["validated_params"]["model"], job.model) == ("model", "org/m-8B")
    assert job.requires_vram_gb == first.requires_vram_gb
    same = trained(ow.fine_tuning.create(model="org/m-8B", seed=1, **data), **adapter("org/m-8B"))
    assert ow.fine_tuning.create(model=same.id, **data).id == job.id
    third = ow.logprob.create(model=trained(job, **adapter("org/m-8B")).id, dataset=conversations())
    assert third.model == "org/m-8B"


def test_an_adapter_brings_its_base_model_if_that_is_files(
    ow: OpenWeights, conversations: Callable[..., Path], trained: Callable[..., Job], tmp_path: Path
) -> None:
    """Whether it was a folder of the user's or the adapter of a job before."""
    folder = tmp_path / "tiny-1B"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    data = {"training_file": conversations(), "loss": "sft"}
    first = trained(ow.fine_tuning.create(model=str(folder), **data), **adapter("model"))
    second = ow.fine_tuning.create(model=first.id, **data)
    assert second.mounts["base/config.json"] == first.mounts["model/config.json"]
    third = ow.logprob.create(model=trained(second, **adapter("model")).id, dataset=conversations())
    assert third.mounts["base/config.json"] == first.mounts["model/config.json"]
    assert "model/config.json" not in third.mounts


def test_the_whole_model_of_a_job(
    ow: OpenWeights, conversations: Callable[..., Path], trained: Callable[..., Job]
) -> None:
    """Needs no base."""
    data = {"training_file": conversations(), "loss": "sft"}
    first = ow.fine_tuning.create(model="org/m-1B", is_peft=False, **data)
    job = ow.weighted_sft.create(
        model=trained(first, **{"model/config.json": "{}"}).id, training_file=data["training_file"]
    )
    assert set(job.mounts) == {"model/config.json", "data/training_file.jsonl"}


def test_a_job_without_a_model(
    ow: OpenWeights, conversations: Callable[..., Path], trained: Callable[..., Job]
) -> None:
    """Is refused with what to do: wait, name another, or name what was pushed."""
    data = {"training_file": conversations(), "loss": "sft"}
    job = ow.fine_tuning.create(model="org/m-1B", **data)
    with pytest.raises(InvalidParameterError, match=r"the job is pending, and has a model once .*wait\(\)"):
        ow.fine_tuning.create(model=job.id, **data)
    trained(job, **{"adapter/README.md": "x"})
    with pytest.raises(InvalidParameterError, match="the job left no model, neither `adapter/adapter_config"):
        ow.fine_tuning.create(model=job.id, **data)


def test_a_local_adapter_brings_a_local_base(
    ow: OpenWeights, conversations: Callable[..., Path], tmp_path: Path
) -> None:
    """The base is named in `adapter_config.json`; one of Hugging Face stays there."""
    base, folder = tmp_path / "base-1B", tmp_path / "adapter"
    for path in (base, folder):
        path.mkdir()
    (base / "config.json").write_text("{}")
    config = folder / "adapter_config.json"
    data = {"training_file": conversations(), "loss": "sft"}
    config.write_text(json.dumps({"base_model_name_or_path": str(base)}))
    job = ow.fine_tuning.create(model=folder, **data)
    assert {"base/config.json", "model/adapter_config.json"} < set(job.mounts)
    config.write_text(json.dumps({"base_model_name_or_path": "org/m-1B"}))
    assert "base/config.json" not in ow.fine_tuning.create(model=folder, **data).mounts
    config.write_text(json.dumps({"base_model_name_or_path": "model"}))
    with pytest.raises(InvalidParameterError, match="Pass the id of the job that trained it"):
        ow.fine_tuning.create(model=folder, **data)
    config.write_text("{")
    with pytest.raises(InvalidParameterError, match="names no `base_model_name_or_path`"):
        ow.fine_tuning.create(model=folder, **data)
