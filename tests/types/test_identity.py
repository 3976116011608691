from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.types.identity import FileId, file_id, job_id, parse_file_id

FILE = "custom_job_file:file-0123456789ab"
OTHER = "custom_job_file:file-ba9876543210"


def make_id(**changes: Any) -> str:
    values: dict[str, Any] = {
        "prefix": "ftjob",
        "job_type": "fine_tuning",
        "params": {"model": "org/name", "learning_rate": 1e-4, "epochs": 1},
        "mounts": {"train.py": FILE, "data/a.jsonl": OTHER},
        "image": None,
        "organization_id": "00000000-0000-0000-0000-000000000001",
        "behaviour_version": 1,
        "suffix": None,
    }
    return job_id(**{**values, **changes})


def test_job_id_is_pinned() -> None:
    """An upgrade that changes this id would run finished work again."""
    text = (
        '{"behaviour_version":1,"image":null,"job_type":"fine_tuning",'
        f'"mounts":{{"data/a.jsonl":"{OTHER}","train.py":"{FILE}"}},'
        '"organization_id":"00000000-0000-0000-0000-000000000001",'
        '"params":{"epochs":1,"learning_rate":0.0001,"model":"org/name"}}'
    )
    assert make_id() == f"ftjob-{hashlib.sha256(text.encode()).hexdigest()[:12]}" == "ftjob-9f9c935aba47"


@pytest.mark.parametrize(
    "changes",
    [
        {"params": {"epochs": 1, "learning_rate": 1e-4, "model": "org/name"}},
        {"params": {"epochs": 1.0, "learning_rate": 0.0001, "model": "org/name"}},
        {"mounts": {"data/a.jsonl": OTHER, "train.py": FILE}},
        {"mounts": {"./data//a.jsonl": OTHER, "train.py": FILE}},
    ],
)
def test_spelling_does_not_change_the_id(changes: dict[str, Any]) -> None:
    """Key order, mount order and the spelling of a target or number do not matter."""
    assert make_id(**changes) == make_id()


@pytest.mark.parametrize(
    "changes",
    [
        {"job_type": "weighted_sft"},
        {"params": {"epochs": 2, "learning_rate": 1e-4, "model": "org/name"}},
        {"mounts": {"train.py": FILE}},
        {"mounts": {"train.py": OTHER, "data/a.jsonl": FILE}},
        {"image": "other/image:1"},
        {"organization_id": "00000000-0000-0000-0000-000000000002"},
        {"behaviour_version": 2},
        {"suffix": "seed-2"},
    ],
)
def test_what_is_run_changes_the_id(changes: dict[str, Any]) -> None:
    """Other work, or the same work of another organization, is another job."""
    assert make_id(**changes) != make_id()


def test_suffix_is_appended() -> None:
    """The suffix makes a job of its own without changing the hash."""
    assert make_id(suffix="seed-2.b") == f"{make_id()}-seed-2.b"


@pytest.mark.parametrize("value", ["", "A", "../a b", "-a", "a/b", "a\n", "a" * 65, "é", 3])
def test_bad_parts_are_refused(value: Any) -> None:
    """A prefix or suffix that is not legal in a path, URL and label names field and value."""
    for field, name in (("prefix", "prefix"), ("suffix", "job_id_suffix")):
        with pytest.raises(InvalidParameterError, match=re.escape(f"{name}={value!r}"[:60])):
            make_id(**{field: value})


@pytest.mark.parametrize(
    ("mounts", "message"),
    [
        ({"../a": FILE}, "not allowed"),
        ({"a": "nonsense"}, "not a file id"),
        ({"a": FILE, "./a": OTHER}, "Two mounts"),
    ],
)
def test_bad_mounts_are_refused(mounts: dict[str, str], message: str) -> None:
    """A mount needs a safe target of its own and a file id."""
    with pytest.raises(InvalidParameterError, match=message):
        make_id(mounts=mounts)


def test_bad_parameter_is_named() -> None:
    """The error names the parameter by its path."""
    with pytest.raises(InvalidParameterError, match=r"job\.params\.lr is nan"):
        make_id(params={"lr": float("nan")})


def test_file_id_round_trip() -> None:
    """Putting together and taking apart are inverse."""
    text = file_id("conversations", "af2f6d4f2b9d")
    assert parse_file_id(text) == FileId(purpose="conversations", digest="af2f6d4f2b9d")
    assert str(parse_file_id(text)) == text == "conversations:file-af2f6d4f2b9d"


@pytest.mark.parametrize(
    "text",
    ["", "file-af2f6d4f2b9d", "c:file-af2f6d4f2b9", "c:file-AF2F6D4F2B9D", "c:file-af2f6d4f2b9d\n",
    "../c:file-af2f6d4f2b9d",
     "C:file-af2f6d4f2b9d", ":file-af2f6d4f2b9d", "1:file-af2f6d4f2b9d", "c:file-\u066012345678901", None, 3],
)  # fmt: skip
def test_anything_else_is_not_a_file_id(text: Any) -> None:
    """File ids become paths, so only the exact form passes."""
    with pytest.raises(InvalidParameterError, match="not a file id"):
        parse_file_id(text)


@pytest.mark.parametrize(
    ("purpose", "digest"), [("Con", "0" * 12), ("a/b", "0" * 12), ("a", "0" * 11), ("a", "x" * 12)]
)
def test_bad_file_id_parts_are_refused(purpose: str, digest: str) -> None:
    """A file id is never put together from parts that could not be taken apart again."""
    with pytest.raises(InvalidParameterError, match="not allowed"):
        file_id(purpose, digest)
