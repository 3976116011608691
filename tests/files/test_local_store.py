"""What only the store in a folder has: a disk that is full, and writers that die on it."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from backings import CONTENT, ID, ORGANIZATION

from openweights_prefect.files.store import FileStoreError, LocalFileStore


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


def test_stored_content_stays_the_same_file(store: LocalFileStore) -> None:
    """A second put of the same content leaves the blob alone, and nothing lies beside it."""
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    before = blobs(store)[0].stat()
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert [path.stat().st_ino for path in blobs(store)] == [before.st_ino]


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
