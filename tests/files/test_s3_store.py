"""What only a bucket has: uploads in parts that are resumed, connections that break, errors with a cause."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from backings import ORGANIZATION, PART_BYTES, Bucket, CuttingProxy, id_of

from openweights_prefect.errors import InvalidParameterError
from openweights_prefect.files.layout import file_path, result_path

s3 = pytest.importorskip("openweights_prefect.files.s3", reason="needs the extra s3")
FileStoreError = s3.FileStoreError

CONTENT = os.urandom(PART_BYTES * 9 + 1000)
ID = id_of(CONTENT)
KEY = f"{Bucket.prefix}/{file_path(ID, ORGANIZATION)}"
ALL_PARTS = list(range(1, 11))

PUT_SCRIPT = """
import sys
from openweights_prefect.files.s3 import S3FileStore
bucket, prefix, endpoint, part_bytes, file, organization = sys.argv[1:]
store = S3FileStore(bucket, prefix, endpoint_url=endpoint, region="us-east-1", part_bytes=int(part_bytes))
store.put(file, organization, sys.stdin.buffer)
"""


def wait_for(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.02)


def sent_parts(bucket: Bucket) -> list[int]:
    """A list that the number of each part is added to when the store sends it."""
    numbers: list[int] = []
    lock = threading.Lock()

    def record(params: dict[str, Any], **_: Any) -> None:
        with lock:
            numbers.append(int(params["query_string"]["partNumber"]))

    bucket.store._client.meta.events.register("before-call.s3.UploadPart", record)
    return numbers


def unfinished(bucket: Bucket, parts: dict[int, bytes]) -> str:
    """Leave an upload of the object as a killed writer would."""
    upload = bucket.client.create_multipart_upload(Bucket=bucket.name, Key=KEY)["UploadId"]
    for number, data in parts.items():
        bucket.client.upload_part(Bucket=bucket.name, Key=KEY, UploadId=upload, PartNumber=number, Body=data)
    return str(upload)


def part(number: int) -> bytes:
    return CONTENT[(number - 1) * PART_BYTES : number * PART_BYTES]


def test_killed_upload_is_resumed(bucket: Bucket, tmp_path: Path) -> None:
    """After a SIGKILL nothing is visible; the next upload sends only the parts that were not there."""
    arguments = [bucket.name, bucket.prefix, bucket.endpoint_url, str(PART_BYTES), ID, ORGANIZATION]
    with subprocess.Popen([sys.executable, "-c", PUT_SCRIPT, *arguments], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(CONTENT[: 6 * PART_BYTES])
        process.stdin.flush()
        wait_for(lambda: any(len(parts) >= 4 for parts in bucket.uploads().values()))
        process.send_signal(signal.SIGKILL)
    assert bucket.objects() == {}
    [(upload, there)] = bucket.uploads().items()
    sent = sent_parts(bucket)
    (tmp_path / "source").write_bytes(CONTENT)
    bucket.store.put(ID, ORGANIZATION, tmp_path / "source")
    assert sorted(sent) == [number for number in ALL_PARTS if number not in there]
    assert list(bucket.objects().values()) == [CONTENT]
    assert upload not in bucket.uploads()


def test_parts_that_are_not_ours_are_sent_again(bucket: Bucket) -> None:
    """A part of other bytes or another size in the unfinished upload is replaced, never trusted."""
    other = os.urandom(PART_BYTES)
    unfinished(bucket, {1: part(1), 2: other, 3: part(3)[:-1], 4: part(4), 10: other, 11: other})
    sent = sent_parts(bucket)
    bucket.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert sorted(sent) == [2, 3, 5, 6, 7, 8, 9, 10]
    assert list(bucket.objects().values()) == [CONTENT]


def test_the_fullest_upload_is_taken(bucket: Bucket) -> None:
    """Of several unfinished uploads, the one that has most parts is gone on with."""
    unfinished(bucket, {1: part(1)})
    unfinished(bucket, {number: part(number) for number in ALL_PARTS[:7]})
    unfinished(bucket, {})
    sent = sent_parts(bucket)
    bucket.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert sorted(sent) == [8, 9, 10]
    assert sorted(map(len, bucket.uploads().values())) == [0, 1]


def test_wrong_content_is_never_made_visible(bucket: Bucket) -> None:
    """A file that changed while it was read is refused after all parts were sent; its upload is gone."""
    with pytest.raises(InvalidParameterError, match="is not that of"):
        bucket.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT[:-1] + b"x"))
    assert bucket.objects() == {}
    assert bucket.uploads() == {}


def test_writers_that_go_on_with_one_upload(bucket: Bucket) -> None:
    """Eight at once, all of which find the same unfinished upload, succeed; the content is right."""
    unfinished(bucket, {1: part(1), 2: part(2)})
    errors: list[BaseException] = []

    def write() -> None:
        try:
            store = s3.S3FileStore(
                bucket.name,
                bucket.prefix,
                endpoint_url=bucket.endpoint_url,
                region="us-east-1",
                part_bytes=PART_BYTES,
            )
            store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    assert list(bucket.objects().values()) == [CONTENT]


def disturb(bucket: Bucket, act: Callable[[str], None]) -> None:
    """Do something once, just before the store completes its first upload."""
    done: list[str] = []

    def before(params: dict[str, Any], **_: Any) -> None:
        if not done:
            done.append(params["query_string"]["uploadId"])
            act(done[0])

    bucket.store._client.meta.events.register("before-call.s3.CompleteMultipartUpload", before)


def test_a_writer_of_other_content_in_our_upload(bucket: Bucket) -> None:
    """Bytes that another writer put into a part of our upload do not become visible under our id."""

    def overwrite(upload: str) -> None:
        bucket.client.upload_part(
            Bucket=bucket.name, Key=KEY, UploadId=upload, PartNumber=2, Body=os.urandom(PART_BYTES)
        )

    disturb(bucket, overwrite)
    bucket.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert list(bucket.objects().values()) == [CONTENT]


def test_an_upload_that_is_swept_while_it_runs(bucket: Bucket) -> None:
    """It is sent anew; a pipe, which cannot be read again, gives an error that says what happened."""
    disturb(bucket, lambda _: bucket.store.sweep(older_than_seconds=0) and None)
    bucket.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert list(bucket.objects().values()) == [CONTENT]
    bucket.store.delete(ID, ORGANIZATION)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    disturb(bucket, lambda _: bucket.store.sweep(older_than_seconds=0) and None)
    with pytest.raises(FileStoreError, match="ended by somebody else"):
        bucket.store.put(ID, ORGANIZATION, Pipe(CONTENT))


def test_sweep(bucket: Bucket) -> None:
    """Only uploads below the prefix that are old enough are aborted; finished objects stay."""
    small = id_of(b"small")
    bucket.store.put(small, ORGANIZATION, io.BytesIO(b"small"))
    unfinished(bucket, {1: part(1)})
    elsewhere = bucket.client.create_multipart_upload(Bucket=bucket.name, Key="another/key")["UploadId"]
    century = 100 * 365 * 24 * 3600
    assert bucket.store.sweep(older_than_seconds=century) == 0
    assert bucket.store.sweep() == 1
    assert list(bucket.uploads()) == [elsewhere]
    assert list(bucket.objects().values()) == [b"small"]


def test_part_size_grows_with_the_file(bucket: Bucket) -> None:
    """A file of any size that S3 can hold fits into 10 000 parts, always the same ones."""
    for size in (1, 320 << 30, 5 << 40):
        bytes_each = bucket.store._part_size(size)
        assert bytes_each >= PART_BYTES
        assert -(-size // bytes_each) <= 10_000
    assert s3.S3FileStore("bucket")._part_size(1 << 40) < 5 << 30


def test_broken_downloads_go_on(bucket: Bucket, tmp_path: Path) -> None:
    """Connections that are cut in the middle of the content are made again where they broke."""
    bucket.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    proxy = CuttingProxy(bucket.endpoint_url, after_bytes=PART_BYTES, times=3)
    store = s3.S3FileStore(bucket.name, bucket.prefix, endpoint_url=proxy.url, region="us-east-1")
    store.fetch(ID, ORGANIZATION, tmp_path / "copy")
    assert proxy.cuts_left == 0
    assert (tmp_path / "copy").read_bytes() == CONTENT
    proxy.cuts_left = 100
    with pytest.raises(FileStoreError, match="Cannot read on after"):
        store.fetch(ID, ORGANIZATION, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    proxy.close()


def test_prefect_sees_the_same_objects(bucket: Bucket) -> None:
    """A `prefect_aws.S3Bucket` block of the same bucket and prefix reads what the store wrote."""
    prefect_aws = pytest.importorskip("prefect_aws", reason="needs the extra s3")
    block = prefect_aws.S3Bucket(
        bucket_name=bucket.name,
        bucket_folder=bucket.prefix,
        credentials=prefect_aws.AwsCredentials(
            region_name="us-east-1", aws_client_parameters={"endpoint_url": bucket.endpoint_url}
        ),
    )
    bucket.store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    assert block.read_path(file_path(ID, ORGANIZATION)) == CONTENT
    block.write_path(result_path("job-1", ORGANIZATION), b"from Prefect")
    assert bucket.store.read_result("job-1", ORGANIZATION) == b"from Prefect"


@pytest.fixture
def refusing() -> Iterator[Callable[[int, str], str]]:
    """Makes the URL of a server that answers everything with one status and one S3 error code."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, code: str) -> str:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()

        class Refusal(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def impatient(url: str, bucket: str = "bucket") -> Any:
    return s3.S3FileStore(bucket, endpoint_url=url, region="us-east-1", timeout_seconds=0.3, attempts=1)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access is denied .*Allow these credentials"),
        (403, "SignatureDoesNotMatch", "credentials are not accepted .*AWS_SECRET_ACCESS_KEY"),
        (404, "NoSuchBucket", "no such bucket .*Create it"),
        (503, "SlowDown", "overloaded .*Try again later"),
        (400, "AuthorizationHeaderMalformed", "another region .*region="),
        (418, "Teapot", "the request failed .*Teapot"),
    ],
)
def test_refusals(
    aws: None, refusing: Callable[[int, str], str], status: int, code: str, message: str
) -> None:
    """What the service refuses is an error that names bucket, object, cause and mend."""
    store = impatient(refusing(status, code))
    with pytest.raises(
        FileStoreError, match=rf"Cannot read object 'organi.*job-1' in bucket 'bucket': .*{message}"
    ):
        store.read_result("job-1", ORGANIZATION)
    with pytest.raises(FileStoreError, match=rf"Cannot store object .* in bucket 'bucket': .*{message}"):
        store.write_result("job-1", ORGANIZATION, b"x")


