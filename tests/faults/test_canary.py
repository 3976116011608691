"""Known values go through every feature; afterwards they are nowhere but where they belong.

`PLANTED` goes through the same features and is no secret: the search must find it in every place that it
looks at, else it proves nothing.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import mmap
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import psutil
import psycopg
import pytest
from local_stack import Stack, eventually
from psycopg import sql
from recording_proxy import RecordingProxy

from openweights_prefect import JobFailed, OpenWeights
from openweights_prefect.ledger import embedded
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.stack.addresses import write_private
from openweights_prefect.stack.service import HOME_VARIABLE
from openweights_prefect.stack.services import foreground_worker

pytestmark = pytest.mark.stack

_SAMPLE_SECONDS = 0.03
_PAGE = 200

# Where a value may be, and why. Everything else is a leak.
_BELONG = {
    r"home/secrets\.key": {"master key"},  # it is the key file
    r"home/runpod_api_key": {"RunPod key"},  # the stack keeps the key of its simulated account here, 0600
    # RunPod's own memory: who may call it, and what its pods were created with.
    r"home/simulator\.json": {"RunPod key"},
    r"home/simulator/state\.json": {"bootstrap token"},
    r"home/simulator/pods/[^/]+/disk/\.session": {
        "session secret"
    },  # the pod's identity, 0600, on its own disk
    # The container's first process is started by RunPod with the pod's environment.
    r"environment of a pod's first process": {"bootstrap token"},
    r"environment of the worker": {"RunPod key"},  # the one process that buys pods
    r"environment of a user's script": {"API token"},
    r"environment of the command of a job": {"secret", "secret line 1", "secret line 2"},
    r"HTTP to RunPod": {"RunPod key", "bootstrap token"},  # its Authorization, and a pod's environment
}

_JOB = """
import base64, os, sys, urllib.parse
from pathlib import Path
from openweights_prefect import OpenWeights

