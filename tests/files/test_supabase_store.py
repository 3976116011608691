"""The file store in Supabase Storage: real HTTP, real policies, and processes that are really killed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest
from backings import CuttingProxy
from starlette.requests import Request
from starlette.responses import Response

from openweights_prefect.errors import (
    InvalidParameterError,
    LedgerUnavailable,
    NotFoundError,
    OpenWeightsError,
    PermissionDeniedError,
)
from openweights_prefect.files.hashing import digest_stream
from openweights_prefect.files.store import CorruptFileError, FileStoreError
from openweights_prefect.files.supabase import SupabaseFileStore
from openweights_prefect.ledger.identity import LocalIdentity, hash_secret
from openweights_prefect.settings import LOCAL_ORGANIZATION_ID as ORGANIZATION
from openweights_prefect.types.identity import file_id
from tests.callers import Callers
from tests.ledger import test_transitions as ledger_calls
from tests.supabase_double import SupabaseDouble

OTHER = str(uuid4())
MB = 1 << 20
CHUNK = 6 * MB
RESUMABLE = "/storage/v1/upload/resumable"
UPLOAD = """
import sys, tracemalloc
from pathlib import Path
from openweights_prefect.files.supabase import SupabaseFileStore
url, key, token, uploads, file, organization, path = sys.argv[1:]
store = SupabaseFileStore(url, key, bearer=lambda: token, uploads_folder=Path(uploads))
tracemalloc.start()
store.put(file, organization, Path(path))
"""
WATCH = """
store.fetch(file, organization, Path(path + ".copy"))
print(tracemalloc.get_traced_memory()[1])
"""


def id_of(content: bytes, purpose: str = "result") -> str:
    return file_id(purpose, digest_stream(io.BytesIO(content), ORGANIZATION).id_hex12)


@pytest.fixture
def transport() -> str:
    return "supabase"


@pytest.fixture
def bearer(supabase: SupabaseDouble) -> Callable[[], str]:
    """Access tokens of the admin of the local organization."""
    return supabase.access(supabase.exchange.grant(LocalIdentity(ORGANIZATION).claims())).bearer


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    return tmp_path / "uploads"


@pytest.fixture
def store(supabase: SupabaseDouble, bearer: Callable[[], str], uploads: Path) -> Iterator[SupabaseFileStore]:
    opened = SupabaseFileStore(
        supabase.url, supabase.key, bearer=bearer, uploads_folder=uploads, patience_seconds=20
    )
    yield opened
    opened.close()


class Recorder:
    """Sees the requests to a path, and answers some of them itself."""

    def __init__(
        self, path: str, method: str, answers: dict[int, Callable[[Request], Response | None]]
    ) -> None:
        self.seen: list[Request] = []
        self._path, self._method, self._answers = path, method, answers

    def __call__(self, request: Request) -> Response | None:
        if request.method != self._method or not request.url.path.startswith(self._path):
            return None
        self.seen.append(request)
        answer = self._answers.get(len(self.seen))
        return answer(request) if answer else None

    def offsets(self) -> list[int]:
        return [int(request.headers["upload-offset"]) for request in self.seen]


def stored(ledger_url: str) -> dict[str, int]:
    """Names and sizes of all objects."""
    with psycopg.connect(ledger_url.replace("authenticator@", "postgres@")) as connection:
        rows = connection.execute("select name, (metadata ->> 'size')::bigint from storage.objects")
        return {name: size for name, size in rows}


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5])
def test_sizes_around_the_pieces(
    store: SupabaseFileStore, ledger_url: str, tmp_path: Path, size: int
) -> None:
    """What was put is fetched, and lies in the folder of its organization."""
    content = os.urandom(size)
    file = id_of(content)
    assert not store.exists(file, ORGANIZATION)
    store.put(file, ORGANIZATION, io.BytesIO(content))
    store.put(file, ORGANIZATION, io.BytesIO(content))
    store.fetch(file, ORGANIZATION, tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == content
    assert stored(ledger_url) == {f"{ORGANIZATION}/result/{file.split(':')[1]}": size}
    store.delete(file, ORGANIZATION)
    store.delete(file, ORGANIZATION)
    assert stored(ledger_url) == {}
    with pytest.raises(NotFoundError):
        store.open(file, ORGANIZATION)


def test_a_killed_upload_goes_on_where_it_stopped(
    supabase: SupabaseDouble,
    store: SupabaseFileStore,
    bearer: Callable[[], str],
    uploads: Path,
    tmp_path: Path,
) -> None:
    """20 MB; the process is killed after two of four pieces, and the next one sends the other two."""
    path = tmp_path / "large"
    path.write_bytes(content := os.urandom(20 * MB))
    third = threading.Event()

    def hold(request: Request) -> Response:
        third.set()
        return Response("not now", 503)

    recorder = supabase.intercept = Recorder(RESUMABLE, "PATCH", dict.fromkeys(range(3, 100), hold))
    arguments = [supabase.url, supabase.key, bearer(), str(uploads), id_of(content), ORGANIZATION, str(path)]
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, *arguments])
    try:
        assert third.wait(60)
    finally:
        process.kill()
        process.wait(10)
    assert not store.exists(id_of(content), ORGANIZATION)
    recorder = supabase.intercept = Recorder(RESUMABLE, "PATCH", {})
    store.put(id_of(content), ORGANIZATION, path)
    assert recorder.offsets() == [2 * CHUNK, 3 * CHUNK]
    store.fetch(id_of(content), ORGANIZATION, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert not list(uploads.glob("*.json"))


def test_an_upload_of_other_bytes_is_not_gone_on_with(
    supabase: SupabaseDouble, store: SupabaseFileStore, tmp_path: Path
) -> None:
    """The file was different while the first process read it: what it had sent is thrown away."""
    content = os.urandom(13 * MB)
    path = tmp_path / "large"
    path.write_bytes(b"different" + content[9:])
    supabase.intercept = Recorder(RESUMABLE, "PATCH", {2: lambda request: Response("no", 403)})
    with pytest.raises(PermissionDeniedError):
        store.put(id_of(content), ORGANIZATION, path)
    path.write_bytes(content)
    recorder = supabase.intercept = Recorder(RESUMABLE, "PATCH", {})
    store.put(id_of(content), ORGANIZATION, path)
    assert recorder.offsets() == [0, CHUNK, 2 * CHUNK]
    with store.open(id_of(content), ORGANIZATION) as stream:
        assert stream.read() == content


def test_answers_that_are_lost(supabase: SupabaseDouble, store: SupabaseFileStore, tmp_path: Path) -> None:
    """Of the second piece the service kept the first MB before it failed: the rest follows, once."""
    content = os.urandom(13 * MB)

    def keep_a_part(request: Request) -> Response:
        [upload] = [path for path in (tmp_path / "supabase").glob("upload-*") if not path.suffix]
        with upload.open("ab") as sink:
            sink.write(content[CHUNK : CHUNK + MB])
        return Response("bad gateway", 502)

    recorder = supabase.intercept = Recorder(RESUMABLE, "PATCH", {2: keep_a_part})
    store.put(id_of(content), ORGANIZATION, io.BytesIO(content))
    assert recorder.offsets() == [0, CHUNK, CHUNK, CHUNK + MB, 2 * CHUNK]
    with store.open(id_of(content), ORGANIZATION) as stream:
        assert stream.read() == content


def test_a_last_piece_without_an_answer_is_not_taken_for_granted(
    supabase: SupabaseDouble, store: SupabaseFileStore, tmp_path: Path
) -> None:
    """The service has all bytes, but failed to make the object: they are sent again."""
    content = os.urandom(13 * MB)

    def keep_the_rest(request: Request) -> Response:
        [upload] = [path for path in (tmp_path / "supabase").glob("upload-*") if not path.suffix]
        with upload.open("ab") as sink:
            sink.write(content[2 * CHUNK :])
        return Response("bad gateway", 502)

    supabase.intercept = Recorder(RESUMABLE, "PATCH", {3: keep_the_rest})
    store.put(id_of(content), ORGANIZATION, io.BytesIO(content))
    with store.open(id_of(content), ORGANIZATION) as stream:
        assert stream.read() == content


def test_an_upload_that_the_service_forgot_begins_again(
    supabase: SupabaseDouble, store: SupabaseFileStore
) -> None:
    """Uploads end after a day."""
    content = os.urandom(13 * MB)
    supabase.intercept = Recorder(RESUMABLE, "PATCH", {2: lambda request: Response("gone", 410)})
    store.put(id_of(content), ORGANIZATION, io.BytesIO(content))
    assert store.exists(id_of(content), ORGANIZATION)


@pytest.mark.parametrize("same", [True, False])
def test_eight_threads(store: SupabaseFileStore, ledger_url: str, same: bool) -> None:
    """They share one store, whether they bring the same file or their own."""
    contents = [os.urandom(7 * MB) for _ in range(1 if same else 8)] * (8 if same else 1)

    def put(content: bytes) -> bytes:
        store.put(id_of(content), ORGANIZATION, io.BytesIO(content))
        with store.open(id_of(content), ORGANIZATION) as stream:
            return stream.read()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(put, contents)) == contents
    assert len(stored(ledger_url)) == (1 if same else 8)


@pytest.mark.parametrize("size", [10, 13 * MB])
def test_wrong_bytes_are_refused_and_never_seen(
    store: SupabaseFileStore, ledger_url: str, tmp_path: Path, uploads: Path, size: int
) -> None:
    """The id of other content: nothing becomes visible, and nothing unfinished stays."""
    with pytest.raises(InvalidParameterError, match="is not that of"):
        store.put(id_of(b"other"), ORGANIZATION, io.BytesIO(os.urandom(size)))
    assert stored(ledger_url) == {}
    assert not list((tmp_path / "supabase").glob("upload-*"))
    assert not list(uploads.glob("*.json"))


def test_a_damaged_object_is_noticed_and_replaced(
    store: SupabaseFileStore, ledger_url: str, tmp_path: Path
) -> None:
    """By its hash when it is read, by its size when it is put again."""
    store.put(id_of(b"content"), ORGANIZATION, io.BytesIO(b"content"))
    with psycopg.connect(ledger_url.replace("authenticator@", "postgres@")) as connection:
        [version] = connection.execute("select version from storage.objects").fetchone() or [""]
        (tmp_path / "supabase" / version).write_bytes(b"damaged")
        (tmp_path / "copy").write_bytes(b"before")
        with pytest.raises(CorruptFileError):
            store.fetch(id_of(b"content"), ORGANIZATION, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"before"
        connection.execute("update storage.objects set metadata = metadata || '{\"size\": 3}'")
    store.put(id_of(b"content"), ORGANIZATION, io.BytesIO(b"content"))
    store.fetch(id_of(b"content"), ORGANIZATION, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"


def test_another_organization_is_out_of_reach(
    supabase: SupabaseDouble, store: SupabaseFileStore, ledger_url: str, uploads: Path
) -> None:
    """Neither to read nor to write, whatever the size; a header does not make a member."""
    mine = id_of(b"mine")
    store.put(mine, ORGANIZATION, io.BytesIO(b"mine"))
    supabase.ledger({**LocalIdentity(OTHER).claims(), "sub": str(uuid4())}).call(
        "create_organization", organization_id=OTHER, name="other"
    )
    claims = {**LocalIdentity(OTHER).claims(), "sub": str(uuid4())}
    for caller in (claims, {name: value for name, value in claims.items() if name != "organization_id"}):
        bearer = supabase.access(supabase.exchange.grant(caller)).bearer
        stranger = SupabaseFileStore(supabase.url, supabase.key, bearer=bearer, uploads_folder=uploads)
        assert not stranger.exists(mine, ORGANIZATION)
        with pytest.raises(NotFoundError):
            stranger.open(mine, ORGANIZATION)
        for size in (5, 7 * MB):
            with pytest.raises(PermissionDeniedError):
                stranger.put(id_of(b"a" * size), ORGANIZATION, io.BytesIO(b"a" * size))
        with pytest.raises(PermissionDeniedError):
            stranger.write_result("key", ORGANIZATION, b"")
        stranger.delete(mine, ORGANIZATION)
        stranger.close()
    assert len(stored(ledger_url)) == 1


def test_a_pod_reads_the_files_of_its_job(
    supabase: SupabaseDouble, store: SupabaseFileStore, open_ledger: Callable[[], Callers], uploads: Path
) -> None:
    """And no others, and only while it runs; it adds files and results, replaces and deletes none."""
    ledger, contents = open_ledger(), {id_of(text, "mount"): text for text in (b"mine", b"not mine")}
    for file, content in contents.items():
        store.put(file, ORGANIZATION, io.BytesIO(content))
        row = {"id": file, "purpose": "mount", "filename": "f", "bytes": 1, "sha256": "0" * 64}
        ledger.call("register_file", file=row)
    mine, other = contents
    ledger_calls.submit(ledger, ledger_calls.a_job(files=[mine]))
    run = ledger_calls.flow_run_for(ledger, "probe-1")
    ledger_calls.buy(ledger)
    process = ledger_calls.boot(ledger)
    claims = ledger.service.call("exchange_token", hash=hash_secret("owp_pod-1"))[0]["claims"]
    bearer = supabase.access(supabase.exchange.grant(claims)).bearer
    pod = SupabaseFileStore(supabase.url, supabase.key, bearer=bearer, uploads_folder=uploads)
    assert not pod.exists(mine, ORGANIZATION)
    with pytest.raises(PermissionDeniedError):
        pod.put(id_of(b"early"), ORGANIZATION, io.BytesIO(b"early"))
    assert ledger_calls.open_run(ledger, run, process)["outcome"] == "opened"
    with pod.open(mine, ORGANIZATION) as stream:
        assert stream.read() == b"mine"
    assert not pod.exists(other, ORGANIZATION)
    for content in (b"output", os.urandom(7 * MB)):
        for _ in range(2):
            pod.put(id_of(content), ORGANIZATION, io.BytesIO(content))
        assert store.exists(id_of(content), ORGANIZATION)
    pod.write_result("key", ORGANIZATION, b"result")
    with pytest.raises(PermissionDeniedError):
        pod.write_result("key", ORGANIZATION, b"another")
    for file in (mine, other):
        pod.delete(file, ORGANIZATION)
        assert store.exists(file, ORGANIZATION)
    ledger_calls.finish(ledger, run, process, "completed")
    assert not pod.exists(mine, ORGANIZATION)
    pod.close()


def test_the_control_plane_reads_and_writes(supabase: SupabaseDouble, uploads: Path) -> None:
    """With its own database role, and although the exchange is away at first."""
    fresh = supabase.access(supabase.exchange.grant(LocalIdentity(ORGANIZATION, "ow_worker").claims())).bearer
    outages = iter(range(2))

    def bearer() -> str:
        if next(outages, None) is not None:
            raise LedgerUnavailable("no exchange")
        return fresh()

    store = SupabaseFileStore(supabase.url, supabase.key, bearer=bearer, uploads_folder=uploads)
    for data in (b"first", b"second"):
        store.put(id_of(data), ORGANIZATION, io.BytesIO(data))
        store.write_result("key", ORGANIZATION, data)
        assert store.read_result("key", ORGANIZATION) == data
    store.delete(id_of(b"first"), ORGANIZATION)
    assert not store.exists(id_of(b"first"), ORGANIZATION)
    store.close()


def test_results_are_replaced_as_a_whole(store: SupabaseFileStore) -> None:
    """Unlike files, which are what their id says."""
    assert store.read_result("folder/key", ORGANIZATION) is None
    for data in (b"first", b"second", b""):
        store.write_result("folder/key", ORGANIZATION, data)
        assert store.read_result("folder/key", ORGANIZATION) == data


def test_files_cannot_be_replaced_through_the_service(
    supabase: SupabaseDouble, store: SupabaseFileStore, bearer: Callable[[], str]
) -> None:
    """Whoever writes to the bucket by other means cannot put other bytes under a file's id."""
    from supabase import StorageException, create_client
    from supabase.lib.client_options import SyncClientOptions

    store.put(file := id_of(b"content"), ORGANIZATION, io.BytesIO(b"content"))
    headers = {"Authorization": f"Bearer {bearer()}"}
    options = SyncClientOptions(headers=headers, httpx_client=httpx.Client())
    bucket = create_client(supabase.url, supabase.key, options).storage.from_("files")
    name = f"{ORGANIZATION}/result/{file.split(':')[1]}"
    assert bucket.download(name) == b"content"
    assert [entry["name"] for entry in bucket.list(f"{ORGANIZATION}/result")] == [file.split(":")[1]]
    for upsert in ("true", "false"):
        with pytest.raises(StorageException, match=r"row-level security|already exists"):
            bucket.upload(name, b"changed", {"upsert": upsert})
    assert bucket.download(name) == b"content"


