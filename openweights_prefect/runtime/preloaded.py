"""A process of the job interpreter that has the job's libraries imported and forks the jobs of its pod.

`python -m openweights_prefect.runtime.preloaded SOCKET TOKEN_SHA256 PLAN`. Importing torch and what is built
on it costs many seconds, forking milliseconds. The module `PLAN` says what is imported and what may be run.

Each connection to the socket gets a child; the protocol is in `forking`. This process reads nothing that a
client sends, so that no job's secrets are ever in it; the child does. It stays single-threaded and leaves
GPUs alone, so that a fork is safe, and refuses when that does not hold any more: whoever asked then starts a
process of its own. Linux only; standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import hmac
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from openweights_prefect.runtime import wire
from openweights_prefect.runtime.child import die_with_parent
from openweights_prefect.runtime.forking import ANSWER_SECONDS, UNMARKED

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What differs from run to run, and is read when it is used.
_LATE = {
    wire.RUN_VARIABLE,
    wire.JOB_VARIABLE,
    wire.SOCKET_VARIABLE,
    wire.SPOOL_VARIABLE,
    "N_GPUS",
    "PYTHONPATH",
    "TMPDIR",
}


class Plan(Protocol):
    """What a plan's module has."""

    ENVIRONMENT: Mapping[str, str]
    """What is set while the libraries are imported."""
    MODULES: Collection[str]
    """The programs that may be run, each as `python -m` runs it; they must not be imported by then."""
    LATE: Collection[str]
    """Variables that the libraries read when they are used, and not when they are imported."""

    def preload(self) -> None:
        """Import what the programs need."""

    def why_not_fork(self) -> str | None:
        """Why a fork would not be safe, or is not; asked before it, and in the child after it."""


def main(arguments: Sequence[str]) -> None:
    """Serve forks until the parent ends; in a child, be the program that was ordered."""
    path, token_sha256, name = arguments
    die_with_parent(os.getppid())
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    environment = _given_environment()
    added = {name: value for name, value in os.environ.items() if name not in environment}
    plan: Any = importlib.import_module(name)
    os.environ.update(plan.ENVIRONMENT)
    plan.preload()
    gc.collect()
    gc.freeze()  # A child that looked at all that for garbage would copy it.
    connection = _Server(path, plan).serve()
    program = _Becoming(plan, environment, added, token_sha256).become(connection)
    runpy.run_module(program, run_name="__main__", alter_sys=True)


