"""The digest of a file, in one pass and constant memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.types.identity import checked_organization_id

CHUNK_BYTES = 1 << 20


class Digest(NamedTuple):
    """What is known of a file after one reading."""

    id_hex12: str
    """First 12 hexadecimal digits of sha256(content + organization id): the digest of the file id."""
    sha256: str
    """Of the content alone, in full."""
    bytes: int


def digest_stream(
    stream: BinaryIO, organization_id: str, *, chunk: int = CHUNK_BYTES, sink: BinaryIO | None = None
) -> Digest:
    """Digest what is left of a binary stream, copying it to `sink` on the way when there is one.

    Reads from the current position and does not rewind. Raises `InvalidParameterError` for a text stream.
    """
    content = hashlib.sha256()
    size = 0
    for block in _blocks(stream, chunk):
        content.update(block)
        size += len(block)
        if sink is not None:
            sink.write(block)
    keyed = content.copy()
    keyed.update(checked_organization_id(organization_id).encode())
    return Digest(id_hex12=keyed.hexdigest()[:12], sha256=content.hexdigest(), bytes=size)


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


def _blocks(stream: BinaryIO, chunk: int) -> Iterator[bytes]:
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
