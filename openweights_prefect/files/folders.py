"""Which files of a folder are mounted: all that no ignore file names, minus caches and secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pathspec

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.types.paths import safe_relative_path

# The later one wins, as does the ignore file of the deeper folder.
_IGNORE_FILES = (".gitignore", ".owignore")
_NEVER_MOUNTED = {
    ".env*": "may hold secrets",
    ".git": "version control",
    ".hg": "version control",
    ".svn": "version control",
    ".venv": "virtual environment",
    "__pycache__": "cache",
    "*.pyc": "cache",
    ".cache": "cache",
    ".mypy_cache": "cache",
    ".pytest_cache": "cache",
    ".ruff_cache": "cache",
    ".hypothesis": "cache",
    ".ipynb_checkpoints": "cache",
    ".nox": "cache",
    ".tox": "cache",
    "node_modules": "cache",
    ".DS_Store": "desktop file",
    "Thumbs.db": "desktop file",
    ".gitignore": "ignore file",
    ".owignore": "ignore file",
}

_NEVER_MISSED = {"cache", "version control", "desktop file", "ignore file"}
_NAMED = 5


class FolderFile(NamedTuple):
    """A file to mount."""

    target: str
    """Path relative to the folder, with `/`."""
    path: Path


class SkippedPath(NamedTuple):
    """A file, or a folder with all that is in it, that is not mounted."""

    target: str
    """Path relative to the folder; a folder ends with `/`."""
    reason: str


class FolderListing(NamedTuple):
    """What is in a folder, each list in the order of its targets, the same on every machine."""

    files: list[FolderFile]
    skipped: list[SkippedPath]

    def left_out(self) -> str:
        """One line on what somebody may miss: what was skipped, caches aside; empty when nothing was."""
        missed = [path for path in self.skipped if path.reason not in _NEVER_MISSED]
        named = [f"{path.target!r} ({path.reason})" for path in missed[:_NAMED]]
        more = [f"and {len(missed) - _NAMED} more"] if len(missed) > _NAMED else []
        return ", ".join([*named, *more])


class _IgnoreFile(NamedTuple):
    name: str
    base: str
    """Target of its folder: empty, or ends with `/`."""
    patterns: Sequence[pathspec.Pattern]


def walk_folder(folder: Path) -> FolderListing:
    """List the files of a folder that belong to a mount, honouring `.gitignore` and `.owignore` inside it.

    Secrets (`.env*`), version control, virtual environments and caches are skipped whatever the ignore files
    say. Links to files and folders inside are followed. Raises `InvalidParameterError` for links that lead
    out of the folder, nowhere or round in a circle, and for names that are not legal everywhere.
    """
    root = folder.resolve()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise InvalidParameterError(f"Mount source {str(folder)!r} {what}; check the path.")
    listing = FolderListing([], [])
    for entry in _walk(root, root, "", (), (root,)):
        if isinstance(entry, FolderFile):
            listing.files.append(entry)
        else:
            listing.skipped.append(entry)
    listing.files.sort()
    listing.skipped.sort()
    return listing


def _walk(
    root: Path, folder: Path, base: str, ignores: tuple[_IgnoreFile, ...], parents: tuple[Path, ...]
) -> Iterator[FolderFile | SkippedPath]:
    ignores = (*ignores, *_ignore_files(folder, base))
    for path in _entries(folder):
        is_folder = path.is_dir()
        target = f"{base}{path.name}/" if is_folder else f"{base}{path.name}"
        reason = _reason_to_skip(root, path, target, ignores)
        if reason:
            yield SkippedPath(target, reason)
            continue
        safe_relative_path(target)
        real = _inside(root, path)
        if not is_folder:
            yield FolderFile(target, path)
        elif real in parents:
            raise InvalidParameterError(f"{str(path)!r} links to a folder that it is in; remove the link.")
        else:
            yield from _walk(root, path, target, ignores, (*parents, real))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as exc:
        raise InvalidParameterError(
            f"Cannot read the folder {str(folder)!r} ({exc.strerror}); "
            "name it in `.owignore` or mend its permissions."
        ) from exc


def _ignore_files(folder: Path, base: str) -> Iterator[_IgnoreFile]:
    for name in _IGNORE_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
            yield _IgnoreFile(name, base, pathspec.GitIgnoreSpec.from_lines(lines).patterns)
        except (OSError, ValueError) as exc:
            raise InvalidParameterError(
                f"Cannot use the ignore file {str(path)!r}: {exc}. Mend the pattern."
            ) from exc


def _reason_to_skip(root: Path, path: Path, target: str, ignores: tuple[_IgnoreFile, ...]) -> str | None:
    reason = _built_in_reason(path.name)
    if reason is None and path.is_symlink():
        # A link is no way round the rules for what it leads to.
        real = Path(os.path.realpath(path))
        parts = real.relative_to(root).parts if real.is_relative_to(root) else ()
        reason = next(filter(None, map(_built_in_reason, parts)), None)
    if reason:
        return reason
    if target.endswith("/") and (path / "pyvenv.cfg").is_file():
        return "virtual environment"
    reason = _ignored_by(target, ignores)
    if reason is None and path.exists() and not path.is_dir() and not path.is_file():
        return "not a regular file"
    return reason


def _built_in_reason(name: str) -> str | None:
    return next(
        (reason for pattern, reason in _NEVER_MOUNTED.items() if fnmatchcase(name.lower(), pattern.lower())),
        None,
    )


def _ignored_by(target: str, ignores: tuple[_IgnoreFile, ...]) -> str | None:
    for ignore in reversed(ignores):
        relative = target[len(ignore.base) :]
        for pattern in reversed(ignore.patterns):
            if pattern.include is not None and _matches_itself(pattern, relative):
                return f"ignored by {ignore.base}{ignore.name}" if pattern.include else None
    return None


def _matches_itself(pattern: pathspec.Pattern, relative: str) -> bool:
    """Tell a match of the path from a match of a folder that it is in.

    pathspec lets a pattern that matches a folder match all that is in it, so that `!logs/` would bring back
    `logs/a.log`; Git, and this walk, decide about the folder before they enter it. The group `ps_d` of its
    regular expressions is the `/` after the part that the pattern itself matched.
    """
    result = pattern.match_file(relative)
    if result is None:
        return False
    match: re.Match[str] = result.match
    if "ps_d" in match.re.groupindex:
        return match.end("ps_d") in (-1, len(relative))
    # `logs/**` is about what is in `logs/`, not about the folder.
    return not (relative.endswith("/") and match.end() == len(relative))


def _inside(root: Path, path: Path) -> Path:
    """Return where `path` really is, which must be in the mounted folder."""
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as exc:
        raise InvalidParameterError(
            f"{str(path)!r} is a link to {str(path.readlink())!r}, which does not exist; "
            "remove it or name it in `.owignore`."
        ) from exc
    if not real.is_relative_to(root):
        raise InvalidParameterError(
            f"{str(path)!r} links to {str(real)!r}, outside of the mounted folder {str(root)!r}; "
            "put a copy in its place, mount the target too, or name it in `.owignore`."
        )
    return real
