"""What `ow doctor` looks at: each check says whether a part works, and how to mend it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.files.selection import open_store
from openweights_prefect.files.store import LocalFileStore
from openweights_prefect.ledger import migrator
from openweights_prefect.ledger.connect import access_tokens, connect
from openweights_prefect.ledger.postgres import local_ledger
from openweights_prefect.provisioning.runpod.contract import compare
from openweights_prefect.settings import Settings
from openweights_prefect.stack import databases, health
from openweights_prefect.stack.service import Folders
from openweights_prefect.stack.services import prefect_api_url, stored_api_key
from openweights_prefect.stack.up import LEAST_FREE_BYTES

JOB_LIBRARIES = ("torch", "trl", "transformers", "peft")
_IMPORT_SECONDS = 180
_OLDEST_PYTHON = (3, 11)
_NO_FILE = "probe:file-000000000000"
_START = "Run `ow up`."


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    ok: bool
    detail: str
    mend: str = ""
    """What to do; empty when all is well."""


def check_all(settings: Settings) -> Iterator[Check]:
    """Run every check, one after the other; none raises an error of ours.

    For who uses a hosted ledger, the machines behind it are others' to look after: those checks are left out
    unless `PREFECT_API_URL` says that they run here.
    """
    here: tuple[tuple[str, Callable[[Settings], Check]], ...] = (
        ("settings", _settings),
        ("python", _python),
        ("disk", _disk),
    )
    ledger: tuple[tuple[str, Callable[[Settings], Check]], ...] = (
        ("postgresql", _postgresql),
        ("ledger", _ledger),
    )
    control: tuple[tuple[str, Callable[[Settings], Check]], ...] = (
        ("prefect", _prefect),
        ("work pool", _work_pool),
        ("worker", _worker),
        ("runpod", _runpod),
        ("job interpreter", _job_interpreter),
    )
    if settings.supabase_url:
        ledger = (("ledger", _hosted_ledger),)
        control = control[:-1] if settings.prefect_api_url else ()
    for name, check in (*here, *ledger, *control, ("file store", _file_store)):
        try:
            yield check(settings)
        except OpenWeightsError as exc:
            yield Check(name, False, str(exc), "" if settings.supabase_url else _START)


def _settings(settings: Settings) -> Check:
    name = "supabase_url" if settings.supabase_url else "database_url"
    if settings.supabase_url or settings.database_url:
        where = f"ledger {databases.ledger_address(settings)} from {Settings.origin_of(name)}"
        return Check("settings", True, f"home {str(settings.home)!r}, {where}")
    mend = "Run `ow up` to start the local stack, `ow login` to use another, or set `OW_DATABASE_URL`."
    return Check("settings", False, f"no ledger is configured in {str(settings.home)!r}", mend)


def _python(settings: Settings) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    detail = f"{version}, openweights-prefect {metadata.version('openweights-prefect')} ({sys.executable})"
    return Check("python", sys.version_info >= _OLDEST_PYTHON, detail, "Install Python 3.11 or newer.")


def _disk(settings: Settings) -> Check:
    existing = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    mend = "Make room, or set `OW_HOME` to a folder on another disk."
    return Check("disk", free >= LEAST_FREE_BYTES, f"{free / 2**30:.1f} GiB free at {str(existing)!r}", mend)


def _postgresql(settings: Settings) -> Check:
    where = databases.in_use(Folders(settings.home), settings)
    mend = _START if where.is_embedded else "Check `OW_DATABASE_URL` and that the server runs."
    kind = "embedded server" if where.is_embedded else "server of OW_DATABASE_URL"
    up = databases.is_up(where)
    return Check("postgresql", up, f"{kind} {'answers' if up else 'does not answer'}", mend)


def _ledger(settings: Settings) -> Check:
    where = databases.in_use(Folders(settings.home), settings)
    missing = [m.version for m in migrator.status(where.admin_url) if not m.applied]
    if missing:
        detail = f"{len(missing)} migrations are missing, the first is {missing[0]}"
        return Check("ledger", False, detail, "Run `ow db migrate`.")
    ledger = local_ledger(where.ledger_url, settings.organization_id, patience_seconds=5)
    try:
        answer = ledger.call("ping")[0]
    finally:
        ledger.close()
    return Check("ledger", True, f"migrated; organization {answer['organization_id']}")


def _hosted_ledger(settings: Settings) -> Check:
    with closing(connect(settings, patience_seconds=5)) as ledger:
        info = ledger.call("whoami")[0]
    who = info["email"] or info["user_id"]
    return Check("ledger", True, f"answers; {who} is {info['role']} of {info['organization_name']!r}")


def _prefect(settings: Settings) -> Check:
    url = settings.prefect_api_url or prefect_api_url(settings.prefect_port)
    answer = health.ask_prefect(replace(settings, prefect_api_url=url), "/admin/version")
    if answer is not None and answer.status in (401, 403):
        mend = (
            "Set `PREFECT_API_KEY` (Prefect Cloud) or `PREFECT_API_AUTH_STRING` to what the server demands."
        )
        return Check("prefect", False, f"{url} refuses the credential", mend)
    if answer is None or answer.status != 200:
        mend = "Run `ow up`, or set `PREFECT_API_URL` to the API of a running server."
        return Check("prefect", False, f"no Prefect API at {url}", mend)
    return Check("prefect", True, f"version {answer.json()} at {url}")


def _work_pool(settings: Settings) -> Check:
    answer = health.ask_prefect(settings, f"/work_pools/{settings.work_pool}")
    if answer is None or answer.status != 200:
        return Check("work pool", False, f"Prefect has no work pool {settings.work_pool!r}", _START)
    kind = answer.json().get("type")
    mend = "Set `OW_WORK_POOL` to another name, or delete this pool, and run `ow up`."
    return Check("work pool", kind == "runpod", f"{settings.work_pool!r} is of type {kind!r}", mend)


def _worker(settings: Settings) -> Check:
    workers = health.prefect_workers(settings)
    online = [str(worker.get("name")) for worker in workers if health.is_online(worker)]
    detail = f"online: {', '.join(online)}" if online else f"none is online in {settings.work_pool!r}"
    return Check(
        "worker", bool(online), detail, "Run `ow up` or `ow worker`; see `worker.log` in `$OW_HOME/logs`."
    )


def _runpod(settings: Settings) -> Check:
    key = settings.runpod_api_key or stored_api_key(settings)
    url = settings.runpod_api_url
    if not key:
        mend = "Run `ow up` for the simulated RunPod, or set `RUNPOD_API_KEY`."
        return Check("runpod", False, f"no API key for {url}", mend)
    answer = health.ask(f"{url}/pods", headers={"Authorization": f"Bearer {key}"})
    if answer is None:
        return Check("runpod", False, f"{url} does not answer", "Run `ow up`, or check `OW_RUNPOD_API_URL`.")
    if answer.status != 200:
        mend = "Check `RUNPOD_API_KEY` and `OW_RUNPOD_API_URL`."
        return Check("runpod", False, f"{url} answers {answer.status}", mend)
    described = health.ask(f"{url}/openapi.json")
    document = described.json() if described is not None and described.status == 200 else None
    problems = (
        compare(document).problems if isinstance(document, dict) else ["its description cannot be read"]
    )
    if problems:
        return Check("runpod", False, f"{url}: {problems[0]}", "Update openweights-prefect.")
    return Check("runpod", True, f"{url} answers, and takes the requests that we send")


def _job_interpreter(settings: Settings) -> Check:
    mend = "Run `ow up --job-python PATH` with the Python of an environment that has torch and TRL."
    if not settings.job_python:
        return Check("job interpreter", False, "none is set", mend)
    program = f"import {', '.join(JOB_LIBRARIES)}; print(torch.__version__, trl.__version__)"
    try:
        done = subprocess.run(
            [settings.job_python, "-I", "-c", program],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return Check("job interpreter", False, f"{settings.job_python!r}: {exc}", mend)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Check("job interpreter", False, f"{settings.job_python!r}: {last}", mend)
    torch, trl = [*done.stdout.split(), "?", "?"][:2]
    return Check("job interpreter", True, f"{settings.job_python} (torch {torch}, trl {trl})")


def _file_store(settings: Settings) -> Check:
    access = access_tokens(settings)
    store = open_store(settings, bearer=access.bearer if access else None)
    if not isinstance(store, LocalFileStore):
        store.exists(_NO_FILE, settings.organization_id)
        return Check("file store", True, f"{settings.file_store or 'that of the project'} answers")
    folder: Path = settings.files_folder
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"ow doctor")
    except OSError as exc:
        return Check(
            "file store", False, str(exc), "Run `ow up`, or set `OW_FILE_STORE` to a folder you can write to."
        )
    return Check("file store", True, f"{str(folder)!r} can be written")
