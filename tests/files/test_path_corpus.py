"""Hostile names on every entrance of a file name: nothing is read or written outside of its folder."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from backings import CONTENT, ID, ORGANIZATION, Backing

from openweights_prefect.client import OpenWeights
from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.files.folders import walk_folder
from openweights_prefect.files.store import FileStore, LocalFileStore
from openweights_prefect.pod import folder as folders
from openweights_prefect.resources.download import download_run
from openweights_prefect.resources.session import Session
from openweights_prefect.resources.submission import local_mounts
from openweights_prefect.runtime.entrypoint import RunFolder
from openweights_prefect.settings import Settings

REFUSED = {
    "parent": "..",
    "above": "../escaped",
    "above and back": "a/../../escaped",
    "parent inside": "a/../b",
    "absolute": "/escaped",
    "two slashes": "//escaped",
    "empty": "",
    "the folder itself": ".",
    "only dots": "...",
    "parent with a space": ".. /escaped",
    "spaces": "   ",
    "NUL": "a\x00b",
    "line break": "a\nb",
    "escape sequence": "\x1b[2Ja",
    "delete": "a\x7f",
    "next line": "a\x85b",
    "line separator": "a\u2028b",
    "right to left": "a\u202efdp.exe",
    "isolate": "a\u2066b",
    "half a surrogate": "a\udc80",
    "backslashes": "..\\escaped",
    "UNC": "\\\\server\\share",
    "drive": "C:/escaped",
    "drive without slash": "C:escaped",
    "device": "CON",
    "device with extension": "a/nul.txt",
    "device with a dot": "aux.",
    "device in superscript": "com\u00b9",
    "long part": "x" * 256,
    "long part in UTF-8": "\u00e9" * 128,
    "long path": "a/" * 600 + "b",
    "very long": "x" * 100_000,
}

TAKEN = {
    "home": "~/.ssh/config",
    "home of root": "~root",
    "variable": "$HOME/x",
    "option": "-rf",
    "trailing dot": "a.",
    "trailing space": "a ",
    "dots in names": "..a/b..",
    "composed": unicodedata.normalize("NFC", "caf\u00e9"),
    "decomposed": unicodedata.normalize("NFD", "caf\u00e9"),
    "Hebrew": "\u05e9\u05dc\u05d5\u05dd",
    "division slash": "..\u2215escaped",
    "full-width slash": "..\uff0fescaped",
    "full-width dots": "\uff0e\uff0e/escaped",
    "two dot leader": "\u2025/escaped",
    "quote": "a'\"`;$(touch escaped)",
    "percent": "..%2f..%2fescaped",
    "hidden": ".hidden",
    "wildcard": "*",
    "emoji": "\U0001f600",
}

CORPUS = [pytest.param(text, False, id=name) for name, text in REFUSED.items()]
CORPUS += [pytest.param(text, True, id=name) for name, text in TAKEN.items()]


class Fence:
    """A folder in the middle of others, all of which must stay as they are."""

    def __init__(self, root: Path) -> None:
        self.inside = root / "a" / "b" / "inside"
        self.inside.mkdir(parents=True)
        self._root = root
        self._before = self._outside()

    def _outside(self) -> set[Path]:
        return {path for path in self._root.rglob("*") if not path.is_relative_to(self.inside)}

    def holds(self) -> None:
        assert self._outside() == self._before
        for name in ("escaped", "b"):
            assert not Path("/", name).exists()
            assert not Path(name).exists()


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    """Checked at the end of the test."""
    made = Fence(tmp_path / "fence")
    yield made
    made.holds()


def refuses(taken: bool) -> Any:
    """Expect the one error for a name that is refused."""
    if taken:
        return contextlib.nullcontext()
    return pytest.raises(InvalidParameterError, match=r"is not allowed|is not a file id")


@pytest.mark.parametrize(("text", "taken"), CORPUS)
def test_mount_target_when_submitted(fence: Fence, text: str, taken: bool) -> None:
    """A target of a mounted file or folder is refused before anything is hashed or sent."""
    (fence.inside / "source").write_text("x")
    session = cast(Session, SimpleNamespace(organization_id=ORGANIZATION))
    with refuses(taken):
        mounts = local_mounts(session, {str(fence.inside / "source"): text})
        assert list(mounts) == [str(PurePosixPath(text))]
    if text not in ("", "."):  # Which name the run's folder itself, as a folder may.
        with refuses(taken):
            mounts = local_mounts(session, {str(fence.inside): text})
            assert list(mounts) == [str(PurePosixPath(text) / "source")]


@pytest.mark.parametrize(("text", "taken"), CORPUS)
def test_mount_target_on_the_pod(fence: Fence, text: str, taken: bool) -> None:
    """A target that came into the ledger some other way is refused again, where it would be written."""
    run = RunFolder(fence.inside / "run")
    job = {"mounts": {text: ID}, "params": {}}
    with refuses(taken):
        folders.prepare(
            run, job, job_socket=fence.inside / "s", fetch=lambda _, target: void(target.write_text("x"))
        )
        assert (run.work / text).read_text() == "x"


def void(_: object) -> None:
    """Nothing."""


@pytest.mark.parametrize(("text", "taken"), CORPUS)
def test_names_that_a_run_leaves(fence: Fence, text: str, taken: bool) -> None:
    """What a job can call a file in `uploads/` is stored under that name, or refused with its name."""
    run = RunFolder(fence.inside)
    (run.work / "uploads").mkdir(parents=True)
    path = Path(os.path.normpath(f"{run.work}/uploads/{text}"))
    try:
        assert path.is_relative_to(run.work / "uploads")
        assert path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    except (AssertionError, OSError, ValueError):
        pytest.skip("no file can have this name")
    with refuses(taken or str(path.relative_to(run.work / "uploads")) != text):
        [(name, found)] = folders.left_files(run)
        assert (found, found.read_text()) == (path, "x")
        assert name == str(path.relative_to(run.work / "uploads"))


def test_links_that_a_run_leaves(fence: Fence, tmp_path: Path) -> None:
    """A link in `uploads/` is not followed, and `uploads` itself must not be one."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    run = RunFolder(fence.inside)
    (run.work / "uploads").mkdir(parents=True)
    (run.work / "uploads" / "file").symlink_to(tmp_path / "secret" / "key")
    (run.work / "uploads" / "folder").symlink_to(tmp_path / "secret")
    assert folders.left_files(run) == []
    for link in (run.work / "uploads").iterdir():
        link.unlink()
    (run.work / "uploads").rmdir()
    (run.work / "uploads").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidParameterError, match="is a link"):
        folders.left_files(run)


