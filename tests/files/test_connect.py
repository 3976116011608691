"""Which store `OW_FILE_STORE` names, and which values are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.files.connect import connect
from openweights_prefect.files.store import LocalFileStore


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is the default folder; any other text is a folder, `~` is the user's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, root in {"": "default", "~/store": "store", str(tmp_path / "a b:c"): "a b:c"}.items():
        store = connect(value, tmp_path / "default")
        assert isinstance(store, LocalFileStore)
        assert store._root == tmp_path / root


def test_hosted_store_is_taken_when_none_is_named(tmp_path: Path) -> None:
    """A store that is named wins over that of the hosted service, which is not even made then."""
    hosted = LocalFileStore(tmp_path / "hosted")
    assert connect("", tmp_path, hosted=lambda: hosted) is hosted
    named = connect(str(tmp_path / "named"), tmp_path, hosted=lambda: pytest.fail("was made"))
    assert isinstance(named, LocalFileStore)


@pytest.mark.parametrize(
    ("value", "prefix", "connection"),
    [
        ("s3://lab-files", "", (None, None)),
        ("s3://lab-files/", "", (None, None)),
        ("s3://lab-files/team/ow/?region=eu-west-1", "team/ow/", (None, "eu-west-1")),
        (
            "s3://lab-files/x?endpoint_url=http://127.0.0.1:9000&region=auto",
            "x/",
            ("http://127.0.0.1:9000", "auto"),
        ),
        ("s3://lab-files?endpoint_url=https%3A%2F%2Fminio.lab%3A9000", "", ("https://minio.lab:9000", None)),
    ],
)
def test_buckets(value: str, prefix: str, connection: tuple[str | None, str | None]) -> None:
    """Bucket, prefix, endpoint and region come from the URL; nothing is asked for yet."""
    s3 = pytest.importorskip("openweights_prefect.files.s3", reason="needs the extra s3")
    store = connect(value, Path("unused"))
    assert isinstance(store, s3.S3FileStore)
    assert (store._bucket, store._prefix) == ("lab-files", prefix)
    assert tuple(store._connection.values()) == connection


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("gs://bucket/x", "no file store for 'gs'"),
        ("file:///tmp/x", "no file store for 'file'"),
        ("s3:/bucket/x", "cannot be the name of a bucket"),
        ("s3://", "cannot be the name of a bucket"),
        ("s3://Bucket_1", "cannot be the name of a bucket"),
        ("s3://bucket:9000/x", "cannot be the name of a bucket"),
        ("s3://bucket/../x", "does not name a file below"),
        ("s3://bucket/a//b", "empty or `.` parts"),
        ("s3://bucket/a\\b", "backslash"),
        ("s3://bucket/x#y", "a `#`"),
        ("s3://bucket?region=a&region=b", "an option twice"),
        ("s3://bucket?endpoint_url=minio:9000", "is not an address"),
        ("s3://bucket?region=eu_west", "is not a region"),
        ("s3://bucket?region", "is not a URL"),
        ("/tmp/\x00x", "control characters"),
    ],
)
def test_bad_values(value: str, reason: str) -> None:
    """The error names the setting, what is wrong with it, and what it may be."""
    with pytest.raises(
        ConfigurationError, match=r"OW_FILE_STORE.* Set it to a folder or to `s3://"
    ) as caught:
        connect(value, Path("unused"))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        "s3://AKIAKEY:hunter2@bucket/prefix",
        "s3://hunter2@bucket",
        "s3://bucket?secret_access_key=hunter2",
        "s3://bucket?hunter2=x",
        "s3://bucket?endpoint_url=https://user:hunter2@minio.lab",
        "s3://bucket?endpoint_url=https%3A%2F%2Fuser%3Ahunter2%40minio.lab",
    ],
)
def test_credentials_in_the_url(value: str) -> None:
    """They are refused, and never repeated in the error."""
    with pytest.raises(ConfigurationError, match="AWS_ACCESS_KEY_ID") as caught:
        connect(value, Path("unused"))
    assert "hunter2" not in f"{caught.value}{caught.value.__cause__}"
    assert "AKIAKEY" not in str(caught.value)


def test_a_folder_needs_no_boto3() -> None:
    """Who keeps files in a folder neither has nor waits for the libraries of S3."""
    script = (
        "import sys; sys.modules['boto3'] = None\n"
        "from pathlib import Path\n"
        "from openweights_prefect.files.connect import connect\n"
        "from openweights_prefect.errors import ConfigurationError\n"
        "connect('', Path('x')); assert 'botocore' not in sys.modules\n"
        "try: connect('s3://bucket', Path('x'))\n"
        "except ConfigurationError as exc: print(exc)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'openweights-prefect[s3]'" in result.stdout