def test_a_broken_download_goes_on_where_it_broke(
    supabase: SupabaseDouble, store: SupabaseFileStore, bearer: Callable[[], str], tmp_path: Path
) -> None:
    """Twice in 3 MB; what breaks at every attempt is an error, and the target is untouched."""
    content = os.urandom(3 * MB)
    store.put(file := id_of(content), ORGANIZATION, io.BytesIO(content))
    for times, fine in ((2, True), (100, False)):
        proxy = CuttingProxy(supabase.url, after_bytes=MB // 2, times=times)
        through = SupabaseFileStore(proxy.url, supabase.key, bearer=bearer, uploads_folder=tmp_path / "u")
        if fine:
            through.fetch(file, ORGANIZATION, tmp_path / "copy")
        else:
            with pytest.raises(FileStoreError, match="broke off"):
                through.fetch(file, ORGANIZATION, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content
        through.close()
        proxy.close()


def test_a_stream_that_cannot_be_read_twice(store: SupabaseFileStore) -> None:
    """A pipe is copied to the disk, since the service asks for the size first."""
    content = os.urandom(7 * MB)
    reader, writer = os.pipe()

    def fill() -> None:
        with os.fdopen(writer, "wb") as sink:
            sink.write(content)

    thread = threading.Thread(target=fill)
    thread.start()
    with os.fdopen(reader, "rb") as stream:
        store.put(id_of(content), ORGANIZATION, stream)
    thread.join()
    assert store.exists(id_of(content), ORGANIZATION)


def test_memory_is_flat(supabase: SupabaseDouble, bearer: Callable[[], str], tmp_path: Path) -> None:
    """A file of 60 MB takes no more than a few pieces of 6 MB, both ways."""
    with (tmp_path / "large").open("wb") as sink:
        for _ in range(60):
            sink.write(os.urandom(MB))
    with (tmp_path / "large").open("rb") as stream:
        file = file_id("result", digest_stream(stream, ORGANIZATION).id_hex12)
    arguments = [supabase.url, supabase.key, bearer(), str(tmp_path / "uploads"), file, ORGANIZATION]
    command = [sys.executable, "-c", UPLOAD + WATCH, *arguments, str(tmp_path / "large")]
    peak = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert int(peak) < 25 * MB
    assert (tmp_path / "large.copy").stat().st_size == 60 * MB


def test_an_outage_ends_in_an_error_that_says_so(
    supabase: SupabaseDouble, bearer: Callable[[], str], uploads: Path
) -> None:
    """In bounded time, and without the access token."""
    token = bearer()
    supabase.intercept = lambda request: Response("maintenance", 503)
    store = SupabaseFileStore(
        supabase.url, supabase.key, bearer=lambda: token, uploads_folder=uploads, patience_seconds=1
    )
    started = time.monotonic()
    with pytest.raises(FileStoreError, match="did not answer in 1 s") as caught:
        store.put(id_of(b"a"), ORGANIZATION, io.BytesIO(b"a"))
    assert time.monotonic() - started < 3
    assert isinstance(caught.value, OpenWeightsError)
    assert token not in str(caught.value)
    store.close()
