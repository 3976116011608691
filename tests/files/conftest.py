"""Fixtures: each kind of store. S3 is moto's server, over real HTTP."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backings import Backing, Bucket, Folder
from backings import CuttingProxy as CuttingProxy

from openweights_prefect.files.store import FileStore


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """An S3 that takes small parts too."""
    pytest.importorskip("boto3", reason="needs the extra s3")
    with pytest.MonkeyPatch.context() as patch:
        assert "moto" not in sys.modules
        patch.setenv("S3_UPLOAD_PART_MIN_SIZE", "1")
        server_module = pytest.importorskip("moto.server", reason="needs moto")
        _forget_uploads_as_s3_does(patch)
        server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


def _forget_uploads_as_s3_does(patch: pytest.MonkeyPatch) -> None:
    """moto answers 500 when asked about an upload that was completed or aborted; S3 says `NoSuchUpload`."""
    from moto.s3.exceptions import NoSuchUpload
    from moto.s3.models import S3Backend

    def checked(original: Any) -> Any:
        def call(self: Any, bucket_name: str, multipart_id: str, *rest: Any, **more: Any) -> Any:
            if multipart_id not in self.get_bucket(bucket_name).multiparts:
                raise NoSuchUpload(upload_id=multipart_id)
            return original(self, bucket_name, multipart_id, *rest, **more)

        return call

    for name in ("upload_part", "complete_multipart_upload"):
        patch.setattr(S3Backend, name, checked(getattr(S3Backend, name)))


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of boto3: nothing but invented credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def bucket(moto_url: str, aws: None) -> Bucket:
    return Bucket(moto_url)


@pytest.fixture(params=["folder", "bucket"])
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> Backing:
    """Each kind of store in turn."""
    if request.param == "folder":
        return Folder(tmp_path / "store")
    made: Backing = request.getfixturevalue("bucket")
    return made


@pytest.fixture
def store(backing: Backing) -> FileStore:
    """The store of `backing`."""
    return backing.store
