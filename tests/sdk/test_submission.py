from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import InvalidFileError, InvalidParameterError
from openweights_prefect.resources.custom import Jobs
from openweights_prefect.resources.fine_tuning import FineTuning
from openweights_prefect.resources.session import Session


class Params(BaseModel):
    a: int = 1
    b: str = "x"
    nested: dict[str, Any] = {}


class Script(Jobs):
    """What a user writes; named here, so that tests need not register it."""

    name = "program"
    params = Params

    def get_entrypoint(self, validated_params: Params) -> str:
        return f"python main.py {validated_params.a}"


def script(session: Session, mount: dict[str, str]) -> Script:
    kind: type[Script] = type("Script", (Script,), {"mount": mount})
    return kind(session)


def test_a_known_job_is_one_round_trip(
    session: Session, ledger: Any, pod: Any, conversations: Callable[..., Path]
) -> None:
    """New: the missing file is uploaded. Joined, completed: one call. Failed: reset."""
    tuning = FineTuning(session)
    arguments = {"model": "org/tiny-1B", "training_file": str(conversations()), "loss": "sft"}
    job = tuning.create(**arguments)
    assert ledger.calls == ["submit_job", "register_file", "submit_job"]
    assert (job.status, job.attempt, job.type) == ("pending", 1, "fine_tuning")

    ledger.calls.clear()
    assert tuning.create(**arguments).id == job.id
    assert ledger.calls == ["submit_job"]

    pod.open(job)
    pod.finish("failed", why="boom")
    again = tuning.create(**arguments)
    assert (again.id, again.status, again.attempt, again.error) == (job.id, "pending", 2, None)

    pod.open(again)
    pod.log({"loss": 0.5})
    pod.finish()
    ledger.calls.clear()
    done = tuning.create(**arguments)
    assert (done.status, done.outputs, done.attempt) == ("completed", {"loss": 0.5}, 2)
    assert ledger.calls == ["submit_job"]


def test_what_the_row_of_a_fine_tuning_job_holds(ow: OpenWeights, conversations: Callable[..., Path]) -> None:
    """Files are mounts, parameters are validated, options are columns, hardware has one spelling."""
    file = ow.files.upload(conversations(), "conversations")
    job = ow.fine_tuning.create(
        model="org/tiny-1B",
        training_file=file["id"],
        test_file=conversations("test.jsonl", "test"),
        loss="sft",
        learning_rate=-4,
        allowed_hardware=["2 x a100", "1x H200", "2x A100"],
        job_id_suffix="mine",
        priority=3,
        max_price_per_hour=5,
        timeout=60,
        retries=2,
        env={"WANDB_MODE": "offline"},
    )
    assert job.id.startswith("ftjob-")
    assert job.id.endswith("-mine")
    assert job.mounts["data/training_file.jsonl"] == file["id"]
    assert job.params["validated_params"]["test_file"] == job.mounts["data/test_file.jsonl"]
    assert job.params["mounted_files"] == job.mounts
    assert job.params["validated_params"]["learning_rate"] == pytest.approx(1e-4)
    assert job.allowed_hardware == ["2x A100", "1x H200"]
    assert (job.priority, job.max_price_per_hour, job.timeout_seconds, job.retries) == (3, 5, 60, 2)
    assert (job["model"], job["status"]) == ("org/tiny-1B", "pending")
    assert job.entrypoint == "python -m openweights_prefect.jobs.training.train"


def test_wishes_and_written_defaults_do_not_change_the_id(
    ow: OpenWeights, conversations: Callable[..., Path]
) -> None:
    """Only what is computed makes a job; an image counts when it is named."""
    base = {"model": "org/tiny-1B", "training_file": str(conversations()), "loss": "sft"}
    first = ow.fine_tuning.create(**base)
    backwards = dict(reversed({**base, "epochs": 1, "seed": 3407}.items()))
    assert ow.fine_tuning.create(**backwards, requires_vram_gb=80, priority=5, retries=1).id == first.id
    assert ow.fine_tuning.create(**base, seed=1).id != first.id
    assert ow.fine_tuning.create(**base, docker_image="my/image:1").id != first.id
    assert len(ow.jobs.list()) == 3


