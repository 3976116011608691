"""Where a benchmark works, and how it tells what it does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that is gone afterwards, in $TMPDIR unless told; PostgreSQL's own account may enter it."""
    folder = Path(tempfile.mkdtemp(prefix="ow-benchmark-", dir=parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, flush=True)
