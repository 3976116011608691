"""Programs from npm that tests run, installed once a machine account and version."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import filelock
import pytest

_INSTALL_SECONDS = 300


def npm_program(package: str, version: str) -> Path:
    """The program of a package from npm; skips the test where npm or its registry is missing."""
    found = _find(package, version)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@functools.cache  # Also of a failure: a registry that cannot be reached costs time only once.
def _find(package: str, version: str) -> Path | str:
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    cache = Path(tempfile.gettempdir()) / f"openweights-test-npm-{os.geteuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.is_symlink() or cache.stat().st_uid != os.geteuid():
        return f"{cache} is not ours, so what is in it is not run"
    folder = cache / f"{package}-{version}"
    with filelock.FileLock(cache / f"{package}.lock", timeout=_INSTALL_SECONDS + 60):
        failure = None if folder.is_dir() else _install(npm, f"{package}@{version}", folder)
    return failure or folder / "node_modules" / ".bin" / package


def _install(npm: str, what: str, folder: Path) -> str | None:
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
    # `--ignore-scripts`: nothing of a package runs before a test runs it.
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--fetch-retries=0"]
    command = [npm, "install", *options, f"--prefix={unfinished}", what]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=True)
        unfinished.rename(folder)
    except subprocess.CalledProcessError as exc:
        lines = [line for line in exc.stderr.splitlines() if line.startswith("npm error")]
        return f"npm could not install {what}: {' '.join(lines[:4])}"
    except subprocess.TimeoutExpired:
        return f"npm did not install {what} in {_INSTALL_SECONDS} s"
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return None
