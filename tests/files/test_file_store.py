from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from openweights_prefect.errors import InvalidParameterError, NotFoundError
from openweights_prefect.files.hashing import digest_stream
from openweights_prefect.files.store import CorruptFileError, FileStore, FileStoreError, LocalFileStore
from openweights_prefect.types.identity import file_id

ORGANIZATION = "00000000-0000-0000-0000-000000000001"
OTHER = "00000000-0000-0000-0000-000000000002"
CONTENT = bytes(range(256)) * 5000


def id_of(content: bytes, purpose: str = "result") -> str:
    return file_id(purpose, digest_stream(io.BytesIO(content), ORGANIZATION).id_hex12)


ID = id_of(CONTENT)


@pytest.fixture
def store(tmp_path: Path) -> LocalFileStore:
    return LocalFileStore(tmp_path / "store")


def blobs(store: LocalFileStore) -> list[Path]:
    """Every file in the store, finished or not."""
    return [path for path in store._root.rglob("*") if path.is_file()]


def wait_for(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.01)


def test_put_and_read_back(store: LocalFileStore, tmp_path: Path) -> None:
    """What was put from a stream is read, fetched and laid out as documented."""
    contract: FileStore = store
    contract.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    contract.fetch(ID, ORGANIZATION, tmp_path / "deep" / "copy")
    with contract.open(ID, ORGANIZATION) as stream:
        assert stream.read() == CONTENT == (tmp_path / "deep" / "copy").read_bytes()
    assert blobs(store) == [tmp_path / "store/organizations" / ORGANIZATION / "result" / ID.split(":")[1]]


def test_copies_are_independent(store: LocalFileStore, tmp_path: Path) -> None:
    """A job that writes into its copy does not touch the stored content."""
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    for name in ("a", "b"):
        store.fetch(ID, ORGANIZATION, tmp_path / name)
        with (tmp_path / name).open("r+b") as stream:
            stream.write(b"changed")
    store.fetch(ID, ORGANIZATION, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_put_again_does_nothing(store: LocalFileStore, tmp_path: Path) -> None:
    """The stored blob stays the same file; a second put does not even read its source."""
    (tmp_path / "source").write_bytes(CONTENT)
    store.put(ID, ORGANIZATION, tmp_path / "source")
    before = blobs(store)[0].stat()
    stream = io.BytesIO(CONTENT)
    store.put(ID, ORGANIZATION, stream)
    assert stream.tell() == 0
    assert blobs(store)[0].stat().st_ino == before.st_ino


def test_content_must_match_the_id(store: LocalFileStore) -> None:
    """Other bytes under an id are refused, and nothing is left behind."""
    with pytest.raises(InvalidParameterError, match="is not that of"):
        store.put(ID, ORGANIZATION, io.BytesIO(b"other"))
    with pytest.raises(InvalidParameterError, match="another organization"):
        store.put(ID, OTHER, io.BytesIO(CONTENT))
    assert blobs(store) == []


def test_stream_that_fails_leaves_nothing(store: LocalFileStore, tmp_path: Path) -> None:
    """A source that breaks off, or is missing, is an error and no half blob."""

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise ConnectionResetError("connection reset")

    with pytest.raises(FileStoreError, match="connection reset"):
        store.put(ID, ORGANIZATION, Broken())
    with pytest.raises(InvalidParameterError, match="does not exist"):
        store.put(ID, ORGANIZATION, tmp_path / "missing")
    assert blobs(store) == []


def test_missing_content(store: LocalFileStore, tmp_path: Path) -> None:
    """Reading what is not there says so; deleting it is silent; another organization sees nothing."""
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert not store.exists(ID, OTHER)
    with pytest.raises(NotFoundError, match=OTHER):
        store.fetch(ID, OTHER, tmp_path / "copy")
    store.delete(ID, ORGANIZATION)
    store.delete(ID, ORGANIZATION)
    assert not store.exists(ID, ORGANIZATION)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("file", "organization"),
    [("../x:file-000000000000", ORGANIZATION), ("a/b", ORGANIZATION), (ID, "../x"), (ID, "")],
)
def test_ids_cannot_climb(store: LocalFileStore, file: str, organization: str) -> None:
    """No id names a path outside of the store."""
    for call in (store.exists, store.delete, store.open):
        with pytest.raises(InvalidParameterError):
            call(file, organization)


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_corruption_is_detected(store: LocalFileStore, tmp_path: Path, damaged: bytes) -> None:
    """Damaged bytes never reach a target, which keeps what it had."""
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    blobs(store)[0].write_bytes(damaged)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "copy").write_bytes(b"before")
    with pytest.raises(CorruptFileError, match="upload it again"):
        store.fetch(ID, ORGANIZATION, tmp_path / "out" / "copy")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"before"]


