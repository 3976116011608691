"""The client: `ow = OpenWeights()`."""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from openweights_prefect.errors import ConfigurationError
from openweights_prefect.files.selection import open_store
from openweights_prefect.ledger.connect import access_tokens, check_organization, connect
from openweights_prefect.resources.costs import Costs
from openweights_prefect.resources.custom import Jobs, registered
from openweights_prefect.resources.events import Events
from openweights_prefect.resources.files import Files
from openweights_prefect.resources.fine_tuning import FineTuning
from openweights_prefect.resources.jobs import StoredJobs
from openweights_prefect.resources.logprob import Logprob
from openweights_prefect.resources.organizations import Organizations
from openweights_prefect.resources.runs import Runs
from openweights_prefect.resources.script_run import ScriptRun
from openweights_prefect.resources.secrets import Secrets
from openweights_prefect.resources.session import Session
from openweights_prefect.resources.tokens import Tokens
from openweights_prefect.resources.weighted_sft import WeightedSft
from openweights_prefect.settings import Settings

_TOKEN = re.compile(r"ow_[A-Za-z0-9_-]{8,}")


class OpenWeights:
    """One organization's files, jobs, runs and events; safe to share between threads.

    Constructing it makes at most one request. Without arguments it uses what the environment names, else
    where `ow login` has signed in, else the local stack.
    """

    files: Files
    jobs: StoredJobs
    runs: Runs
    events: Events
    fine_tuning: FineTuning
    weighted_sft: WeightedSft
    logprob: Logprob
    tokens: Tokens
    organization: Organizations
    secrets: Secrets
    costs: Costs

    def __init__(
        self,
        auth_token: str | None = None,
        organization_id: str | None = None,
        use_async: bool = False,
        deploy_kwargs: Mapping[str, Any] | None = None,
        supabase_url: str | None = None,
        supabase_key: str | None = None,
        *,
        settings: Settings | None = None,
    ) -> None:
        given = {
            "api_key": auth_token,
            "organization_id": organization_id,
            "supabase_url": supabase_url,
            "supabase_key": supabase_key,
        }
        settings = Settings.load(given=given) if settings is None else settings.with_given(given)
        if supabase_key and not settings.supabase_url:
            raise ConfigurationError("`supabase_key` is of no use without `supabase_url` (or SUPABASE_URL).")
        _check_token(settings.api_key)
        self.use_async = use_async
        self.deploy_kwargs = {"max_model_len": 2048} if deploy_kwargs is None else dict(deploy_kwargs)
        self._session = _session(settings)
        self._custom: dict[str, Jobs] = {}
        self._run: ScriptRun | None = None
        self._run_lock = threading.Lock()
        self.files = Files(self._session)
        self.jobs = StoredJobs(self._session)
        self.runs = Runs(self._session)
        self.events = Events(self._session)
        self.fine_tuning = FineTuning(self._session)
        self.weighted_sft = WeightedSft(self._session)
        self.logprob = Logprob(self._session)
        self.tokens = Tokens(self._session.ledger)
        self.organization = Organizations(self._session.ledger)
        self.secrets = Secrets(self._session)
        self.costs = Costs(self._session.ledger)

    @property
    def organization_id(self) -> str:
        """The organization that it acts for."""
        return self._session.organization_id

    @property
    def settings(self) -> Settings:
        """The settings that it works with."""
        return self._session.settings

    @property
    def run(self) -> ScriptRun:
        """The run of this script, a job of type `script` that begins at first use; in a job, its own run."""
        with self._run_lock:
            if self._run is None:
                self._run = ScriptRun(self._session)
            return self._run

    def close(self) -> None:
        """End its script run, if there is one, and give back its connections; silent when already closed."""
        if self._run is not None:
            self._run.close()
        self._session.ledger.close()

    def __enter__(self) -> OpenWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Jobs:
        kind = None if name.startswith("_") else registered().get(name)
        if kind is None:
            raise AttributeError(_no_attribute(name, dir(self)))
        jobs = self._custom.get(name)
        if type(jobs) is not kind:
            jobs = self._custom[name] = kind(self._session)
        return jobs

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *registered()]


def _session(settings: Settings) -> Session:
    access = access_tokens(settings)
    ledger = connect(settings, access=access)
    return Session(
        ledger=ledger,
        store=open_store(settings, bearer=access.bearer if access else None),
        organization_id=check_organization(settings, ledger),
        settings=settings,
    )


def _check_token(token: str) -> None:
    """The value is a secret and stays out of the message."""
    if token and not _TOKEN.fullmatch(token):
        raise ConfigurationError(
            "`auth_token` (or OPENWEIGHTS_API_KEY) is not a token: those start with 'ow_', and have at least "
            "8 letters, digits, '-' or '_' after that. Leave both out to use the local stack."
        )


def _no_attribute(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, [text for text in known if not text.startswith("_")], n=3)
    hint = (
        f"Did you mean {', '.join(map(repr, near))}?" if near else "Job types of your own need `@register`."
    )
    return f"A client has no {name!r}. {hint}"
