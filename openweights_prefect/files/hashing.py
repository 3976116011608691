"""The digest of a file, in one pass and constant memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.types.identity import checked_organization_id

CHUNK_BYTES = 1 << 20

_WORTH_A_THREAD = 1 << 18


class Digest(NamedTuple):
    """What is known of a file after one reading."""

    id_hex12: str
    """First 12 hexadecimal digits of sha256(content + organization id): the digest of the file id."""
    sha256: str
    """Of the content alone, in full."""
    bytes: int


class Sink(Protocol):
    """What a copy is written to."""

    def write(self, block: bytes, /) -> object:
        """Take the whole block."""


class Hasher:
    """Digests content that arrives in blocks."""

    def __init__(self, organization_id: str) -> None:
        self._organization = checked_organization_id(organization_id).encode()
        self._content = hashlib.sha256()
        self._bytes = 0

    def update(self, block: bytes) -> None:
        """Take the next block; from 2 KiB on, other threads run meanwhile."""
        self._content.update(block)
        self._bytes += len(block)

    def digest(self) -> Digest:
        """The digest of all blocks so far."""
        # The organization comes last, so that one pass over the content serves both digests.
        keyed = self._content.copy()
        keyed.update(self._organization)
        return Digest(keyed.hexdigest()[:12], self._content.hexdigest(), self._bytes)


def digest_stream(
    stream: BinaryIO, organization_id: str, *, chunk: int = CHUNK_BYTES, sink: Sink | None = None
) -> Digest:
    """Digest what is left of a binary stream, copying it to `sink` on the way when there is one.

    Reads from the current position and does not rewind. Raises `InvalidParameterError` for a text stream.
    """
    hasher = Hasher(organization_id)
    if sink is None:
        for block in read_blocks(stream, chunk):
            hasher.update(block)
    else:
        _hash_and_copy(hasher, read_blocks(stream, chunk), sink)
    return hasher.digest()


def digest_path(path: Path, organization_id: str) -> Digest:
    """Digest a local file; raises `InvalidParameterError` when it is no file or cannot be read."""
    with open_file(path) as stream:
        return digest_stream(stream, organization_id)


def open_file(path: Path) -> BinaryIO:
    """Open a user's local file for reading; raises `InvalidParameterError` naming it when that fails."""
    # Opening a FIFO would wait for ever.
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise InvalidParameterError(
            f"File {str(path)!r} {what}; check the path, relative to {str(Path.cwd())!r}."
        )
    try:
        return path.open("rb")
    except OSError as exc:
        raise InvalidParameterError(
            f"Cannot read the file {str(path)!r} ({exc.strerror}); check its permissions."
        ) from exc


def _hash_and_copy(hasher: Hasher, blocks: Iterable[bytes], sink: Sink) -> None:
    """Hash each block in a thread while it is written: a copy with a digest takes as long as the slower."""
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        hashed: Future[None] | None = None
        for block in blocks:
            if hashed is not None:
                hashed.result()
            hashed = _submitted(pool, hasher, block)
            if hashed is None:
                hasher.update(block)
            sink.write(block)
        if hashed is not None:
            hashed.result()


def _submitted(pool: ThreadPoolExecutor, hasher: Hasher, block: bytes) -> Future[None] | None:
    # A mutable block may be the stream's buffer, which its next reading fills again.
    if len(block) < _WORTH_A_THREAD or not isinstance(block, bytes):
        return None
    try:
        return pool.submit(hasher.update, block)
    except RuntimeError:  # The interpreter is ending and starts no more threads.
        return None


def read_blocks(stream: BinaryIO, chunk: int) -> Iterator[bytes]:
    """What is left of a binary stream; raises `InvalidParameterError` when it gives anything but bytes."""
    while True:
        block = stream.read(chunk)
        # None from a stream that would block is not its end: taking it for the end would cut the file short.
        if not isinstance(block, bytes | bytearray | memoryview):
            raise InvalidParameterError(
                f"The stream gave {type(block).__name__}, not bytes; open the file with mode 'rb'."
            )
        if not block:
            return
        yield block
