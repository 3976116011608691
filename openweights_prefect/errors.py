"""Every error a user can meet, in one tree.

OpenWeightsError
├── ConfigurationError      a setting is missing or wrong
├── AuthenticationError     the token or session is unknown, expired or revoked
├── PermissionDeniedError   the caller is known and may not do this
├── BudgetExceeded          a spending limit of the token or the organization is reached
├── InvalidRequestError     what was asked for cannot be done as asked
│   ├── InvalidParameterError   a parameter has a bad value
│   └── InvalidFileError        a data file does not have the format of its purpose
├── NotFoundError           no such job, run, file or pod in this organization
├── ConflictError           the thing is not in a state that allows this
├── JobFailed               `job.wait()` ended with a failed or canceled job
├── WaitTimeout             `job.wait(timeout=...)` ran out of time; the job goes on
├── LedgerUnavailable       the ledger did not answer in time
├── StackError              the local stack could not start or stop
└── ProviderError           RunPod refused or did not answer (see provisioning.provider)
"""

from __future__ import annotations


class OpenWeightsError(Exception):
    """Base of all errors of this package: says what was wrong, with which value, and what to do."""


class ConfigurationError(OpenWeightsError):
    """A setting is missing or wrong."""


class AuthenticationError(OpenWeightsError):
    """The token or session is unknown, expired or revoked, or its owner is no member any more."""


class PermissionDeniedError(OpenWeightsError, PermissionError):
    """The caller is known and may not do this."""


class BudgetExceeded(OpenWeightsError):
    """A spending limit of the token or the organization is reached."""


class InvalidRequestError(OpenWeightsError, ValueError):
    """What was asked for cannot be done as asked."""


class InvalidParameterError(InvalidRequestError):
    """A parameter has a bad value; the message names the field, the value and the mend."""


class InvalidFileError(InvalidRequestError):
    """A data file does not have the format of its purpose; the message names the lines."""


class NotFoundError(OpenWeightsError, LookupError):
    """No such job, run, file or pod in this organization."""


class ConflictError(OpenWeightsError):
    """The thing is not in a state that allows this."""


class JobFailed(OpenWeightsError):
    """`job.wait()` ended with a failed or canceled job."""


class WaitTimeout(OpenWeightsError, TimeoutError):
    """`job.wait(timeout=...)` ran out of time; the job goes on."""


class LedgerUnavailable(OpenWeightsError, ConnectionError):
    """The ledger did not answer in time."""


class StackError(OpenWeightsError):
    """The local stack could not start or stop."""


class ProviderError(OpenWeightsError):
    """RunPod refused or did not answer."""