def test_truncated_blob_is_mended_by_the_next_put(store: LocalFileStore, tmp_path: Path) -> None:
    """A blob of the wrong size does not count as stored."""
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    blobs(store)[0].write_bytes(CONTENT[:100])
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    store.fetch(ID, ORGANIZATION, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_stream_without_a_size(store: LocalFileStore, tmp_path: Path) -> None:
    """A pipe is stored too, also when the content is there already."""
    (tmp_path / "source").write_bytes(CONTENT)
    for _ in range(2):
        with subprocess.Popen(["cat", str(tmp_path / "source")], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            store.put(ID, ORGANIZATION, process.stdout)  # type: ignore[arg-type]
    assert len(blobs(store)) == 1


def put_once(root: Path, source: Path, file: str, start: multiprocessing.synchronize.Barrier) -> None:
    start.wait(timeout=60)
    LocalFileStore(root).put(file, ORGANIZATION, source)
    LocalFileStore(root).fetch(file, ORGANIZATION, source.with_name(f"copy-{os.getpid()}"))


def test_processes_put_one_file_at_once(store: LocalFileStore, tmp_path: Path) -> None:
    """Four writers of one file all succeed and read the whole content; one blob and no leftovers remain."""
    content = CONTENT * 8
    (tmp_path / "source").write_bytes(content)
    context = multiprocessing.get_context("spawn")
    arguments = (store._root, tmp_path / "source", id_of(content), context.Barrier(4))
    processes = [context.Process(target=put_once, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert [path.read_bytes() == content for path in tmp_path.glob("copy-*")] == [True] * 4
    assert len(blobs(store)) == 1


PUT_SCRIPT = """
import resource, sys
from pathlib import Path
from openweights_prefect.files.store import FileStoreError, LocalFileStore
root, source, file, limit = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    LocalFileStore(root).put(file, sys.argv[5], sys.stdin.buffer if source == "-" else Path(source))
except FileStoreError as exc:
    print(exc, [path.name for path in root.rglob("*") if path.is_file()])
"""


def test_killed_writer_leaves_no_blob(store: LocalFileStore) -> None:
    """A writer killed half-way leaves a temporary file, which only a sweep of old ones removes."""
    command = [sys.executable, "-c", PUT_SCRIPT, str(store._root), "-", ID, "0", ORGANIZATION]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(CONTENT[:-1] * 2)
        process.stdin.flush()
        wait_for(lambda: any(path.stat().st_size for path in blobs(store)))
        process.send_signal(signal.SIGKILL)
    assert not store.exists(ID, ORGANIZATION)
    assert store.sweep() == 0
    os.utime(blobs(store)[0], (time.time() - 90_000,) * 2)
    assert store.sweep() == 1
    assert blobs(store) == []


def test_file_size_limit(store: LocalFileStore, tmp_path: Path) -> None:
    """A disk that takes no more gives a clear error and keeps nothing half-made."""
    (tmp_path / "source").write_bytes(CONTENT)
    command = [
        sys.executable,
        "-c",
        PUT_SCRIPT,
        str(store._root),
        str(tmp_path / "source"),
        ID,
        "65536",
        ORGANIZATION,
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "no space is left (File too large)" in output
    assert output.endswith("[]\n")


def test_disk_full(tmp_path: Path) -> None:
    """A really full file system does the same."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare(1)")
    (tmp_path / "source").write_bytes(CONTENT)
    (tmp_path / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=256k none "$1" || exit 77; shift; exec "$@"'
    put = [
        sys.executable,
        "-c",
        PUT_SCRIPT,
        str(tmp_path / "disk"),
        str(tmp_path / "source"),
        ID,
        "0",
        ORGANIZATION,
    ]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(tmp_path / "disk"), *put]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode in (1, 77):
        pytest.skip(f"cannot mount a small file system here: {result.stderr.strip()}")
    assert "no space is left (No space left on device)" in result.stdout
    assert result.stdout.endswith("[]\n")


def test_unusable_root(tmp_path: Path) -> None:
    """A store where a file is in the way says so in our own error."""
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(FileStoreError, match="Cannot write"):
        LocalFileStore(tmp_path / "root").put(ID, ORGANIZATION, io.BytesIO(CONTENT))
