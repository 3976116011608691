"""Why a container does not start, from the lines of its machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openweights_prefect.provisioning.provider import HostUnusable, ImageError
from openweights_prefect.provisioning.runpod.system_log import diagnose, lines_of

IMAGE = "ghcr.io/lab/train:v1"
BEGINNING = [f"create container {IMAGE}", "v1 Pulling from lab/train", "9a1b Pulling fs layer"]
PULLED = ["9a1b Pull complete", f"Digest: sha256:{'0' * 64}", f"Status: Downloaded newer image for {IMAGE}"]
START = f"start container for {IMAGE}: begin"
CUDA = (
    "error starting container: Error response from daemon: failed to create task for container: failed to "
    "create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
    "error during container init: error running hook #0: exit status 1, stderr: Auto-detected mode as "
    "'legacy' nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8, please update your "
    "driver to a newer version, or use an earlier cuda container: unknown"
)


@pytest.mark.parametrize(
    "line",
    [
        "error pulling image: Error response from daemon: manifest for lab/train:v1 not found: "
        "manifest unknown",
        "Error response from daemon: pull access denied for lab/train, repository does not exist or may "
        "require 'docker login': denied: requested access to the resource is denied",
        'error: Head "https://ghcr.io/v2/lab/train/manifests/v1": unauthorized',
        "failed to fetch oauth token: unexpected status from GET request to https://auth: 401 Unauthorized",
        "no matching manifest for linux/amd64 in the manifest list entries",
        "invalid reference format: repository name must be lowercase",
        'OCI runtime create failed: exec: "python": executable file not found in $PATH: unknown',
        "exec /bin/sh: exec format error",
    ],
)
def test_an_image_that_no_machine_can_run(line: str) -> None:
    """Missing, not ours to read, or for another machine: the error names the image."""
    error = diagnose([*BEGINNING, line, line], image=IMAGE)
    assert isinstance(error, ImageError)
    assert repr(IMAGE) in str(error)


@pytest.mark.parametrize(
    "line",
    [
        CUDA,
        "error starting container: OCI runtime create failed: runc create failed: device or resource busy",
        "nvidia-container-cli: mount error: file creation failed: no such file or directory",
        "nvidia-container-cli: initialization error: driver rpc error: unauthorized",
        'could not select device driver "" with capabilities: [[gpu]]',
        "failed to register layer: write /opt/conda/lib: no space left on device",
        "toomanyrequests: You have reached your pull rate limit.",
    ],
)
def test_a_machine_that_cannot_run_it(line: str) -> None:
    """The driver, the disk or the address of this machine: another one may do."""
    error = diagnose([*BEGINNING, *PULLED, START, line], image=IMAGE)
    assert isinstance(error, HostUnusable)
    assert len(str(error)) < 500


@pytest.mark.parametrize(
    "lines",
    [
        [],
        BEGINNING,
        [*BEGINNING, *PULLED],
        [*BEGINNING, *PULLED, START],
        [*BEGINNING, "toomanyrequests: retrying", *PULLED],
        [*BEGINNING, *PULLED, START, "OCI runtime create failed: busy", START],
        [*BEGINNING, *PULLED, START, "container exited with code 1"],
    ],
)
def test_no_reason_to_give_up(lines: list[str]) -> None:
    """Under way, or past an error that went away by itself."""
    assert diagnose(lines, image=IMAGE) is None


def test_the_newest_trouble_counts() -> None:
    """A machine that was rate limited first, and then finds nothing to pull, shows the image's fault."""
    lines = [*BEGINNING, "toomanyrequests: slow down", "manifest unknown"]
    assert isinstance(diagnose(lines, image=IMAGE), ImageError)
    assert isinstance(diagnose([*lines, *PULLED, START, CUDA], image=IMAGE), HostUnusable)


@given(st.binary(max_size=400))
def test_any_stream_is_read(stream: bytes) -> None:
    """Nothing that a server sends is an error of the parser."""
    lines = lines_of(stream)
    diagnose(lines, image=IMAGE)


def test_event_fields_are_read_in_each_of_their_forms() -> None:
    """With and without the blank, with either line end, with keys before and after."""
    stream = (
        b'id: 1\r\ndata: {"line": "a", "source": "system"}\r\n\r\n'
        b'data:{"line": "b"}\n\n'
        b': keepalive\n\nevent: x\ndata: {"line": 3}\n\ndata: {"source": "container", "line": "c"}\n\n'
    )
    assert lines_of(stream) == ["a", "b"]
