"""A process that has everything imported and forks a child per run.

Importing Prefect costs seconds, forking milliseconds. It stays single-threaded and never opens a
connection, so that a fork is safe. Protocol on file descriptor `--fd`: JSON lines; in: `{"run": id,
"flow_run": {...}, "flow": name | null, "environment": {...}, "output": path}`; out: `{"ready": true}`,
`{"run": id, "pid": n}` and `{"run": id, "exit": code}`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import select
import signal
import socket
import ssl
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from openweights_prefect import bundle
from openweights_prefect.pod.redaction import Redaction, redact_logging
from openweights_prefect.runtime import wire
from openweights_prefect.runtime.child import die_with_parent

_DRAIN_SECONDS = 5.0
_UNNAMED = ("deployment_id", "work_queue_id", "work_pool_name")


def main() -> None:
    """Serve forks until the agent closes its end."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(os.getppid())
    flows = _preload()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: dict[int, str] = {}
    _send(channel, {"ready": True})
    pending = b""
    while True:
        readable = select.select([channel.fileno(), wake_read], [], [])[0]
        if wake_read in readable:
            os.read(wake_read, 4096)
            _reap(channel, children)
        if channel.fileno() in readable:
            data = channel.recv(1 << 20)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = _fork(order, flows, channel)
                children[pid] = order["run"]
                _send(channel, {"run": order["run"], "pid": pid})


def _preload() -> dict[str, Any]:
    """Import the engine, with what it would import in each run, and every flow of ours."""
    import certifi
    import prefect.client.orchestration
    import prefect.events.worker
    import prefect.flow_engine
    import prefect.logging.handlers
    import prefect.results
    import prefect.task_engine
    import prefect.utilities.visualization
    from prefect.flows import load_flow_from_entrypoint
    from prefect.settings import get_current_settings

    from openweights_prefect.orchestration.results import keep_results_in_store

    _share_tls_context(
        prefect.client.orchestration, get_current_settings().api.ssl_cert_file or certifi.where()
    )
    folder = bundle.deploy_root() / "flows"
    flows: dict[str, Any] = {
        path.stem: load_flow_from_entrypoint(f"{path}:{path.stem}") for path in folder.glob("*.py")
    }
    # Prefect never runs a flow again that completed with a result that is kept.
    return {
        name: keep_results_in_store(flow.with_options(persist_result=True)) for name, flow in flows.items()
    }


def _share_tls_context(clients: Any, certificates: str) -> None:
    """Load the certificates once, before any fork: Prefect's clients would do it three times a run."""
    shared = functools.cache(ssl.create_default_context)
    shared(cafile=certificates)
    clients.ssl = SimpleNamespace(**{**vars(ssl), "create_default_context": shared})


def _fork(order: dict[str, Any], flows: dict[str, Any], channel: socket.socket) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        channel.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setpgid(0, 0)
        die_with_parent(parent)
        output = os.open(order["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(order["environment"])
        os.chdir(Path(order["output"]).parent)
        code = _execute(order, flows.get(order["flow"] or ""))
    except BaseException:
        import traceback  # only a failing child needs it

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _execute(order: dict[str, Any], flow: Any) -> int:
    """Run a flow run with Prefect's own engine, as `python -m prefect.engine` does."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.engine import handle_engine_signals
    from prefect.events.worker import EventsWorker
    from prefect.flow_engine import load_flow, run_flow
    from prefect.logging.handlers import APILogWorker

    from openweights_prefect.orchestration.results import keep_results_in_store

    try:
        with handle_engine_signals(UUID(order["run"])):
            flow_run = FlowRun.model_validate(order["flow_run"])
            if flow is None:
                for name in ("prefect.flow_runs", "prefect.task_runs"):
                    logging.getLogger(name).setLevel(logging.INFO)  # Its author wants to see what he logs.
                _take_secrets()
            if flow is not None:
                # A run that names its deployment watches for its suspension (0.3 s), and one that names its
                # pool asks for it to describe each event. A job is never suspended.
                flow_run = flow_run.model_copy(update=dict.fromkeys(_UNNAMED))
            result = run_flow(flow or keep_results_in_store(load_flow(flow_run)), flow_run=flow_run)
            if asyncio.iscoroutine(result):
                asyncio.run(result)
        return 0
    except SystemExit as exc:
        return int(exc.code or 0) if not isinstance(exc.code, str) else 1
    finally:
        for service in (EventsWorker, APILogWorker):  # task runs reach Prefect as events
            service.drain_all(timeout=_DRAIN_SECONDS)


def _take_secrets() -> None:
    """A flow of the user's own, which has no entrypoint, reads them where any program does.

    What it logs is redacted here, for Prefect gets it straight from this process.
    """
    if values := wire.request("secrets")["values"]:
        os.environ.update(values)
        redact_logging(Redaction(values.values()))


def _reap(channel: socket.socket, children: dict[int, str]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if run := children.pop(pid, None):
            _send(channel, {"run": run, "exit": os.waitstatus_to_exitcode(status)})


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
