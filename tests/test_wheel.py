"""The package as users get it: built, installed away from the checkout, and run from there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

import openweights_prefect
from openweights_prefect.ledger import embedded
from openweights_prefect.stack import processes
from openweights_prefect.stack.service import HOME_VARIABLE

ROOT = Path(openweights_prefect.__file__).parent.parent
JOB = """
import os
import openweights_prefect
package = os.path.realpath(openweights_prefect.__file__)
openweights_prefect.OpenWeights().run.log({"result": 5 + 9, "package": package})
print("the sum is 14")
"""
SCRIPT = """
from openweights_prefect import Jobs, OpenWeights, register

@register("addition")
class Addition(Jobs):
    mount = {"job.py": "job.py"}
    requires_vram_gb = 0
    def get_entrypoint(self, validated_params):
        return "python job.py"

with OpenWeights() as ow:
    job = ow.addition.create().wait(timeout=150)
    print(job.status, job.outputs["result"], list(job.logs()), job.outputs["package"], sep="|")
"""

pytestmark = pytest.mark.stack


class Built(NamedTuple):
    """What `python -m build` made."""

    sdist: Path
    wheel: Path
    """Built from the sdist, as installers do it."""


class Installed(NamedTuple):
    """A virtual environment that has the wheel."""

    bin: Path
    site: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return Built(next(folder.glob("*.tar.gz")), next(folder.glob("*.whl")))


@pytest.fixture
def installed(built: Built, tmp_path: Path) -> Installed:
    """The wheel alone, with pip, and the libraries that it needs from the environment of the tests."""
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"))
    run(*pip, "install", "--no-deps", "--no-index", "--no-compile", str(built.wheel))
    site = next(folder.glob("lib/python*/site-packages"))
    # After our own folder, and Python does not follow the .pth files in it: an editable install stays out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installed(folder / "bin", site)


@pytest.fixture
def home() -> Iterator[Path]:
    """A home that any account can walk to: PostgreSQL of root runs as another one."""
    parent = Path(tempfile.mkdtemp(prefix="ow-test-wheel-"))
    parent.chmod(0o755)
    yield parent / "home"
    processes.sweep({HOME_VARIABLE: str(parent / "home")}, patience_seconds=1)
    embedded.remove(parent / "home" / "postgres")
    shutil.rmtree(parent)


def build(source: Path, target: Path, *options: str) -> None:
    pytest.importorskip("build", reason="needs the package `build`")
    # Without isolation nothing is downloaded.
    pytest.importorskip("hatchling", reason="needs the package `hatchling`")
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(target), str(source))


def run(*command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def contents(wheel: Path) -> dict[str, int]:
    """Name and checksum of every file."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def sources(folder: Path, pattern: str = "*") -> set[str]:
    """Relative paths of the files that belong into a wheel."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def left_over(*marks: Path) -> list[str]:
    """Command lines of the processes that name one of the paths, in their command or as their stack."""
    found = []
    for process in psutil.process_iter():
        try:
            texts = [*process.cmdline(), process.environ().get(HOME_VARIABLE, "")]
            if process.status() != psutil.STATUS_ZOMBIE and any(
                text.startswith(str(mark)) for text in texts for mark in marks
            ):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def test_the_wheel_holds_the_package_and_what_it_deploys(built: Built) -> None:
    """Every module, the marker of typed packages and the deployable folders; no tests, nothing compiled."""
    names = set(contents(built.wheel))
    assert {f"openweights_prefect/{name}" for name in sources(ROOT / "openweights_prefect", "*.py")} <= names
    assert "openweights_prefect/py.typed" in names
    bundle = "openweights_prefect/_bundle"
    assert f"{bundle}/prefect.yaml" in names
    for folder in ("blocks", "flows", "infrastructure/supabase", "infrastructure/environments"):
        assert {f"{bundle}/{folder}/{name}" for name in sources(ROOT / folder)} <= names, folder
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"openweights_prefect"}
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name or name.endswith(".pyc")]


def test_the_wheel_has_the_command_and_the_collection(built: Built) -> None:
    """`ow`, and what lets Prefect find the worker type."""
    with zipfile.ZipFile(built.wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        text = archive.read(name).decode()
    assert "[console_scripts]\now = openweights_prefect.cli.main:main\n" in text
    assert "[prefect.collections]\nopenweights_prefect = openweights_prefect.collection\n" in text


def test_the_sdist_and_the_checkout_make_the_same_wheel(built: Built, tmp_path: Path) -> None:
    """The sdist lacks nothing; it has the tests, so that distributors can run them."""
    build(ROOT, tmp_path, "--wheel")
    assert contents(next(tmp_path.glob("*.whl"))) == contents(built.wheel)
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "pyproject.toml", "README.md"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_a_job_runs_from_the_installed_wheel(installed: Installed, home: Path, tmp_path: Path) -> None:
    """`ow up`, one job and `ow down`, in a folder of the user's: nothing comes from the checkout."""
    python, ow = str(installed.bin / "python"), str(installed.bin / "ow")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "job.py").write_text(JOB)
    (folder / "script.py").write_text(SCRIPT)
    ports = {"OW_PREFECT_PORT": str(free_port()), "OW_SIMULATOR_PORT": str(free_port())}
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "OW_HOME": str(home), **ports}

    where = "import openweights_prefect as p; from openweights_prefect.bundle import deploy_root"
    probe = run(python, "-c", f"{where}; print(p.__file__, deploy_root(), sep='\\n')", cwd=folder)
    package = installed.site / "openweights_prefect"
    assert probe.splitlines() == [str(package / "__init__.py"), str(package / "_bundle")]

    try:
        up = json.loads(run(ow, "up", "--json", "--job-python", python, cwd=folder, environment=environment))
        assert all(service["up"] for service in up["services"])
        *_, answer = run(python, "script.py", cwd=folder, environment=environment).splitlines()
        where_in_job = str(package / "__init__.py")
        assert answer.split("|") == ["completed", "14", "['the sum is 14']", where_in_job]
    finally:
        down = json.loads(run(ow, "down", "--json", cwd=folder, environment=environment))
    assert down["stopped"] == ["worker", "simulator", "prefect", "postgres"]
    assert left_over(home, installed.bin.parent) == []
    assert not embedded.is_running(home / "postgres")
    assert sorted(path.name for path in folder.iterdir()) == ["job.py", "script.py"]
