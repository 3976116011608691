"""A RunPod that takes the one call that a pod makes, on this machine."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Call(NamedTuple):
    """What was asked for."""

    path: str
    key: str
    agent: str
    body: Any


class RunPodApi:
    """Answers with `status` and `document`, after `seconds`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.status, self.document, self.seconds = 200, {"data": {"podTerminate": None}}, 0.0
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = self.headers
                api.calls.append(Call(self.path, headers["Authorization"], headers["User-Agent"], body))
                time.sleep(api.seconds)
                content = json.dumps(api.document).encode()
                with contextlib.suppress(BrokenPipeError):  # a caller that did not wait
                    self.send_response(api.status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, pod_id: str = "k3m9x1p7q2w8z4") -> dict[str, str]:
        """What RunPod puts into a pod."""
        return {
            "RUNPOD_POD_ID": pod_id,
            "RUNPOD_API_KEY": "rpa_of_this_pod",
            "RUNPOD_API_BASE_URL": self.url,
        }

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
