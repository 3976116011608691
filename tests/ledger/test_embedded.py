from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from openweights_prefect.errors import StackError
from openweights_prefect.ledger import embedded, embedded_layout
from openweights_prefect.ledger.binaries import PostgresBinaries, find_binaries
from openweights_prefect.ledger.embedded import EmbeddedPostgres

AS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can act as another account")

START = """
import sys
from pathlib import Path
from openweights_prefect.ledger import embedded
print(embedded.start(Path(sys.argv[1]), fsync=False).url(database="postgres"), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def new_folder() -> Iterator[Callable[[str], Path]]:
    """Makes folders for servers; those servers and all their data are gone after the test."""
    # Not `tmp_path`: below it root's server would have to move its data away.
    root = Path(tempfile.mkdtemp(prefix="ow-test-"))
    root.chmod(0o755)
    made = []

    def make(name: str) -> Path:
        made.append(root / name)
        return made[-1]

    yield make
    for folder in made:
        embedded.remove(folder)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    folder = Path(tempfile.mkdtemp(prefix="ow-test-"))
    yield embedded.start(folder, fsync=False)
    embedded.remove(folder)


def ask(server: EmbeddedPostgres, query: str) -> object:
    with psycopg.connect(server.url(database="postgres")) as connection:
        row = connection.execute(query).fetchone()
    return row and row[0]


def run(server: EmbeddedPostgres, statement: str) -> None:
    with psycopg.connect(server.url(database="postgres")) as connection:
        connection.execute(statement)


def postmaster_pid(server: EmbeddedPostgres) -> int:
    return int(pid_file(server).read_text().split()[0])


def await_state(state: str, server: EmbeddedPostgres) -> None:
    deadline = time.monotonic() + 20
    while state not in pid_file(server).read_text().split():
        assert time.monotonic() < deadline, f"the server never said that it is {state}"
        time.sleep(0.01)


def pid_file(server: EmbeddedPostgres) -> Path:
    (data,) = embedded_layout.locate(server.folder).data_folders().values()
    return data / "postmaster.pid"


def starter(folder: Path) -> subprocess.Popen[str]:
    """A process that starts the server, prints its address and then waits."""
    command = [sys.executable, "-c", START, str(folder)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def as_daemon(action: Callable[[], object]) -> str:
    """What `action` returns or raises in a forked child that runs as the account `daemon`."""
    # A new interpreter would not do: `daemon` may not be able to reach this one.
    entry = pwd.getpwnam("daemon")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            answer = repr(action())
        except Exception as exc:
            answer = repr(exc)
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as stream:
        return stream.read()


def kill_server(server: EmbeddedPostgres) -> None:
    pid = postmaster_pid(server)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while embedded.is_running(server.folder):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_server_is_private_and_utf8(server: EmbeddedPostgres) -> None:
    """The server listens on a socket only, in folders that other accounts cannot enter."""
    assert ask(server, "show listen_addresses") == ""
    assert ask(server, "show server_encoding") == "UTF8"
    assert ask(server, "show max_connections") == "400"
    layout = embedded_layout.locate(server.folder)
    for folder in (layout.socket_folder, *layout.data_folders().values()):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert layout.base.stat().st_mode & 0o777 == (0o711 if AS_ROOT else 0o700)
    assert layout.log.stat().st_mode & 0o777 == 0o600


def test_every_login_role_may_connect(server: EmbeddedPostgres) -> None:
    """Our account may log in as the roles of the stack, without a password."""
    run(server, "create role authenticator login")
    run(server, "create role prefect login")
    for role in ("authenticator", "prefect"):
        with psycopg.connect(server.url(database="postgres", user=role)) as connection:
            assert connection.execute("select current_user").fetchone() == (role,)


def test_start_adopts_a_running_server(server: EmbeddedPostgres) -> None:
    """Starting twice gives the same server process."""
    pid = postmaster_pid(server)
    assert embedded.start(server.folder) == EmbeddedPostgres(server.folder)
    assert postmaster_pid(server) == pid


def test_stop_and_start_keep_the_data(server: EmbeddedPostgres) -> None:
    """Stopping is idempotent and says whether there was something to stop; the data stays."""
    run(server, "create table kept_by_stop as select 7 as n")
    assert embedded.stop(server.folder)
    assert not embedded.stop(server.folder)
    assert not embedded.is_running(server.folder)
    embedded.start(server.folder, fsync=False)
    assert ask(server, "select n from kept_by_stop") == 7


def test_stop_ends_open_connections(server: EmbeddedPostgres) -> None:
    """A client that stays connected does not keep the server from stopping."""
    with psycopg.connect(server.url(database="postgres")):
        assert embedded.stop(server.folder, timeout_seconds=20)
    embedded.start(server.folder, fsync=False)


def test_start_waits_for_a_shutdown(server: EmbeddedPostgres) -> None:
    """A server that is shutting down is not adopted: its successor is, when it has ended."""
    pid = postmaster_pid(server)
    client = psycopg.connect(server.url(database="postgres"))
    os.kill(pid, signal.SIGTERM)  # A smart shutdown, which waits for the client.
    await_state("stopping", server)
    threading.Timer(0.5, client.close).start()
    embedded.start(server.folder, fsync=False)
    assert postmaster_pid(server) != pid
    assert ask(server, "select 1") == 1


def test_killed_server_starts_again(server: EmbeddedPostgres) -> None:
    """After SIGKILL of the server the next start recovers what was committed."""
    run(server, "create table kept_by_recovery as select 7 as n")
    kill_server(server)
    embedded.start(server.folder, fsync=False)
    assert ask(server, "select n from kept_by_recovery") == 7


def test_number_of_a_killed_server_was_given_to_another_process(server: EmbeddedPostgres) -> None:
    """A stranger that has the number of a killed server is neither taken for it nor harmed."""
    kill_server(server)
    layout = embedded_layout.locate(server.folder)
    stranger = layout.account.spawn(["sleep", "60"], output=subprocess.DEVNULL)
    lock = embedded_layout.socket_file(layout.socket_folder).with_suffix(".5432.lock")
    try:
        for path in (pid_file(server), lock):
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
        assert not embedded.is_running(server.folder)
        assert not embedded.stop(server.folder)
        embedded.start(server.folder, fsync=False)
        assert ask(server, "select 1") == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_data_of_another_major_is_refused(server: EmbeddedPostgres) -> None:
    """Programs of another major version do not touch the data, and the message names both."""
    embedded.stop(server.folder)
    found = find_binaries()
    with pytest.raises(StackError, match=rf"PostgreSQL {found.major}, but .* PostgreSQL 99"):
        embedded.start(server.folder, binaries=PostgresBinaries(found.folder, "99.1"))
    embedded.start(server.folder, fsync=False)


def test_failing_start_shows_the_log(server: EmbeddedPostgres) -> None:
    """The error of a server that cannot start carries what it said."""
    embedded.stop(server.folder)
    options = pid_file(server).with_name("postgresql.conf")
    text = options.read_text()
    options.write_text(f"{text}\nno_such_setting = 1\n")
    with pytest.raises(StackError, match=r"(?s)ended at once.*no_such_setting"):
        embedded.start(server.folder)
    options.write_text(text)
    embedded.start(server.folder, fsync=False)


def test_no_binaries() -> None:
    """Without PostgreSQL the message says how to get it, or how to do without."""
    with pytest.raises(StackError, match=r"(?s)pip install .*\[local\].*OW_DATABASE_URL"):
        find_binaries([Path("/nowhere")])


def test_concurrent_starts_give_one_server(new_folder: Callable[[str], Path]) -> None:
    """Eight processes that start the same new folder at once all get the same server."""
    folder = new_folder("shared")
    starters = [starter(folder) for _ in range(8)]
    answers = [process.communicate(timeout=120) for process in starters]
    assert [process.returncode for process in starters] == [0] * 8, answers
    assert len({out for out, _ in answers}) == 1
    assert (folder / "postgres.log").read_text().count("starting PostgreSQL") == 1


def test_server_outlives_its_killed_starter(new_folder: Callable[[str], Path]) -> None:
    """A starter killed while it creates the data, and one killed afterwards, leave a usable folder."""
    folder = new_folder("killed")
    hasty = starter(folder)
    while not list(folder.glob("new-data-*")):
        assert hasty.poll() is None
        time.sleep(0.005)
    hasty.kill()
    hasty.communicate()
    patient = starter(folder)
    assert patient.stdout is not None
    url = patient.stdout.readline().strip()
    patient.kill()
    patient.communicate()
    psycopg.connect(url).close()
    assert embedded.is_running(folder)


def test_long_folder_path(new_folder: Callable[[str], Path]) -> None:
    """A folder too deep for a socket path gets a short private socket folder."""
    folder = new_folder("deep") / ("x" * 60) / ("y" * 60)
    try:
        server = embedded.start(folder, fsync=False)
        assert ask(server, "select 1") == 1
        socket_folder = embedded_layout.locate(folder).socket_folder
        assert len(str(socket_folder)) < 60
        assert socket_folder.stat().st_mode & 0o777 == 0o700
    finally:
        embedded.remove(folder)
    assert not socket_folder.exists()


def test_squatted_socket_folder_is_refused(new_folder: Callable[[str], Path]) -> None:
    """A link where the short socket folder should be is not followed."""
    folder = new_folder("squatted") / ("x" * 120)
    folder.mkdir(parents=True)
    socket_folder = embedded_layout.locate(folder).socket_folder
    socket_folder.symlink_to(new_folder("elsewhere"))
    new_folder("elsewhere").mkdir()
    with pytest.raises(StackError, match="link"):
        embedded.start(folder, fsync=False)
    socket_folder.unlink()


@needs_root
def test_root_with_a_strict_parent(new_folder: Callable[[str], Path]) -> None:
    """Below a folder that shuts the server's account out, root's data moves and no mode changes."""
    folder = new_folder("home") / ".openweights" / "postgres"
    home = folder.parents[1]
    home.mkdir(mode=0o700)
    try:
        server = embedded.start(folder, fsync=False)
        assert ask(server, "select 1") == 1
        base = Path((folder / "location").read_text().strip())
        assert base.parent == Path("/var/lib/openweights")
        assert home.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_mode & 0o777 == 0o700
        home.chmod(0o755)
        assert embedded_layout.locate(folder).base == base
    finally:
        embedded.remove(folder)
    assert not base.exists()


@needs_root
def test_other_accounts_cannot_connect(server: EmbeddedPostgres) -> None:
    """Another account cannot reach the socket, and would be refused if it could."""
    url = server.url(database="postgres")
    assert "Permission denied" in as_daemon(lambda: psycopg.connect(url))
    socket_folder = embedded_layout.locate(server.folder).socket_folder
    socket_folder.chmod(0o755)
    refused = as_daemon(lambda: psycopg.connect(url))
    socket_folder.chmod(0o700)
    assert "Peer authentication failed" in refused


@needs_root
def test_root_with_binaries_that_the_account_cannot_reach(new_folder: Callable[[str], Path]) -> None:
    """Programs in root's private folder are copied to where the server's account can run them."""
    installed = find_binaries().folder
    private, folder = new_folder("private"), new_folder("served")
    package = installed.parents[1]
    private.mkdir(mode=0o700)
    for part in (package, package.with_suffix(".libs")):
        (private / part.name).symlink_to(part)
    hidden = PostgresBinaries(private / installed.relative_to(package.parent), "18.6")
    server = embedded.start(folder, fsync=False, binaries=hidden)
    assert ask(server, "select 1") == 1
    assert (folder / "postgresql-18.6").is_dir()


@needs_root
def test_ordinary_user(new_folder: Callable[[str], Path]) -> None:
    """An ordinary account runs its own server in its own folder, and can use no other place."""
    home = new_folder("daemon")
    home.mkdir()
    shutil.chown(home, "daemon", "daemon")
    folder = home / "postgres"
    try:
        assert (
            as_daemon(lambda: ask(embedded.start(folder, fsync=False), "select current_user")) == "'postgres'"
        )
        assert as_daemon(lambda: embedded.stop(folder)) == "True"
    finally:
        embedded.stop(folder)
    refused = as_daemon(lambda: embedded.start(Path("/usr/openweights")))
    assert refused.startswith("StackError")
    assert "OW_HOME" in refused


@needs_root
def test_root_does_not_take_another_users_folder(new_folder: Callable[[str], Path]) -> None:
    """Root refuses a folder that another account could change under its feet."""
    home = new_folder("daemon")
    home.mkdir()
    shutil.chown(home, "daemon", "daemon")
    with pytest.raises(StackError, match="belongs to the account"):
        embedded.start(home, fsync=False)
