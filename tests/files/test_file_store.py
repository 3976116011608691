"""What every file store holds to; each test runs over all of them."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from backings import CONTENT, ID, ORGANIZATION, OTHER, PATH, Backing, id_of, store_of

from openweights_prefect.errors import InvalidParameterError, NotFoundError
from openweights_prefect.files.store import CorruptFileError, FileStore, FileStoreError


def test_put_and_read_back(backing: Backing, tmp_path: Path) -> None:
    """What was put from a stream is read, fetched and laid out as documented."""
    backing.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    backing.store.fetch(ID, ORGANIZATION, tmp_path / "deep" / "copy")
    with backing.store.open(ID, ORGANIZATION) as stream:
        assert stream.read() == CONTENT == (tmp_path / "deep" / "copy").read_bytes()
    assert backing.objects() == {PATH: CONTENT}


@pytest.mark.parametrize("size", [0, 1, (256 << 10) - 1, 256 << 10, (256 << 10) + 1, 1 << 20, (1 << 20) + 5])
def test_sizes_around_the_blocks(backing: Backing, tmp_path: Path, size: int) -> None:
    """Content of any size comes back as it was: empty, a whole block or part, and one byte more or less."""
    content = os.urandom(size)
    (tmp_path / "source").write_bytes(content)
    backing.store.put(id_of(content), ORGANIZATION, tmp_path / "source")
    backing.store.fetch(id_of(content), ORGANIZATION, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert list(backing.objects().values()) == [content]


def test_stream_is_read_from_where_it_stands(store: FileStore) -> None:
    """What was read before is not part of the content."""
    stream = io.BytesIO(b"header" + CONTENT)
    stream.seek(6)
    store.put(ID, ORGANIZATION, stream)
    with store.open(ID, ORGANIZATION) as opened:
        assert opened.read() == CONTENT


def test_copies_are_independent(store: FileStore, tmp_path: Path) -> None:
    """A job that writes into its copy does not touch the stored content."""
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    for name in ("a", "b"):
        store.fetch(ID, ORGANIZATION, tmp_path / name)
        with (tmp_path / name).open("r+b") as stream:
            stream.write(b"changed")
    store.fetch(ID, ORGANIZATION, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_put_again_does_nothing(store: FileStore) -> None:
    """A second put does not even read its source."""
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    stream = io.BytesIO(CONTENT)
    store.put(ID, ORGANIZATION, stream)
    assert stream.tell() == 0


def test_content_must_match_the_id(backing: Backing) -> None:
    """Other bytes under an id are refused, and nothing is visible."""
    for wrong in (b"other", CONTENT + b"x"):
        with pytest.raises(InvalidParameterError, match="is not that of"):
            backing.store.put(ID, ORGANIZATION, io.BytesIO(wrong))
    with pytest.raises(InvalidParameterError, match="another organization"):
        backing.store.put(ID, OTHER, io.BytesIO(CONTENT))
    assert backing.objects() == {}


def test_stream_that_fails_leaves_nothing(backing: Backing, tmp_path: Path) -> None:
    """A source that breaks off, or is missing, is an error and no half object."""

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > len(CONTENT) // 2:
                raise ConnectionResetError("connection reset")
            return super().read(size)

    with pytest.raises(FileStoreError, match="connection reset"):
        backing.store.put(ID, ORGANIZATION, Broken(CONTENT))
    with pytest.raises(InvalidParameterError, match="does not exist"):
        backing.store.put(ID, ORGANIZATION, tmp_path / "missing")
    with pytest.raises(InvalidParameterError, match="mode 'rb'"):
        backing.store.put(ID, ORGANIZATION, io.StringIO("text"))  # type: ignore[arg-type]
    assert backing.objects() == {}


def test_missing_content(store: FileStore, tmp_path: Path) -> None:
    """Reading what is not there says so; deleting it is silent; another organization sees nothing."""
    store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert store.exists(ID, ORGANIZATION)
    assert not store.exists(ID, OTHER)
    with pytest.raises(NotFoundError, match=OTHER):
        store.fetch(ID, OTHER, tmp_path / "copy")
    store.delete(ID, ORGANIZATION)
    store.delete(ID, ORGANIZATION)
    assert not store.exists(ID, ORGANIZATION)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_corruption_is_detected(backing: Backing, tmp_path: Path, damaged: bytes) -> None:
    """Damaged bytes never reach a target, which keeps what it had."""
    backing.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    backing.overwrite(PATH, damaged)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "copy").write_bytes(b"before")
    with pytest.raises(CorruptFileError, match="upload it again"):
        backing.store.fetch(ID, ORGANIZATION, tmp_path / "out" / "copy")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"before"]


def test_truncated_object_is_mended_by_the_next_put(backing: Backing) -> None:
    """An object of the wrong size does not count as stored."""
    backing.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    backing.overwrite(PATH, CONTENT[:100])
    backing.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert backing.objects() == {PATH: CONTENT}


def test_stream_without_a_size(backing: Backing, tmp_path: Path) -> None:
    """A pipe is stored too, also when the content is there already."""
    (tmp_path / "source").write_bytes(CONTENT)
    for _ in range(2):
        with subprocess.Popen(["cat", str(tmp_path / "source")], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            backing.store.put(ID, ORGANIZATION, process.stdout)  # type: ignore[arg-type]
    assert backing.objects() == {PATH: CONTENT}


def put_once(setting: str, source: Path, file: str, start: Barrier) -> None:
    store = store_of(setting)
    start.wait(timeout=60)
    store.put(file, ORGANIZATION, source)
    store.fetch(file, ORGANIZATION, source.with_name(f"copy-{os.getpid()}"))


def test_processes_put_one_file_at_once(backing: Backing, tmp_path: Path) -> None:
    """Eight writers of one file all succeed and read the whole content; one object remains."""
    content = CONTENT * 8
    (tmp_path / "source").write_bytes(content)
    context = multiprocessing.get_context("spawn")
    arguments = (backing.setting, tmp_path / "source", id_of(content), context.Barrier(8))
    processes = [context.Process(target=put_once, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert [path.read_bytes() == content for path in tmp_path.glob("copy-*")] == [True] * 8
    assert list(backing.objects().values()) == [content]


def test_results_of_flows(backing: Backing) -> None:
    """A result is kept under its key and its organization, and the last one stays."""
    store = backing.store
    assert store.read_result("job-1", ORGANIZATION) is None
    for data in (b"first", b"", b"last"):
        store.write_result("job-1", ORGANIZATION, data)
        assert store.read_result("job-1", ORGANIZATION) == data
    store.write_result("folder/key.json", ORGANIZATION, b"x")
    assert store.read_result("folder/key.json", ORGANIZATION) == b"x"
    assert store.read_result("job-1/deeper", ORGANIZATION) is None
    assert store.read_result("job-1", OTHER) is None
    assert f"organizations/{ORGANIZATION}/flow-results/job-1" in backing.objects()


def test_a_result_is_no_file(backing: Backing) -> None:
    """No key of a result reaches the content of a file, whatever its purpose."""
    for purpose in ("results", "flow_results"):
        file = id_of(CONTENT, purpose)
        backing.store.put(file, ORGANIZATION, io.BytesIO(CONTENT))
        backing.store.write_result(file.split(":")[1], ORGANIZATION, b"other")
        with backing.store.open(file, ORGANIZATION) as stream:
            assert stream.read() == CONTENT
