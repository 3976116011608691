"""What went wrong with S3, in words that say what to do."""

from __future__ import annotations

from botocore import exceptions

from openweights_prefect.files.multipart import code_of
from openweights_prefect.files.store import FileStoreError

_REFUSED = (
    "the credentials are not accepted",
    "Check `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` or the profile",
)
_DENIED = (
    "access is denied",
    "Allow these credentials to list the bucket and to get, put and delete its objects",
)
_NO_BUCKET = "there is no such bucket", "Create it, or correct `OW_FILE_STORE`"
_REGION = (
    "the bucket is in another region",
    "Name its region: `s3://bucket/prefix?region=...` in `OW_FILE_STORE`",
)
_BUSY = "the service is overloaded", "Try again later; an upload goes on where it stopped"
_UNREACHABLE = (
    "the service cannot be reached",
    "Check the network and the `endpoint_url` in `OW_FILE_STORE`; an upload goes on where it stopped",
)
_SLOW = "the service did not answer in time", "Try again; an upload goes on where it stopped"
_NO_CREDENTIALS = (
    "there are no credentials",
    "Set `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, or configure an AWS profile",
)
_OTHER = "the request failed", "Check `OW_FILE_STORE` and the service"

_BY_CODE = {
    "NoSuchBucket": _NO_BUCKET,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": _REFUSED,
    "SignatureDoesNotMatch": _REFUSED,
    "ExpiredToken": _REFUSED,
    "InvalidToken": _REFUSED,
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "SlowDown": _BUSY,
    "ServiceUnavailable": _BUSY,
    "InternalError": _BUSY,
    "500": _BUSY,
    "503": _BUSY,
    "RequestTimeout": _SLOW,
}
_BY_KIND: dict[type[Exception], tuple[str, str]] = {
    exceptions.NoCredentialsError: _NO_CREDENTIALS,
    exceptions.PartialCredentialsError: _NO_CREDENTIALS,
    exceptions.ReadTimeoutError: _SLOW,
    exceptions.HTTPClientError: _UNREACHABLE,
    exceptions.ConnectionError: _UNREACHABLE,
}


def s3_error(action: str, exc: Exception) -> FileStoreError:
    """The error to raise for `exc`, which came when we were to do `action`."""
    if isinstance(exc, exceptions.ClientError):
        cause, mend = _BY_CODE.get(code_of(exc), _OTHER)
    else:
        cause, mend = next((words for kind, words in _BY_KIND.items() if isinstance(exc, kind)), _OTHER)
    return FileStoreError(f"Cannot {action}: {cause} ({exc}). {mend}.")
