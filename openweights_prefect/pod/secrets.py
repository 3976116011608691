"""The secrets that a run's job names: fetched under the pod's lease, and held in memory only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from uuid import UUID

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.ledger.envelope import PREFIX, UnreadableSecret
from openweights_prefect.ledger.keyring import Keyring
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.pod.outage import rows_until_answered


class SecretsMissing(OpenWeightsError):
    """Secrets that the job names are gone: somebody deleted them after it was submitted."""


async def job_secrets(
    ledger: Ledger, keyring: Keyring, job: Mapping[str, object], *, run_id: UUID, boot: UUID
) -> dict[str, str]:
    """Name -> value of every secret that the job of an opened run names.

    Raises:
        SecretsMissing: The organization does not have one of them any more.
        UnreadableSecret: One cannot be opened with the key file of this pod.
        ConfigurationError: There is no key file, or others can read it.
    """
    names = job.get("secrets")
    if not isinstance(names, list) or not names:
        return {}
    organization_id = str(job["organization_id"])

    async def fetch() -> dict[str, str]:
        rows = await rows_until_answered(ledger, "job_secrets", for_run=run_id, as_boot=boot)
        _check(names, rows)
        return {row["name"]: _open(keyring, organization_id, row) for row in rows}

    try:
        return await fetch()
    except UnreadableSecret:
        return await fetch()  # the key may have been rotated between the two steps


def _check(names: Iterable[str], rows: Iterable[Row]) -> None:
    if missing := sorted({*names}.difference(row["name"] for row in rows)):
        mends = ", ".join(f"`ow env set {name}`" for name in missing)
        raise SecretsMissing(
            f"The organization has no secret {', '.join(map(repr, missing))} any more, which the job needs. "
            f"Store it with {mends}, then restart the job."
        )


def _open(keyring: Keyring, organization_id: str, row: Row) -> str:
    """Vault gives the value itself."""
    value = str(row["value"])
    return keyring.open(organization_id, row["name"], value) if value.startswith(PREFIX) else value
