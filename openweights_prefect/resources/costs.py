"""`ow.costs`: what pods cost, for whom, and what may be spent."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from openweights_prefect.errors import ConfigurationError, InvalidParameterError, NotFoundError
from openweights_prefect.ledger.protocol import Ledger, Row
from openweights_prefect.resources.session import MAX_ROWS, check_choice
from openweights_prefect.resources.tokens import Tokens, checked_usd
from openweights_prefect.types.money import COST_GROUPS, Budget, JobCost
from openweights_prefect.types.tenancy import Token

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped,unused-ignore]  # without pandas-stubs

Moment = datetime | timedelta
"""A time with its zone, or how long ago."""


class CostRow(TypedDict):
    """What one job, pod, token, user or day has cost, in USD."""

    key: str | None
    """Its id, or the day in UTC. None: what nobody caused, or, by token, caused without one."""
    label: str | None
    """For people: the job's type, the pod's hardware, the token's name, the user's e-mail address."""
    runs: int
    run_seconds: float
    direct_usd: float
    """While runs ran."""
    overhead_usd: float
    """What pods did besides, shared among their runs by how long they ran: `boot`, `idle` and `teardown`."""
    total_usd: float
    """The sum of all rows is the bill, however it is grouped."""
    boot_usd: float
    idle_usd: float
    teardown_usd: float
    saved_usd: float
    """Boots that were not needed, because runs found a warm pod; no part of the total."""


_COLUMNS = tuple(CostRow.__annotations__)


class Costs:
    """The bill by what caused it, and the limits of spending."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def rows(
        self, by: str = "job", *, since: Moment | None = None, until: Moment | None = None
    ) -> list[CostRow]:
        """The costs by `job`, `worker` (pod), `token`, `user` or `day`; the dearest first, days in order.

        `since` and `until` are times, or how long ago; pods that ran across are counted for the part between.
        """
        check_choice("by", by, COST_GROUPS)
        arguments: dict[str, Any] = {
            "group_by": by,
            "since": _moment("since", since),
            "until": _moment("until", until),
            "max_rows": MAX_ROWS,
        }
        rows: list[Row] = []
        while True:
            page = self._ledger.call("list_costs", **arguments)
            rows += page
            if len(page) < MAX_ROWS or page[-1]["key"] is None:
                break
            arguments["after_key"] = page[-1]["key"]
        found = [_row(row) for row in rows]
        return found if by == "day" else sorted(found, key=lambda row: -row["total_usd"])

    def report(
        self, by: str = "job", *, since: Moment | None = None, until: Moment | None = None
    ) -> pandas.DataFrame:
        """As `rows`, one row of a table each; needs pandas."""
        try:
            import pandas  # Optional, and slow to import.
        except ImportError as exc:
            raise ConfigurationError(
                "`ow.costs.report` needs pandas; run `pip install pandas`, or use `ow.costs.rows`."
            ) from exc
        return pandas.DataFrame(self.rows(by, since=since, until=until), columns=list(_COLUMNS))

    def budget(self) -> Budget:
        """What the organization may spend, has spent, and has reserved for the pods that live."""
        return Budget.from_row(self._ledger.call("get_budget")[0])

    def set_budget(self, usd: float | None) -> Budget:
        """Set what the organization may spend in all, None for no limit; only admins may.

        Pods that would go beyond it are not bought; those that live go on until their deadlines.
        """
        self._ledger.call("set_budget", limit_usd=checked_usd("usd", usd))
        return self.budget()

    def set_limit(self, token_id: str, usd: float | None) -> Token:
        """Set what a token's jobs may cost, as `ow.tokens.set_limit` does."""
        return Tokens(self._ledger).set_limit(token_id, usd)


def total_of(rows: Iterable[CostRow]) -> CostRow:
    """The sum of rows, without a key."""
    held = list(rows)
    return CostRow(
        key=None,
        label=None,
        runs=sum(row["runs"] for row in held),
        run_seconds=sum(row["run_seconds"] for row in held),
        direct_usd=sum(row["direct_usd"] for row in held),
        overhead_usd=sum(row["overhead_usd"] for row in held),
        total_usd=sum(row["total_usd"] for row in held),
        boot_usd=sum(row["boot_usd"] for row in held),
        idle_usd=sum(row["idle_usd"] for row in held),
        teardown_usd=sum(row["teardown_usd"] for row in held),
        saved_usd=sum(row["saved_usd"] for row in held),
    )


def job_cost(ledger: Ledger, job_id: str) -> JobCost:
    """What a job has cost until now; raises `NotFoundError`."""
    rows = ledger.call("job_cost", job_id=job_id)
    if not rows:
        raise NotFoundError(
            f"No job {job_id!r} in this organization; `ow.jobs.list()` shows those that exist."
        )
    return JobCost.from_row(rows[0])


def _row(row: Row) -> CostRow:
    usd = {name: float(row[name]) for name in _COLUMNS if name.endswith("_usd")}
    return CostRow(
        key=row["key"],
        label=row["label"],
        runs=row["runs"],
        run_seconds=float(row["run_seconds"]),
        direct_usd=usd["direct_usd"],
        overhead_usd=usd["overhead_usd"],
        total_usd=usd["total_usd"],
        boot_usd=usd["boot_usd"],
        idle_usd=usd["idle_usd"],
        teardown_usd=usd["teardown_usd"],
        saved_usd=usd["saved_usd"],
    )


def _moment(name: str, moment: Moment | None) -> str | None:
    """As the ledger takes it."""
    if isinstance(moment, timedelta):
        moment = datetime.now(UTC) - moment
    if moment is None:
        return None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise InvalidParameterError(
            f"{name}={moment!r} is neither a time with its zone, such as datetime(2026, 3, 1, tzinfo=UTC), "
            "nor a timedelta, how long ago."
        )
    return moment.isoformat()