def test_denied_look_up(aws: None, refusing: Callable[[int, str], str]) -> None:
    """Not being allowed to know is not the same as not being there."""
    with pytest.raises(FileStoreError, match=r"Cannot look up .* access is denied"):
        impatient(refusing(403, "AccessDenied")).exists(ID, ORGANIZATION)


def test_bucket_that_does_not_exist(bucket: Bucket) -> None:
    """An upload into no bucket is an error, not a silent loss."""
    store = s3.S3FileStore("no-such-bucket", endpoint_url=bucket.endpoint_url, region="us-east-1")
    with pytest.raises(FileStoreError, match=r"'no-such-bucket': there is no such bucket .*OW_FILE_STORE"):
        store.put(ID, ORGANIZATION, io.BytesIO(CONTENT))


def test_unreachable_and_slow(aws: None) -> None:
    """A service that is not there, and one that never answers, end in bounded time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(FileStoreError, match="did not answer in time"):
            impatient(f"http://127.0.0.1:{port}").put(ID, ORGANIZATION, io.BytesIO(CONTENT))
    with pytest.raises(FileStoreError, match=r"cannot be reached .*endpoint_url"):
        impatient(f"http://127.0.0.1:{port}").put(ID, ORGANIZATION, io.BytesIO(CONTENT))


def test_no_credentials(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the store needs none; using it says which are missing."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = impatient("http://127.0.0.1:9")
    with pytest.raises(FileStoreError, match=r"there are no credentials .*AWS_ACCESS_KEY_ID"):
        store.exists(ID, ORGANIZATION)