def test_memory_is_estimated_unless_given(ow: OpenWeights, conversations: Callable[..., Path]) -> None:
    """A larger model needs more; `requires_vram_gb` is taken as it is."""
    base = {"training_file": str(conversations()), "loss": "sft"}
    small = ow.fine_tuning.create(model="org/m-1B", **base).requires_vram_gb
    assert small < ow.fine_tuning.create(model="org/m-32B", **base).requires_vram_gb
    assert ow.fine_tuning.create(model="org/m-2B", requires_vram_gb=0, **base).requires_vram_gb == 0


def test_64_submits_at_once_are_one_job(ow: OpenWeights, conversations: Callable[..., Path]) -> None:
    """Whoever comes first creates it, everybody else joins."""
    path = conversations()
    ids: list[str] = []
    gate = threading.Barrier(64)

    def submit() -> None:
        gate.wait(30)
        ids.append(
            ow.fine_tuning.create(
                model="org/tiny-1B", training_file=str(path), loss="sft", requires_vram_gb=1
            ).id
        )

    threads = [threading.Thread(target=submit) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ids) == 64
    assert len(set(ids)) == 1
    [job] = ow.jobs.list(limit=100)
    assert (job.id, job.attempt) == (ids[0], 1)


def test_mount_order_and_place_do_not_matter_but_content_does(session: Session, tmp_path: Path) -> None:
    """Equal files at equal targets are the same job, wherever they lie and however they are ordered."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "main.py").write_text("print(1)")
        (tmp_path / folder / "data.txt").write_text("data")
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    first = script(session, {f"{here}/main.py": "main.py", f"{here}/data.txt": "data.txt"}).create(a=1, b="y")
    assert (
        script(session, {f"{there}/data.txt": "./data.txt", f"{there}/main.py": "main.py"})
        .create(b="y", a=1)
        .id
        == first.id
    )
    assert script(session, {there: "."}).create(b="y", a=1).id == first.id
    (tmp_path / "there" / "main.py").write_text("print(2)")
    assert script(session, {there: "."}).create(b="y", a=1).id != first.id


def test_folders_are_mounted_without_what_is_ignored(session: Session, tmp_path: Path) -> None:
    """A mounted folder honours `.owignore` and never holds secrets."""
    folder = tmp_path / "code"
    (folder / "deep").mkdir(parents=True)
    for name in ("main.py", "deep/util.py", "big.bin", ".env"):
        (folder / name).write_text(name)
    (folder / ".owignore").write_text("*.bin\n")
    job = script(session, {str(folder): "src"}).create()
    assert sorted(job.mounts) == ["src/deep/util.py", "src/main.py"]


def test_bad_mounts_name_the_mount(session: Session, tmp_path: Path) -> None:
    """A missing source, a doubled target, a target that climbs: nothing is submitted."""
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(InvalidParameterError, match=r"nowhere\.py"):
        script(session, {"nowhere.py": "main.py"}).create()
    with pytest.raises(InvalidParameterError, match="'x'"):
        script(session, {a: "x", b: "./x"}).create()
    with pytest.raises(InvalidParameterError, match="is a file"):
        script(session, {a: "x", b: "x/y"}).create()
    with pytest.raises(InvalidParameterError, match="not allowed"):
        script(session, {a: "../x"}).create()


def test_a_changed_entrypoint_is_another_job(session: Session) -> None:
    """Otherwise an edited command would be answered with the result of the old one."""
    other = type("Script", (Script,), {"get_entrypoint": lambda self, params: "python main.py --fast"})
    assert other(session).create().id != Script(session).create().id


def test_a_local_folder_as_the_model(
    ow: OpenWeights, conversations: Callable[..., Path], tmp_path: Path
) -> None:
    """Its files are mounted under `model/`, and the parameter says so."""
    folder = tmp_path / "tiny-1B"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    job = ow.fine_tuning.create(model=str(folder), training_file=str(conversations()), loss="sft")
    assert {"model/config.json", "model/model.safetensors"} < set(job.mounts)
    assert job.params["validated_params"]["model"] == "model"
    assert job.model is None
    assert ow.files.content(job.mounts["model/model.safetensors"]) == b"weights"
    with pytest.raises(InvalidParameterError, match=r"\./nowhere"):
        ow.fine_tuning.create(model="./nowhere", training_file=str(conversations()), loss="sft")


def test_a_file_that_does_not_exist_is_named(ow: OpenWeights) -> None:
    """An unknown id and a missing path both say which parameter and which value."""
    with pytest.raises(InvalidParameterError, match=r"training_file='conversations:file-0123456789ab'"):
        ow.fine_tuning.create(model="org/m", training_file="conversations:file-0123456789ab", loss="sft")
    with pytest.raises(InvalidParameterError, match=r"test_file='nowhere\.jsonl'"):
        ow.fine_tuning.create(
            model="org/m",
            training_file="conversations:file-0123456789ab",
            test_file="nowhere.jsonl",
            loss="sft",
        )
    assert ow.jobs.list() == []


def test_a_local_training_file_is_validated(ow: OpenWeights, tmp_path: Path) -> None:
    """Bad lines are named before anything is stored."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": "no"}\n')
    with pytest.raises(InvalidFileError, match="line 1"):
        ow.fine_tuning.create(model="org/m", training_file=str(path), loss="sft")
    assert ow.jobs.list() == []
    assert ow.files.list() == []


