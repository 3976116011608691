"""A model hub on 127.0.0.1 with the HTTP API that `huggingface_hub` calls, and faults on request.

Repositories, regular and LFS files (in one part or several), commits, listings and downloads. Storage has
signed addresses, as the real one: a token that is sent there is recorded as a leak.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SIGNATURE = "X-Amz-Signature=5eC2e7"


@dataclass(frozen=True)
class Fault:
    """What the double does instead of its work, or after it."""

    status: int | None = None  # answer with it
    headers: tuple[tuple[str, str], ...] = ()
    body: dict[str, Any] = field(default_factory=lambda: {"error": "scripted"})
    cut_after: int | None = None  # read so many bytes of the request, then reset the connection
    lose_answer: bool = False  # do the work, then reset the connection
    silent_seconds: float = 0.0  # wait so long before the answer, or until the double closes


@dataclass
class Repository:
    """One model repository; `files` is its only branch."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    commits: list[list[str]] = field(default_factory=list)


class HubDouble:
    """`with HubDouble(token=...) as hub`: the hub lives at `hub.endpoint`."""

    def __init__(
        self, *, token: str, namespaces: tuple[str, ...] = ("org",), part_size: int | None = None
    ) -> None:
        self.token = token
        self.role = "write"
        self.namespaces = namespaces
        self.part_size = part_size
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.leaks: list[str] = []
        self._faults: list[tuple[re.Pattern[str], list[Fault]]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubDouble:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def script(self, pattern: str, *faults: Fault) -> None:
        """The next requests whose `METHOD /path` matches meet these faults, one each."""
        self._faults.append((re.compile(pattern), list(faults)))

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def next_fault(self, request: str) -> Fault:
        with self._lock:
            self.requests.append(request)
            for pattern, faults in self._faults:
                if faults and pattern.search(request):
                    return faults.pop(0)
        return Fault()

    def wait(self, seconds: float) -> None:
        self._closing.wait(seconds)


class _Refused(Exception):
    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status)
        self.status, self.body = status, body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubDouble

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        address = urlsplit(self.path)
        self.route, self.query = unquote(address.path), parse_qs(address.query)
        fault = self.hub.next_fault(f"{self.command} {self.route}")
        length = int(self.headers.get("Content-Length") or 0)
        if fault.cut_after is not None:
            self._read(min(length, fault.cut_after))
            return self._reset()
        self.content = self._read(length)
        self.hub.wait(fault.silent_seconds)
        if fault.status is not None:
            return self._answer(fault.status, fault.body, dict(fault.headers))
        try:
            self._authorize()
            answer = self._dispatch()
        except _Refused as refused:
            return self._answer(refused.status, refused.body)
        if fault.lose_answer:
            return self._reset()
        if isinstance(answer, bytes):
            return self._answer(200, answer, {"X-Repo-Commit": "0" * 40, "ETag": f'"{_sha1(answer)}"'})
        body, headers = answer if isinstance(answer, tuple) else (answer, {})
        return self._answer(200, body, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(length)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.wfile = open("/dev/null", "wb")  # noqa: SIM115, PTH123 - closed by the server

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # who waited no longer
                self.wfile.write(content)

    def _authorize(self) -> None:
        sent = self.headers.get("Authorization")
        if self.route.startswith("/storage/"):
            if sent is not None:
                self.hub.leaks.append(self.path)
            return
        if sent != f"Bearer {self.hub.token}":
            raise _Refused(401, {"error": f"Invalid credentials in Authorization header: {sent}"})

    def _dispatch(self) -> Any:
        for method, pattern, work in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and method == self.command:
                return work(self, *match.groups())
        raise _Refused(404, {"error": f"{self.command} {self.route} is not part of the double"})

    def _json(self) -> Any:
        return json.loads(self.content)

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise _Refused(404, {"error": "Repository not found"})
        return self.hub.repositories[name]

    def whoami(self) -> Any:
        return {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": self.hub.role}}}

    def create(self) -> Any:
        wish = self._json()
        name = f"{wish['organization']}/{wish['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if wish["organization"] not in self.hub.namespaces:
            raise _Refused(403, {"error": f"You don't have the rights to create a model under {name!r}"})
        if name in self.hub.repositories:
            raise _Refused(409, {"error": "You already created this model repo", "url": url})
        self.hub.repositories[name] = Repository(private=wish.get("visibility") == "private")
        return {"url": url, "name": name, "id": "0" * 24}

    def validate_yaml(self) -> Any:
        if not re.match(r"---\n.*\n---\n", self._json()["content"], re.DOTALL):
            raise _Refused(400, {"errors": [{"message": "no front matter"}], "warnings": []})
        return {"errors": [], "warnings": []}

    def info(self, name: str) -> Any:
        repository = self._repository(name)
        siblings = [{"rfilename": path} for path in repository.files]
        more = {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
        return {
            "_id": "0",
            "id": name,
            "sha": "0" * 40,
            "private": repository.private,
            "siblings": siblings,
            **more,
        }

    def tree(self, name: str) -> Any:
        return [self._entry(self._repository(name), path) for path in self._repository(name).files]

    def _entry(self, repository: Repository, path: str) -> dict[str, Any]:
        content = repository.files[path]
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": _git_hash(content),
        }
        if path in repository.large:
            entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    def paths_info(self, name: str) -> Any:
        repository = self._repository(name)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = self._json()["paths"]
        else:
            paths = parse_qs(self.content.decode())["paths"]
        return [self._entry(repository, path) for path in paths if path in repository.files]

    def preupload(self, name: str) -> Any:
        repository = self._repository(name)
        answers = []
        for file in self._json()["files"]:
            path, content = file["path"], repository.files.get(file["path"])
            oid = None
            if content is not None:
                oid = _sha256(content) if path in repository.large else _git_hash(content)
            mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def batch(self, name: str) -> Any:
        self._repository(name)
        return {"transfer": "basic", "objects": [self._upload(each) for each in self._json()["objects"]]}, {
            "Content-Type": "application/vnd.git-lfs+json"
        }

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        verify = {"href": f"{self.hub.endpoint}/verify"}
        part = self.hub.part_size
        if part is None or size <= part:
            upload: dict[str, Any] = {"href": f"{self.hub.endpoint}/storage/{oid}/0?{SIGNATURE}"}
        else:
            numbers = range(1, -(-size // part) + 1)
            parts = {f"{n:05d}": f"{self.hub.endpoint}/storage/{oid}/{n}?{SIGNATURE}" for n in numbers}
            upload = {
                "href": f"{self.hub.endpoint}/storage/{oid}/complete?{SIGNATURE}",
                "header": {"chunk_size": str(part), **parts},
            }
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def store(self, oid: str, number: str) -> Any:
        if number == "0":
            if _sha256(self.content) != oid:
                raise _Refused(400, {"error": "BadDigest"})
            self.hub.objects[oid] = self.content
        else:
            self.hub.parts.setdefault(oid, {})[int(number)] = self.content
        return {}, {"ETag": f'"{_sha1(self.content)}"'}

    def complete(self, oid: str) -> Any:
        parts = self.hub.parts[oid]
        content = b"".join(parts[each["partNumber"]] for each in self._json()["parts"])
        if _sha256(content) != oid:
            raise _Refused(400, {"error": "BadDigest"})
        self.hub.objects[oid] = content
        return {}

    def verify(self) -> Any:
        wanted = self._json()
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Refused(422, {"error": "not stored"})
        return {}

    def commit(self, name: str) -> Any:
        repository = self._repository(name)
        lines = [json.loads(line) for line in self.content.splitlines()]
        missing = [
            line
            for line in lines
            if line["key"] == "lfsFile" and line["value"]["oid"] not in self.hub.objects
        ]
        if missing:
            raise _Refused(400, {"error": "an LFS object of the commit was not uploaded"})
        changed = []
        for key, value in ((line["key"], line["value"]) for line in lines if line["key"] != "header"):
            path = value["path"]
            changed.append(path)
            if key == "deletedFile":
                del repository.files[path]
            elif key == "lfsFile":
                repository.files[path] = self.hub.objects[value["oid"]]
                repository.large.add(path)
            else:
                repository.files[path] = base64.b64decode(value["content"])
                repository.large.discard(path)
        repository.commits.append(sorted(changed))
        oid = f"{len(repository.commits):040x}"
        return {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True}

    def resolve(self, name: str, path: str) -> Any:
        files = self._repository(name).files
        if path not in files:
            raise _Refused(404, {"error": "Entry not found"})
        return files[path]


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/models/{_NAME}(?:/revision/main)?", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/main", _Handler.tree),
    ("POST", f"/api/models/{_NAME}/paths-info/main", _Handler.paths_info),
    ("POST", f"/api/models/{_NAME}/preupload/main", _Handler.preupload),
    ("POST", f"/{_NAME}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/(\w+)/(\d+)", _Handler.store),
    ("POST", r"/storage/(\w+)/complete", _Handler.complete),
    ("POST", "/verify", _Handler.verify),
    ("POST", f"/api/models/{_NAME}/commit/main", _Handler.commit),
    ("GET", f"/{_NAME}/resolve/\\w+/(.+)", _Handler.resolve),
    ("HEAD", f"/{_NAME}/resolve/\\w+/(.+)", _Handler.resolve),
]


def _handler(hub: HubDouble) -> type[_Handler]:
    return type("Handler", (_Handler,), {"hub": hub})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _git_hash(content: bytes) -> str:
    return _sha1(b"blob %d\x00" % len(content) + content)
