"""Where the embedded server keeps its files, and which account of the operating system owns them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import re
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from openweights_prefect.errors import StackError

PORT = 5432  # Only names the socket file: the server does not listen on TCP.
LOGIN_ROLES = ("postgres", "authenticator", "prefect")

_SHARED_ROOT = Path("/var/lib/openweights")
# Not `tempfile.gettempdir()`: processes with different TMPDIR must find the same socket.
_SHORT_ROOT = Path("/tmp")
_LONGEST_SOCKET_PATH = 103  # `sun_path` holds 104 bytes on macOS and 108 on Linux, with the final zero.
_DATA_NAME = re.compile(r"data-(\d+)")


@dataclass(frozen=True)
class Account:
    """The account of the operating system that the server runs as."""

    name: str
    uid: int
    gid: int

    def spawn(self, command: Sequence[str | Path], *, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        """Start `command` as this account, detached from our terminal and without our environment."""
        switch = self.uid != os.geteuid()
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            start_new_session=True,
            umask=0o077,
            user=self.uid if switch else None,
            group=self.gid if switch else None,
            extra_groups=[] if switch else None,
        )


@dataclass(frozen=True)
class Layout:
    """The places of one embedded server; `locate()` finds them, `prepare()` creates them."""

    folder: Path  # What the caller named: the lock, the log, and the note where `base` is.
    base: Path  # The data, the socket and the access rules; `folder` itself where possible.
    account: Account

    @property
    def shared(self) -> bool:
        """Whether the server runs as an account other than ours."""
        return self.account.uid != os.geteuid()

    @property
    def log(self) -> Path:
        """What the server and `initdb` print."""
        return self.folder / "postgres.log"

    @property
    def socket_folder(self) -> Path:
        """Folder of the Unix socket: in `base`, or a short private one when that path is too long."""
        folder = self.base / "socket"
        if len(os.fsencode(socket_file(folder))) <= _LONGEST_SOCKET_PATH:
            return folder
        return _SHORT_ROOT / f"ow-postgres-{_digest(self.base)}"

    @property
    def access_rules(self) -> Path:
        """The server's `pg_hba.conf`: who may connect."""
        return self.base / "pg_hba.conf"

    @property
    def account_map(self) -> Path:
        """The server's `pg_ident.conf`: which account may be which role."""
        return self.base / "pg_ident.conf"

    def data(self, major: int) -> Path:
        """The data folder for this major version of PostgreSQL."""
        return self.base / f"data-{major}"

    def data_folders(self) -> dict[int, Path]:
        """The data folders that exist, by major version."""
        return _data_folders(self.base)


def socket_file(folder: Path) -> Path:
    """The socket that PostgreSQL creates in `folder`."""
    return folder / f".s.PGSQL.{PORT}"


def locate(folder: Path) -> Layout:
    """Find the places of the server of `folder`; reads only.

    An ordinary user's server lives in `folder`. PostgreSQL refuses to run as root, so root's server runs as
    `postgres`, or `nobody` where that account is missing, and must reach its data. When a parent of `folder`
    shuts it out (say `/root`, mode 0700), or is not root's own, the data is in `/var/lib/openweights/<hash of
    the path of folder>`, which the file `folder/location` names; no mode of any parent is ever changed. Once
    data exists, it is used where it is.
    """
    folder = folder.expanduser().resolve()
    if os.geteuid() != 0:
        return Layout(folder, folder, _account(os.geteuid()))
    base = _recorded_base(folder)
    if base is None:
        shared = bool(_data_folders(folder)) or _can_share(folder, _server_account())
        base = folder if shared else _SHARED_ROOT / _digest(folder)
    owners = [path.stat().st_uid for path in _data_folders(base).values()]
    return Layout(folder, base, _account(owners[0]) if owners else _server_account())


def prepare(layout: Layout) -> None:
    """Create the folders and the access rules, private to the account and to us; idempotent."""
    if layout.base != layout.folder:
        make_private(layout.folder)
        make_private(layout.base.parent, mode=0o711)
        write_private(layout.folder / "location", f"{layout.base}\n")
    # The account of root's server walks through `base`, but may not list or change it.
    make_private(layout.base, mode=0o711 if layout.shared else 0o700)
    make_private(layout.socket_folder, mode=0o700, owner=layout.account)
    us = pwd.getpwuid(os.geteuid()).pw_name
    pairs = [(name, role) for name in sorted({us, layout.account.name}) for role in LOGIN_ROLES]
    map_lines = [f'openweights "{name}" {role}\n' for name, role in pairs]
    readable = 0o644 if layout.shared else 0o600
    write_private(layout.account_map, "".join(map_lines), mode=readable)
    write_private(
        layout.access_rules, f"local all {','.join(LOGIN_ROLES)} peer map=openweights\n", mode=readable
    )


def make_private(folder: Path, *, mode: int = 0o700, owner: Account | None = None) -> None:
    """Create `folder`, or check that it is a real folder of ours, with exactly this mode and owner."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    uid = os.geteuid() if owner is None else owner.uid
    if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (uid, os.geteuid()):
        raise StackError(
            f"{str(folder)!r} belongs to the account with uid {info.st_uid}, or is a link, so the embedded "
            "PostgreSQL server cannot trust it. Remove it, run as its owner, or set `OW_HOME` to another "
            "folder."
        )
    if owner is not None and info.st_uid != uid:
        os.chown(folder, uid, owner.gid, follow_symlinks=False)
    if stat.S_IMODE(info.st_mode) != mode:
        folder.chmod(mode)


def write_private(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Write `path` so that a reader sees the old text or the new, never half of it."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.chmod(mode)
    unfinished.replace(path)


def _recorded_base(folder: Path) -> Path | None:
    try:
        return Path((folder / "location").read_text(encoding="utf-8").rstrip("\n"))
    except FileNotFoundError:
        return None


def _data_folders(base: Path) -> dict[int, Path]:
    matches = [(_DATA_NAME.fullmatch(path.name), path) for path in base.glob("data-*")]
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def _account(uid: int) -> Account:
    try:
        return _of(pwd.getpwuid(uid))
    except KeyError as exc:
        raise StackError(
            f"The account with uid {uid} has no name on this machine, and PostgreSQL needs one. "
            "Add it to /etc/passwd, run as another user, or set `OW_DATABASE_URL` to a server of your own."
        ) from exc


def _of(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _server_account() -> Account:
    # `nobody` may be shared with other services, so PostgreSQL's own account comes first.
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return _of(pwd.getpwnam(name))
    raise StackError(
        "PostgreSQL refuses to run as root, and neither `postgres` nor `nobody` exists here to run it as. "
        "Add one of them, run as an ordinary user, or set `OW_DATABASE_URL` to a server of your own."
    )


def _can_share(folder: Path, account: Account) -> bool:
    """Whether `account` can walk to `folder`, and nobody but root can exchange a parent meanwhile."""
    for parent in folder.parents:
        try:
            info = parent.stat()
        except FileNotFoundError:
            continue  # `start()` creates the parents before it asks.
        walkable = bool(info.st_mode & (0o010 if info.st_gid == account.gid else 0o001))
        writable = bool(info.st_mode & 0o022) and not info.st_mode & stat.S_ISVTX
        if info.st_uid != 0 or writable or not walkable:
            return False
    return True


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