@pytest.mark.parametrize(("text", "taken"), CORPUS)
def test_names_in_a_mounted_folder(fence: Fence, text: str, taken: bool) -> None:
    """Walking a folder gives the names that are legal everywhere, and one error for another."""
    if "/" in text or text in ("", ".", "..") or (sys.platform != "linux" and not taken):
        pytest.skip("no file can have this name")
    try:
        (fence.inside / text).write_text("x")
    except (OSError, ValueError):
        pytest.skip("no file can have this name")
    with refuses(taken):
        assert [file.target for file in walk_folder(fence.inside).files] == [text]


def test_key_of_a_result(backing: Backing) -> None:
    """A key is kept as it is below the folder of its organization's results, or refused."""
    for text in REFUSED.values():
        with refuses(taken=False):
            backing.store.write_result(text, ORGANIZATION, b"x")
        with refuses(taken=False):
            backing.store.read_result(text, ORGANIZATION)
    assert backing.objects() == {}
    for text in TAKEN.values():
        backing.store.write_result(text, ORGANIZATION, text.encode())
    folder = f"organizations/{ORGANIZATION}/flow-results"
    assert backing.objects() == {f"{folder}/{text}": text.encode() for text in TAKEN.values()}


def calls_with(store: FileStore, folder: Path, file: str, organization: str) -> Iterator[Any]:
    yield lambda: store.put(file, organization, io.BytesIO(CONTENT))
    yield lambda: store.open(file, organization)
    yield lambda: store.fetch(file, organization, folder / "copy")
    yield lambda: store.exists(file, organization)
    yield lambda: store.delete(file, organization)


def test_file_ids_and_organizations(backing: Backing, fence: Fence) -> None:
    """No part of a file id, and no organization id, is ever a path."""
    name = ID.split(":")[1]
    for text in (*REFUSED.values(), *TAKEN.values()):
        for file in (text, f"{text}:{name}", f"result:{text}", f"result:file-{text}", f"{ID}{text or '/'}"):
            for call in calls_with(backing.store, fence.inside, file, ORGANIZATION):
                with pytest.raises(InvalidParameterError, match="is not a file id"):
                    call()
        if text.isascii() and text.isalnum() and len(text) < 64:
            continue
        for call in calls_with(backing.store, fence.inside, ID, text):
            with pytest.raises(InvalidParameterError, match="organization_id="):
                call()
    assert backing.objects() == {}


class Events:
    """A ledger that has one run, with one event whose path a job chose."""

    def __init__(self, path: str) -> None:
        self._row = {
            "id": 1,
            "run_id": str(uuid4()),
            "sequence": 0,
            "created_at": "2026-01-01T00:00:00+00:00",
            "data": {"path": path},
            "file": ID,
        }

    def call(self, function: str, **arguments: Any) -> list[dict[str, Any]]:
        return [] if arguments.get("after_id") else [self._row]


@pytest.mark.parametrize(("text", "taken"), CORPUS)
def test_download_of_a_run(fence: Fence, tmp_path: Path, text: str, taken: bool) -> None:
    """A path that a job logged is used below the folder, or replaced by a name made of the file id."""
    store = LocalFileStore(tmp_path / "store")
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    session = cast(
        Session,
        SimpleNamespace(ledger=Events(text), store=store, organization_id=ORGANIZATION, settings=Settings()),
    )
    run = SimpleNamespace(id=str(uuid4()), log_file=ID, status="completed")
    written, log = download_run(session, cast(Any, run), fence.inside)
    named = PurePosixPath(text) if taken else PurePosixPath(ID.replace(":", "-"))
    assert written == fence.inside / named
    assert written.read_bytes() == CONTENT
    assert log.parent == fence.inside


def test_name_of_an_upload(ledger_url: str, fence: Fence) -> None:
    """A name that came with a stream leads nowhere else when its file is downloaded into a folder."""
    target = fence.inside / "target"
    target.mkdir()
    with OpenWeights(settings=Settings(home=fence.inside / "home", database_url=ledger_url)) as ow:
        for text in (*REFUSED.values(), *TAKEN.values()):
            stream = io.BytesIO(text.encode(errors="surrogatepass"))
            stream.name = text
            with refuses(taken=True) if is_legal_name(text) else contextlib.suppress(InvalidParameterError):
                file = ow.files.create(stream, purpose="custom_job_file")
                assert ow.files.download(file["id"], target).parent == target


def is_legal_name(text: str) -> bool:
    """Whether what is left of a path, when its folders are taken off, is taken."""
    return any(PurePosixPath(text).name == PurePosixPath(name).name for name in TAKEN.values())