class _Server:
    """Forks a child for each connection, and kills it when that ends."""

    def __init__(self, path: str, plan: Plan) -> None:
        self._plan = plan
        self._children: dict[int, socket.socket] = {}
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        self._wakers = (self._wake, wake)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(0o177)
        self._listener.bind(f"{path}.new")
        os.umask(umask)
        self._listener.listen()
        Path(f"{path}.new").rename(path)  # Where it is, it answers.
        self._poll = select.poll()
        for each in (self._wake, self._listener.fileno()):
            self._poll.register(each, select.POLLIN)

    def serve(self) -> socket.socket:
        """Serve for ever; returns in children only, each with its connection."""
        while True:
            number, _ = self._poll.poll()[0]  # One at a time: it may close another's descriptor.
            if number == self._wake:
                os.read(self._wake, 4096)
                self._reap()
            elif number == self._listener.fileno():
                connection, _ = self._listener.accept()
                if not self._fork(connection):
                    return connection
            else:
                self._abandon(number)

    def _fork(self, connection: socket.socket) -> bool:
        """Whether this is the parent."""
        connection.settimeout(ANSWER_SECONDS)
        if why := _why_not_fork(self._plan):
            _refuse(connection, why)
            return True
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            die_with_parent(server)
            self._forget()
            return False
        self._children[pid] = connection
        # What is to be read is the child's; here only its end counts.
        self._poll.register(connection, select.POLLRDHUP)
        return True

    def _forget(self) -> None:
        """Be a process that has nothing of the server's."""
        signal.set_wakeup_fd(-1)
        for number in (*_IGNORED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for waker in self._wakers:
            os.close(waker)
        for each in (self._listener, *self._children.values()):
            each.close()

    def _abandon(self, number: int) -> None:
        """Nobody waits for this child any more."""
        self._poll.unregister(number)
        for pid, connection in self._children.items():
            if connection.fileno() == number:
                for end in (os.kill, os.killpg):  # It may not lead a group yet.
                    with contextlib.suppress(ProcessLookupError):
                        end(pid, signal.SIGKILL)

    def _reap(self) -> None:
        for pid in [*self._children]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            connection = self._children.pop(pid)
            with contextlib.suppress(KeyError):  # It was abandoned.
                self._poll.unregister(connection)
            with connection, contextlib.suppress(OSError):
                _send(connection, exit=os.waitstatus_to_exitcode(status))


class _Refused(Exception):
    """The order cannot be carried out here."""


class _Order(NamedTuple):
    """What a client asks for."""

    token: str
    module: str
    arguments: list[str]
    folder: str
    environment: dict[str, str]
    descriptors: list[int]
    """Standard output and standard error."""

    @classmethod
    def read(cls, connection: socket.socket) -> _Order:
        """Read it; ends the process when the client is gone."""
        data, descriptors, *_ = socket.recv_fds(connection, 1 << 16, 2)
        while not data.endswith(b"\n"):
            more = connection.recv(1 << 16)
            if not more:
                os._exit(1)
            data += more
        return cls(**json.loads(data), descriptors=descriptors)


class _Becoming:
    """Turns a fork into what a fresh process of the job would be."""

    def __init__(
        self, plan: Plan, environment: Mapping[str, str], added: Mapping[str, str], token_sha256: str
    ) -> None:
        self._plan = plan
        self._environment = environment
        self._added = added
        self._token_sha256 = token_sha256

    def become(self, connection: socket.socket) -> str:
        """Carry out the order of a connection up to the program, whose name is returned; or end."""
        try:
            order = _Order.read(connection)
            self._check(order)
            self._settle_in(order)
            _send(connection, pid=os.getpid())
            connection.close()
        except Exception as exc:  # Whatever it is, the job can be started otherwise.
            _refuse(connection, str(exc) if isinstance(exc, _Refused) else f"{type(exc).__name__}: {exc}")
            os._exit(1)
        return order.module

    def _check(self, order: _Order) -> None:
        given = hashlib.sha256(order.token.encode()).hexdigest()
        if not hmac.compare_digest(given, self._token_sha256):
            raise _Refused("the token is wrong")
        if order.module not in self._plan.MODULES:
            raise _Refused(f"{order.module!r} is none of {', '.join(self._plan.MODULES)}")
        names = {*order.environment, *self._environment} - _LATE - {*self._plan.LATE}
        differing = [name for name in names if order.environment.get(name) != self._environment.get(name)]
        if differing:
            raise _Refused(f"the libraries were imported with other {', '.join(sorted(differing))}")
        if len(order.descriptors) != 2:
            raise _Refused("an output is missing")
        if why := self._plan.why_not_fork():
            raise _Refused(why)

    def _settle_in(self, order: _Order) -> None:
        _mark(order.environment.get(wire.RUN_VARIABLE, ""))
        paths = self._environment.get("PYTHONPATH", "").split(os.pathsep)
        ours = {"", str(Path.cwd()), *paths}
        installed = [path for path in sys.path if path not in ours]
        wanted = [path for path in order.environment.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:] = [order.folder, *wanted, *installed]
        sys.argv[:] = [order.module, *order.arguments]
        os.chdir(order.folder)
        os.environ.clear()
        os.environ.update({**self._added, **order.environment})
        tempfile.tempdir = None  # It may have been asked for before.
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # The standard library's is fresh; torch begins with a constant.
        for number, descriptor in enumerate(order.descriptors, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _given_environment() -> dict[str, str]:
    """Without what the interpreter adds in the plainest locale."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    pairs = [os.fsdecode(entry).partition("=") for entry in entries if entry]
    return {name: value for name, _, value in pairs}


def _why_not_fork(plan: Plan) -> str | None:
    if threading.active_count() != 1 or len(os.listdir("/proc/self/task")) != 1:  # noqa: PTH208 - no paths needed
        return "a library has started a thread"
    return plan.why_not_fork()


def _mark(run_id: str) -> None:
    """Write the run over that in the environment that /proc shows, by which an agent finds what is left."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    address = libc.getenv(wire.RUN_VARIABLE.encode())
    if address and len(run_id) == len(UNMARKED) and os.environ.get(wire.RUN_VARIABLE) == UNMARKED:
        ctypes.memmove(address, run_id.encode(), len(run_id))


def _refuse(connection: socket.socket, why: str) -> None:
    print(f"A job starts without the preloaded process: {why}.", file=sys.stderr, flush=True)
    with connection, contextlib.suppress(OSError):
        _send(connection, refused=why)


def _send(connection: socket.socket, **message: Any) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