ow, value, planted = OpenWeights(), os.environ["CANARY_TOKEN"], os.environ["PLANTED"]
for text in (value, planted):
    print("printed", text, base64.b64encode(text.encode()).decode(), urllib.parse.quote(text, safe=""))
    print("on stderr", text, file=sys.stderr)
    ow.run.log({"text": f"logged {text}", text: [text, {"deep": text}], "progress": 0.5})
    ow.run.log({"loss": 0.1, "step": 1, text: 2.5})
    Path("uploads", f"{text}.txt").write_text("nothing secret")
    print(text[: len(text) // 2], end="", flush=True)
    print(text[len(text) // 2 :], flush=True)
print(os.environ["CANARY_KEY"])
raise RuntimeError(f"failed with {value} and {planted}")
"""
_OWN_FLOW = """
import os
from prefect import flow, get_run_logger

@flow
def own() -> str:
    get_run_logger().warning("logged %s", os.environ["CANARY_TOKEN"])
    print("printed", os.environ["CANARY_KEY"])
    return "done"
"""


_SCRIPT = """
from openweights_prefect import OpenWeights

with OpenWeights() as ow:
    ow.run.log({"names": [secret.name for secret in ow.secrets.list()]})
    ow.run.flush()
"""


class Find(NamedTuple):
    """A value, and where it was."""

    value: str
    place: str


class Canaries:
    """The known values by name, each in the forms in which it may appear."""

    def __init__(self) -> None:
        self.values: dict[str, set[str]] = {}
        self._forms: list[tuple[str, bytes]] = []

    def add(self, name: str, value: str) -> str:
        """Look for one more value."""
        values = self.values.setdefault(name, set())
        if value not in values:
            values.add(value)
            self._forms += [(name, form) for form in _forms(value)]
        return value

    def among(self, content: bytes | mmap.mmap) -> set[str]:
        """The names of those that are in the content."""
        return {name for name, form in self._forms if content.find(form) >= 0}


def _forms(value: str) -> set[bytes]:
    plain = value.encode()
    encoded = {base64.b64encode(plain), base64.urlsafe_b64encode(plain)}
    return {plain, plain.hex().encode(), quote(value, safe="").encode(), json.dumps(value)[1:-1].encode()} | {
        text.rstrip(b"=")[:-1] for text in encoded
    }


class Sampler:
    """Looks at the arguments and the environment of every process, again and again."""

    def __init__(self, canaries: Canaries) -> None:
        self.found: set[Find] = set()
        self.rounds = 0
        self._canaries = canaries
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            for pid in psutil.pids():
                with contextlib.suppress(OSError):
                    self._look(Path(f"/proc/{pid}"))
            self.rounds += 1

    def _look(self, process: Path) -> None:
        arguments = (process / "cmdline").read_bytes()
        self.found |= {
            Find(name, f"arguments: {arguments!r:.300}") for name in self._canaries.among(arguments)
        }
        environment = (process / "environ").read_bytes()
        if names := self._canaries.among(environment):
            place = _who(arguments, environment)
            self.found |= {Find(name, f"environment of {place}") for name in names}


def _who(arguments: bytes, environment: bytes) -> str:
    if b"OW_AGENT_SOCKET=" in environment:
        return "the command of a job"
    if arguments.endswith(b"\0-c\0" + _SCRIPT.encode() + b"\0"):
        return "a user's script"
    if b"openweights_prefect.pod\0" in arguments:
        return "a pod's first process"
    if b"\0worker\0start\0" in arguments:
        return "the worker"
    return repr(arguments[:300])


class Watched(NamedTuple):
    """A stack whose worker and pods reach Prefect, and whose worker reaches RunPod, through recorders."""

    stack: Stack
    prefect: RecordingProxy
    runpod: RecordingProxy


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """A stack of its own, for its addresses are changed."""
    parent = Path(tempfile.mkdtemp(prefix="ow-canary-"))
    parent.chmod(0o755)  # PostgreSQL of root runs as another account
    stack = Stack(parent / "home")
    stack.environment["OW_POD_IDLE_SECONDS"] = (
        "600"  # pods, with what is on their disks, live until the search
    )
    worker: subprocess.Popen[bytes] | None = None
    try:
        stack.up()
        settings = stack.settings
        stack.kill(stack.pid("worker"))
        prefect, runpod = RecordingProxy(settings.prefect_port), RecordingProxy(settings.simulator_port)
        addresses = json.loads((stack.home / "stack.json").read_text(encoding="utf-8"))
        addresses["prefect_api_url"] = f"http://127.0.0.1:{prefect.port}/api"
        write_private(stack.home / "stack.json", json.dumps(addresses))
        recorded = dataclasses.replace(settings, prefect_api_url=addresses["prefect_api_url"])
        argv, variables = foreground_worker(recorded, pool=None, name="watched")
        environment = {
            **stack.environment,
            **variables,
            "OW_RUNPOD_API_URL": f"http://127.0.0.1:{runpod.port}/v2",
            "PREFECT_HOME": str(stack.home / "prefect"),
            HOME_VARIABLE: str(stack.home),
        }
        with (stack.home / "logs" / "worker-watched.log").open("wb") as log:
            worker = subprocess.Popen(argv, env=environment, stdout=log, stderr=log, cwd=stack.home)
        yield Watched(stack, prefect, runpod)
    finally:
        if worker is not None:
            worker.terminate()
            worker.wait(30)
        stack.down()
        embedded.remove(stack.home / "postgres")
        shutil.rmtree(parent)


def test_known_values_are_only_where_they_belong(watched: Watched, tmp_path: Path) -> None:
    """Through jobs, flows, tokens, invitations and rotation; in databases, files, processes and HTTP."""
    stack, canaries = watched.stack, Canaries()
    planted = canaries.add("PLANTED", f"PLANTED{secrets.token_hex(12)}")
    with Sampler(canaries) as sampler:
        _use_everything(stack, canaries, planted, tmp_path)
        found = _in_databases(stack, canaries)
    found |= sampler.found
    found |= _in_files(stack.home, canaries)
    found |= _in_prefect(stack, canaries)
    for name, proxy in (("Prefect", watched.prefect), ("RunPod", watched.runpod)):
        found |= {Find(value, f"HTTP to {name}") for value in canaries.among(proxy.recorded())}
    assert sampler.rounds > 10
    _must_be_found(watched, {find.place for find in found if find.value == "PLANTED"}, found)
    leaks = [find for find in sorted(found) if find.value != "PLANTED" and not _belongs(find)]
    assert leaks == [], "\n".join(map(str, leaks))


def _must_be_found(watched: Watched, places: set[str], found: set[Find]) -> None:
    """The search sees what is there: the value that is no secret, and the secrets where they belong."""
    for wanted in (
        r"table ledger\.jobs",
        r"table ledger\.events",
        r"table ledger\.log_chunks",
        r"table public\.flow_run of prefect",
        r"table public\.log of prefect",
        r"table public\.artifact of prefect",
        r"home/files/.*",
        r"home/postgres/.*",
        r"arguments: .*",
        r"environment of the command of a job",
        r"HTTP to Prefect",
        r"Prefect's API: .*logs.*",
        r"Prefect's API: .*artifacts.*",
        r"Prefect's API: .*flow_runs.*",
    ):
        assert any(re.fullmatch(wanted, place) for place in places), (wanted, sorted(places))
    assert b"ow-" in watched.runpod.recorded()
    unseen = {(place, value) for place, values in _BELONG.items() for value in values} - {
        (place, find.value) for find in found for place in _BELONG if re.fullmatch(place, find.place)
    }
    assert unseen == set()


def _belongs(find: Find) -> bool:
    return any(re.fullmatch(place, find.place) and find.value in values for place, values in _BELONG.items())


# What is done ---------------------------------------------------------------------------------------------


def _use_everything(stack: Stack, canaries: Canaries, planted: str, folder: Path) -> None:
    """Everything that handles a secret of anybody."""
    canaries.add("RunPod key", (stack.home / "runpod_api_key").read_text(encoding="utf-8").strip())
    token = canaries.add("API token", f"ow_{secrets.token_urlsafe(32)}")
    made = {"token_name": "canary", "hash": hash_secret(token), "prefix": token[:8], "token_role": "admin"}
    [answer] = stack.call("create_token", **made)
    assert answer["outcome"] == "created"
    code = canaries.add("invitation", f"owi_{secrets.token_urlsafe(32)}")
    stack.call("create_invitation", code_hash=hash_secret(code))
    with OpenWeights(auth_token=token, settings=stack.settings) as ow:
        _store_secrets(ow, canaries, stack)
        script = {**stack.environment, "OPENWEIGHTS_API_KEY": token}
        subprocess.run([sys.executable, "-c", _SCRIPT], env=script, check=True, timeout=60)
        _run_job(ow, stack, canaries, planted)
        _run_flow(ow, stack, folder)
        assert ow.secrets.rotate() == 3
        _note_keys(stack, canaries)
        assert ow.secrets.get("CANARY_TOKEN") in canaries.values["secret"]
        _run_job(ow, stack, canaries, planted)


def _store_secrets(ow: OpenWeights, canaries: Canaries, stack: Stack) -> None:
    value = canaries.add("secret", f"canary{secrets.token_hex(16)}")
    lines = [canaries.add(f"secret line {n}", f"canary-line+/{secrets.token_hex(16)}") for n in (1, 2)]
    ow.secrets.set("CANARY_TOKEN", value)
    ow.secrets.set("CANARY_KEY", "\n".join(lines) + "\n")
    ow.secrets.set("UNUSED_TOKEN", canaries.add("secret that no job names", f"canary{secrets.token_hex(16)}"))
    _note_keys(stack, canaries)


def _note_keys(stack: Stack, canaries: Canaries) -> None:
    for keys in json.loads((stack.home / "secrets.key").read_text(encoding="utf-8"))[
        "organizations"
    ].values():
        for key in keys["keys"].values():
            canaries.add("master key", key)


def _run_job(ow: OpenWeights, stack: Stack, canaries: Canaries, planted: str) -> None:
    """A job that shows its secrets in every way by which something leaves a pod."""
    program = f"cat > job.py <<'END'\n{_JOB}\nEND\n"
    command = f"{program}python -c 'import time; time.sleep(1)' {planted}; python job.py"
    job = ow.command.create(
        tag=stack.tag("canary"),
        command=command,
        env={"PLANTED": planted},
        secrets=["CANARY_TOKEN", "CANARY_KEY"],
    )
    eventually(lambda: job.refresh().status == "in_progress", 90, "the job runs")
    _note_pods(stack, canaries)
    with pytest.raises(JobFailed):
        job.wait(timeout=90, progress=False)
    assert "RuntimeError: failed with ***" in "\n".join(job.logs())
    stack.agrees(job)
    eventually(lambda: not _run_folders(stack), 30, "the pod removes the folder of the run")


def _run_folders(stack: Stack) -> list[Path]:
    return [*stack.home.glob("simulator/pods/*/disk/runs/*")]


def _note_pods(stack: Stack, canaries: Canaries) -> None:
    """The secrets of the pods, which nobody but they and RunPod knows."""
    for pod in json.loads((stack.home / "simulator" / "state.json").read_text(encoding="utf-8"))["pods"]:
        if "OW_POD_TOKEN" in pod["env"]:
            canaries.add("bootstrap token", pod["env"]["OW_POD_TOKEN"])
    for path in stack.home.glob("simulator/pods/*/disk/.session"):
        assert path.stat().st_mode & 0o077 == 0
        canaries.add("session secret", path.read_text(encoding="utf-8"))
    assert canaries.values["session secret"]


def _run_flow(ow: OpenWeights, stack: Stack, folder: Path) -> None:
    """A flow of a user's own, whose process has the secrets and speaks to Prefect itself."""
    folder.chmod(0o755)
    (folder / "own.py").write_text(_OWN_FLOW, encoding="utf-8")
    with stack.prefect() as client:
        deployment = client.create_deployment(
            client.create_flow_from_name("own"),
            name="canary",
            entrypoint="own.py:own",
            work_pool_name=stack.settings.work_pool,
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}],
        )
        variables = {"requires_vram_gb": 0, "secrets": ["CANARY_TOKEN", "CANARY_KEY"]}
        run = client.create_flow_run_from_deployment(deployment, job_variables=variables)
        eventually(lambda: stack.state_of(str(run.id)) in ("COMPLETED", "FAILED", "CRASHED"), 90, "it ends")
        state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_completed(), state.message
    job = ow.jobs.retrieve(f"flow-{run.id}")
    eventually(lambda: job.refresh().status == "completed", 30, "the ledger says so")


# Where is looked ------------------------------------------------------------------------------------------


def _in_databases(stack: Stack, canaries: Canaries) -> set[Find]:
    """Every column of every table as text, and the statements that the server remembers."""
    server = embedded.EmbeddedPostgres(stack.home / "postgres")
    found = set()
    for database, suffix in (("openweights", ""), ("prefect", " of prefect")):
        with psycopg.connect(server.url(database=database)) as connection:
            tables = connection.execute(
                "select schemaname, tablename from pg_tables where schemaname not in "
                "('pg_catalog', 'information_schema')"
            ).fetchall()
            assert len(tables) > 10
            for schema, table in [*tables, ("pg_catalog", "pg_stat_activity")]:
                query = sql.SQL("select t::text from {} as t").format(sql.Identifier(schema, table))
                content = "\n".join(row for (row,) in connection.execute(query)).encode()
                # As text, a row quotes what its columns hold once more.
                names = canaries.among(content) | canaries.among(content.replace(b"\\\\", b"\\"))
                found |= {Find(name, f"table {schema}.{table}{suffix}") for name in names}
    return {find for find in found if not (find.value == "PLANTED" and "pg_stat" in find.place)}


def _in_files(home: Path, canaries: Canaries) -> set[Find]:
    """Every file below the home of the stack, those of PostgreSQL included."""
    found = set()
    for path in home.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_symlink() or not path.is_file() or path.stat().st_size == 0:
                continue
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                place = f"home/{path.relative_to(home)}"
                found |= {Find(name, place) for name in canaries.among(content)}
    return found


def _in_prefect(stack: Stack, canaries: Canaries) -> set[Find]:
    """What Prefect's API shows to everybody who can reach it."""
    found = set()
    kinds = ("flow_runs", "task_runs", "logs", "artifacts", "deployments", "work_pools", "block_documents")
    with httpx.Client(base_url=stack.settings.prefect_api_url, trust_env=False, timeout=30) as client:
        for kind in kinds:
            offset = 0
            while page := client.post(f"/{kind}/filter", json={"limit": _PAGE, "offset": offset}).json():
                assert isinstance(page, list), page
                found |= {
                    Find(name, f"Prefect's API: {kind}") for name in canaries.among(json.dumps(page).encode())
                }
                offset += _PAGE
        events = _events(client)
        found |= {Find(name, "Prefect's API: events") for name in canaries.among(json.dumps(events).encode())}
        assert len(events) > 10
    return found


def _events(client: httpx.Client) -> list[Mapping[str, Any]]:
    answer = client.post("/events/filter", json={"limit": 50}).json()
    events: list[Mapping[str, Any]] = [*answer["events"]]
    while answer.get("next_page"):
        answer = client.get(f"/events/filter/next?{answer['next_page'].partition('?')[2]}").json()
        events += answer["events"]
    return events
