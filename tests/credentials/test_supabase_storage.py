from __future__ import annotations

import asyncio
import copy
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import serve
from prefect.locking.memory import MemoryLockManager
from prefect.results import ResultStore
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from openweights_prefect.credentials import SupabaseCredentials, SupabaseStorage
from openweights_prefect.errors import (
    AuthenticationError,
    ConfigurationError,
    InvalidParameterError,
    NotFoundError,
    PermissionDeniedError,
)

KEY = "sb_publishable_12345678"
TOKEN = "ow_canary0api0token"
FOLDER = "6f1c2f5e/flow-results"
HOSTILE = [
    "../other/secret",
    "a/../../secret",
    "/etc/passwd",
    "a\\..\\b",
    "C:/x",
    "nul\0",
    "..",
    ".. /x",
    "x\ny",
    "a" * 2000,
    "\u202etxt.exe",
]


class Project:
    """A Supabase project with one bucket, which answers as the real services do; one folder is allowed."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.failures: list[int] = []
        self.listed: list[dict[str, Any]] | None = None
        self.app = Starlette(
            routes=[
                Route("/functions/v1/exchange", self.exchange, methods=["POST"]),
                Route("/storage/v1/object/list/files", self.list, methods=["POST"]),
                Route("/storage/v1/object/authenticated/files/{name:path}", self.read),
                Route("/storage/v1/object/files/{name:path}", self.write, methods=["POST"]),
            ]
        )

    async def exchange(self, request: Request) -> Response:
        self.requests["exchange"] += 1
        if await request.json() != {"token": TOKEN} or request.headers["apikey"] != KEY:
            return JSONResponse({"error": "invalid_token"}, status_code=401)
        return JSONResponse({"access_token": "jwt", "token_type": "bearer", "expires_in": 900})

    async def read(self, request: Request) -> Response:
        name = request.path_params["name"]
        if failure := self.failure("read", request, name):
            return failure
        if name not in self.objects:
            return self.error(404, "Object not found")
        return Response(self.objects[name])

    async def write(self, request: Request) -> Response:
        name, content = request.path_params["name"], await request.body()
        if failure := self.failure("write", request, name):
            return failure
        if name in self.objects and request.headers.get("x-upsert") != "true":
            return self.error(409, "The resource already exists")
        self.objects[name] = content
        return JSONResponse({"Key": f"files/{name}"})

    async def list(self, request: Request) -> Response:
        body = await request.json()
        if failure := self.failure("list", request, f"{body['prefix']}/"):
            return failure
        if self.listed is not None:
            return JSONResponse(self.listed)
        folder = f"{body['prefix']}/" if body["prefix"] else ""
        below = [name.removeprefix(folder) for name in self.objects if name.startswith(folder)]
        entries = {name.partition("/")[0]: "/" not in name for name in below}
        rows = [
            {"name": name, "id": "1" if is_object else None} for name, is_object in sorted(entries.items())
        ]
        return JSONResponse(rows[body["offset"] : body["offset"] + body["limit"]])

    def failure(self, kind: str, request: Request, name: str) -> Response | None:
        self.requests[kind] += 1
        if self.failures:
            return Response("busy", status_code=self.failures.pop(0))
        if request.headers["authorization"] != "Bearer jwt" or request.headers["apikey"] != KEY:
            return self.error(403, "Invalid Compact JWS")
        if not name.startswith(f"{FOLDER}/"):
            return self.error(403, "new row violates row-level security policy")
        return None

    @staticmethod
    def error(status: int, message: str) -> Response:
        return JSONResponse({"statusCode": str(status), "error": "x", "message": message}, status_code=400)


@pytest.fixture
def project() -> Project:
    return Project()


@pytest.fixture
def url(project: Project) -> Iterator[str]:
    with serve(project.app) as address:
        yield address


@pytest.fixture
def storage(url: str) -> SupabaseStorage:
    return SupabaseStorage(basepath=FOLDER, credentials=SupabaseCredentials(url=url, key=KEY, token=TOKEN))


def test_what_is_written_can_be_read(storage: SupabaseStorage, project: Project) -> None:
    """From sync and async code; below the base path; written again, it is replaced; one token for all."""
    assert storage.write_path("a b/ä+&=#?.bin", b"1") == f"{FOLDER}/a b/ä+&=#?.bin"
    assert storage.read_path("a b/ä+&=#?.bin") == b"1"

    async def in_a_loop() -> bytes:
        await storage.awrite_path("x", b"2")
        # Their types are those of a sync caller or an async one.
        await storage.write_path("x", b"3")  # type: ignore[misc]
        return await storage.read_path("x")  # type: ignore[misc, no-any-return]

    assert asyncio.run(in_a_loop()) == b"3"
    assert project.objects == {f"{FOLDER}/a b/ä+&=#?.bin": b"1", f"{FOLDER}/x": b"3"}
    assert project.requests["exchange"] == 1


def test_threads_share_one_token(storage: SupabaseStorage, project: Project) -> None:
    """However many write at once."""
    threads = [threading.Thread(target=storage.write_path, args=(f"{n}", b"x")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(project.objects) == 8
    assert project.requests["exchange"] == 1


def test_a_copy_of_the_block_works(storage: SupabaseStorage) -> None:
    """Prefect copies blocks; a copy gets a token of its own."""
    copy.deepcopy(storage).write_path("x", b"1")
    assert storage.read_path("x") == b"1"


@pytest.mark.parametrize("path", HOSTILE)
def test_a_hostile_path_asks_nobody(storage: SupabaseStorage, project: Project, path: str) -> None:
    """Refused before a request, in every method."""
    for act in (
        lambda: storage.read_path(path),
        lambda: storage.write_path(path, b""),
        lambda: storage.get_directory(path),
        lambda: storage.put_directory(to_path=path),
        lambda: SupabaseStorage(basepath=path),
    ):
        with pytest.raises(InvalidParameterError, match="not allowed"):
            act()
    assert not project.requests


def test_percent_signs_stay_what_they_are(storage: SupabaseStorage, project: Project) -> None:
    """An encoded climb is the name of a file below the folder."""
    storage.write_path("%2e%2e/%2e%2e/x", b"1")
    assert list(project.objects) == [f"{FOLDER}/%2e%2e/%2e%2e/x"]


def test_errors_say_what_was_asked_for(storage: SupabaseStorage, url: str) -> None:
    """What is missing, what is refused, and a token that is no longer good; no message holds the token."""
    with pytest.raises(NotFoundError, match=r"There is no '.*flow-results/none' in the bucket 'files'"):
        storage.read_path("none")
    other = SupabaseStorage(basepath="elsewhere", credentials=storage.credentials)
    with pytest.raises(PermissionDeniedError, match="new row violates row-level security policy"):
        other.write_path("x", b"")
    revoked = SupabaseCredentials(url=url, key=KEY, token="ow_canary0revoked")
    with pytest.raises(AuthenticationError, match="The API token was refused") as caught:
        SupabaseStorage(credentials=revoked).read_path("x")
    assert "canary" not in str(caught.value)


def test_passing_failures_are_not_noticed(storage: SupabaseStorage, project: Project, tmp_path: Path) -> None:
    """Prefect ends a run well even when its result was not written, so it is tried again."""
    project.failures = [503, 429]
    storage.write_path("x", b"1")
    project.failures = [502]
    assert storage.read_path("x") == b"1"
    assert project.requests == {"exchange": 1, "write": 3, "read": 2}


def test_folders_go_up_and_come_down(storage: SupabaseStorage, project: Project, tmp_path: Path) -> None:
    """More files than one page of the listing has, folders in folders; ignored files stay here."""
    source, target, ignore = tmp_path / "source", tmp_path / "target", tmp_path / "ignore"
    (source / "sub" / "deeper").mkdir(parents=True)
    (source / "sub" / "deeper" / "b.txt").write_text("b")
    (source / "keep.txt").write_text("k")
    (source / "skip.log").write_text("s")
    ignore.write_text("*.log\n")
    assert storage.put_directory(str(source), "code", str(ignore)) == 2
    many = {f"{FOLDER}/code/many/{n:04}": b"%d" % n for n in range(1203)}
    project.objects.update(many)
    with storage._objects() as objects:
        assert len(set(objects.list(f"{FOLDER}/code"))) == 1205
    for name in list(many)[5:]:
        del project.objects[name]
    storage.get_directory("code", str(target))
    found = {
        path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()
    }
    expected = {"keep.txt": "k", "sub/deeper/b.txt": "b", **{f"many/{n:04}": str(n) for n in range(5)}}
    assert found == expected


def test_a_hostile_listing_writes_nothing(storage: SupabaseStorage, project: Project, tmp_path: Path) -> None:
    """Whoever made an object chose its name."""
    project.listed = [{"name": "../../escaped", "id": "1"}]
    with pytest.raises(InvalidParameterError, match="not allowed"):
        storage.get_directory(local_path=str(tmp_path / "a" / "b"))
    assert list(tmp_path.rglob("*")) == []


def test_a_link_out_of_the_folder_is_an_error(
    storage: SupabaseStorage, project: Project, tmp_path: Path
) -> None:
    """Nothing is uploaded then."""
    (tmp_path / "source").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "source" / "a.txt").write_text("a")
    (tmp_path / "source" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidParameterError, match="'link' links to"):
        storage.put_directory(str(tmp_path / "source"))
    assert project.objects == {}
    with pytest.raises(InvalidParameterError, match="is not a folder"):
        storage.put_directory(str(tmp_path / "none"))


def test_a_download_that_fails_leaves_the_file_as_it_was(
    storage: SupabaseStorage, project: Project, tmp_path: Path
) -> None:
    """And no half-written one beside it."""
    project.objects[f"{FOLDER}/x"] = b"new"
    (tmp_path / "x").write_text("old")
    project.listed = [{"name": "x", "id": "1"}, {"name": "y", "id": "1"}]
    with pytest.raises(NotFoundError):
        storage.get_directory(local_path=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "new"


def test_prefect_keeps_results_there(storage: SupabaseStorage, project: Project) -> None:
    """Written, found and read by Prefect's own result store, also under a lock."""
    store = ResultStore(result_storage=storage, lock_manager=MemoryLockManager())  # type: ignore[no-untyped-call]
    assert not store.exists("job-1")
    store.write({"loss": 0.5}, key="job-1")
    assert list(project.objects) == [f"{FOLDER}/job-1"]
    assert json.loads(project.objects[f"{FOLDER}/job-1"])["metadata"]["storage_key"] == f"{FOLDER}/job-1"
    again = ResultStore(result_storage=copy.deepcopy(storage))
    assert again.exists("job-1")
    assert again.read("job-1").result == {"loss": 0.5}


def test_without_credentials_it_uses_the_settings_of_the_process(
    url: str, project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So a pod needs no block document with a token."""
    for name in [name for name in os.environ if name.startswith(("OW_", "SUPABASE_", "OPENWEIGHTS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OW_HOME", str(tmp_path))
    storage = SupabaseStorage(basepath=FOLDER)
    with pytest.raises(ConfigurationError, match="names no `credentials`"):
        storage.read_path("x")
    monkeypatch.setenv("SUPABASE_URL", url)
    monkeypatch.setenv("SUPABASE_ANON_KEY", KEY)
    monkeypatch.setenv("OPENWEIGHTS_API_KEY", TOKEN)
    storage.write_path("x", b"1")
    assert storage.read_path("x") == b"1"
    assert project.requests["exchange"] == 1