def test_bad_parameters_are_listed_together(ow: OpenWeights, conversations: Callable[..., Path]) -> None:
    """One error has a line for each bad field, without pydantic's own words around it."""
    with pytest.raises(InvalidParameterError) as caught:
        ow.fine_tuning.create(
            model="org/m", training_file=str(conversations()), loss="sft", r=-1, learning_rate="fast"
        )
    message = str(caught.value)
    assert "  r=-1: " in message
    assert "  learning_rate='fast': " in message
    assert "pydantic" not in message
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learnin_rate": 1e-4}, "'learnin_rate' is unknown; did you mean 'learning_rate'"),
        ({"allowed_hardwar": []}, "did you mean 'allowed_hardware'"),
        ({"zzz": 1}, "'zzz' is unknown; remove it"),
        ({"loss": None}, "loss=None"),
        ({"allowed_hardware": ["H200x"]}, "H200x"),
        ({"allowed_hardware": "1x H200"}, "allowed_hardware='1x H200'"),
        ({"allowed_hardware": []}, "allowed_hardware="),
        ({"requires_vram_gb": -1}, "requires_vram_gb=-1"),
        ({"requires_vram_gb": True}, "requires_vram_gb=True"),
        ({"priority": 10**9}, "priority="),
        ({"retries": -1}, "retries=-1"),
        ({"timeout": 0}, "timeout=0"),
        ({"max_price_per_hour": 0}, "max_price_per_hour=0"),
        ({"docker_image": "a image; rm"}, "docker_image="),
        ({"job_id_suffix": "../x"}, "job_id_suffix="),
        ({"env": {"OW_POD_ID": "x"}}, "set by the pod"),
        ({"env": {"a b": "x"}}, "environment variable"),
        ({"model": "ftjob-0123456789ab"}, "model='ftjob-0123456789ab': no such job in this organization"),
        ({"hf_token": "hf_x"}, "'hf_token' is unknown; store it with `ow env set HF_TOKEN`"),
        ({"epochs": 1, "num_train_epochs": 1}, "are one parameter"),
        ({"push": True}, "needs `hf_org`"),
    ],
)
def test_bad_arguments(
    ow: OpenWeights, conversations: Callable[..., Path], arguments: dict[str, Any], message: str
) -> None:
    """Every bad argument is refused with its name, its value and the mend."""
    base = {"model": "org/m", "training_file": str(conversations()), "loss": "sft"}
    with pytest.raises(InvalidParameterError) as caught:
        ow.fine_tuning.create(**{**base, **arguments})
    assert message in str(caught.value)


def test_a_required_parameter_that_is_missing(ow: OpenWeights) -> None:
    """Each missing one has its line."""
    with pytest.raises(InvalidParameterError, match=r"(?s)model: is required.*training_file: is required"):
        ow.fine_tuning.create(loss="sft")


def test_find_matches_at_any_depth(session: Session) -> None:
    """Parameters are found by value, inside of dicts, and dicts by containment."""
    one = Script(session).create(a=1, nested={"seed": 7, "tags": {"x": True, "y": 2}})
    Script(session).create(a=2)
    jobs = Script(session)
    assert [job.id for job in jobs.find(a=1)] == [one.id]
    assert [job.id for job in jobs.find(seed=7, x=True)] == [one.id]
    assert [job.id for job in jobs.find(tags={"y": 2})] == [one.id]
    assert jobs.find(a="1") == []
    assert jobs.find(seed=8) == []
    assert len(jobs.find()) == 2
