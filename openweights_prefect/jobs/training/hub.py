"""Pushes a result to Hugging Face: one commit, made again until the hub has all of it."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from huggingface_hub.utils._http import default_client_factory

from openweights_prefect.errors import OpenWeightsError

if TYPE_CHECKING:
    from openweights_prefect.jobs.training.params import TrainingParams

TRIES = 8
PATIENCE_SECONDS = 900.0
"""How long nothing may get through to the hub: a pod costs money while it waits, and the result is kept."""
FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 120.0
CONNECT_SECONDS = 20.0
ANSWER_SECONDS = 120.0
"""How long one request may be silent; `huggingface_hub` itself would wait for ever."""

_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
# What an earlier push may have left: an adapter beside a merged model, or too many shards, load as neither.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")
_NOT_PUSHED = ["checkpoint-*", "checkpoint-*/**", "*.unfinished", "*.unfinished/**"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class PushError(OpenWeightsError):
    """The result is not on Hugging Face; the message names what to do. The result itself is not harmed."""


def push(
    folder: Path,
    params: TrainingParams,
    *,
    token: str | None,
    card: str,
    endpoint: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Make `params.finetuned_model_id` hold the files of `folder` and the card; returns its address.

    What the hub has already is not sent again, within a call and between calls. Weights of an earlier push
    that are not in `folder` are removed in the same commit; all other files stay.

    Args:
        folder: The adapter or the model; the card is written into it as `README.md`.
        params: `finetuned_model_id` and `push_to_private` are read.
        token: The value of `HF_TOKEN`; no other token of the machine is ever used.
        card: Markdown, with front matter.
        endpoint: Address of the hub; that of `HF_ENDPOINT` when left out.
        sleep: Waits between tries.
        clock: What `PATIENCE_SECONDS` are counted with.

    Raises:
        PushError: The hub refused, or could not be reached for too long.
    """
    attempt = _Push(params, token=token, endpoint=endpoint, clock=clock)
    (folder / "README.md").write_text(card, encoding="utf-8")
    with _guarded(attempt.watch):
        return attempt.until_done(folder, sleep)


def check(params: TrainingParams, *, token: str | None, endpoint: str | None = None) -> None:
    """Raise `PushError` for a push that is bound to be refused: hours before, when nothing is lost yet.

    Writes nothing. An outage is no reason: the hub may be back by then.
    """
    attempt = _Push(params, token=token, endpoint=endpoint, clock=time.monotonic)
    with _guarded(attempt.watch):
        attempt.check_token()


class _GaveUp(Exception):
    """Not an error of httpx, so that nothing in between tries again."""


class _Watch:
    """Ends a push that gets nowhere, and tells of every answer that makes it wait."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last = clock()
        self.reason = "no answer"

    def left(self) -> float:
        return PATIENCE_SECONDS - (self._clock() - self._last)

    def on_request(self, request: httpx.Request) -> None:
        if self.left() <= 0:
            raise _GaveUp

    def on_response(self, response: httpx.Response) -> None:
        if response.is_success and response.request.method == "PUT":
            with self._lock:
                self._last = self._clock()
        if response.status_code not in _TRANSIENT:
            return
        self.reason = f"HTTP {response.status_code}"
        wait = retry_after(response)
        print(f"note: Hugging Face answered {response.status_code}; the push goes on", flush=True)
        if wait > self.left():
            self.reason += f", asking to wait {wait:.0f} seconds"
            raise _GaveUp


class _Push:
    def __init__(
        self,
        params: TrainingParams,
        *,
        token: str | None,
        endpoint: str | None,
        clock: Callable[[], float],
    ) -> None:
        self._repository = str(params.finetuned_model_id)
        self._private = params.push_to_private
        if not token:
            raise PushError(
                f"Cannot push to {self._repository!r}: HF_TOKEN is not set. Store it with "
                "`ow env set HF_TOKEN` and name it in the job's `secrets`."
            )
        if not _REPOSITORY.fullmatch(self._repository):
            raise PushError(
                f"Cannot push to {self._repository!r}: a Hugging Face id is written as 'user/model'."
            )
        self._token = token
        self._api = HfApi(endpoint=endpoint, token=token, library_name="openweights-prefect")
        self.watch = _Watch(clock)

    def check_token(self) -> None:
        try:
            known = self._api.whoami()
        except (HfHubHTTPError, httpx.TransportError, _GaveUp, OSError) as exc:
            if isinstance(exc, HfHubHTTPError) and exc.response.status_code == 401:
                raise PushError(self._refusal(401, exc)) from None
            print("note: HF_TOKEN could not be checked; the push is tried all the same", flush=True)
            return
        if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PushError(
                f"Cannot push to {self._repository!r}: HF_TOKEN may only read. Store one with write access."
            )

    def until_done(self, folder: Path, sleep: Callable[[float], None]) -> str:
        wait = FIRST_WAIT_SECONDS
        for _ in range(TRIES):
            try:
                return self._once(folder)
            except _GaveUp:
                break
            except (HfHubHTTPError, httpx.TransportError, RuntimeError, ValueError, OSError) as exc:
                cause = _root(exc)
                if isinstance(cause, _GaveUp):
                    break
                self._raise_if_final(cause)
                asked = retry_after(cause.response) if isinstance(cause, HfHubHTTPError) else 0.0
                pause = max(wait, asked)
                if pause > self.watch.left():
                    break
                sleep(pause)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        raise PushError(
            f"Cannot push to {self._repository!r}: Hugging Face did not take it ({self.watch.reason}). "
            "Submit the job again later: it does not train again."
        )

    def _once(self, folder: Path) -> str:
        self._api.create_repo(self._repository, private=self._private, exist_ok=True)
        info = self._api.model_info(self._repository)
        if self._private and info.private is False:
            raise PushError(
                f"Cannot push to {self._repository!r}: it is public, and push_to_private is True. "
                "Make it private, or pass push_to_private=False or another finetuned_model_id."
            )
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file() and not _ignored(path.relative_to(folder).as_posix())
        }
        there = [each.rfilename for each in info.siblings or []]
        stale = [glob.escape(name) for name in there if name not in sizes and _is_weights(name)]
        self._api.upload_folder(
            repo_id=self._repository,
            folder_path=folder,
            commit_message="Push the result of a training job",
            ignore_patterns=[*_NOT_PUSHED],
            delete_patterns=stale or None,
        )
        self._require_all(sizes)
        return f"{self._api.endpoint}/{self._repository}"

    def _require_all(self, sizes: dict[str, int]) -> None:
        stored = self._api.get_paths_info(self._repository, list(sizes))
        found = {each.path: each.size for each in stored if isinstance(each, huggingface_hub.hf_api.RepoFile)}
        wrong = sorted(name for name, size in sizes.items() if found.get(name) != size)
        if wrong:
            raise PushError(
                f"Cannot push to {self._repository!r}: Hugging Face took the commit, but has {wrong[0]!r} "
                "not as it was sent. Submit the job again: it does not train again."
            )

    def _raise_if_final(self, exc: BaseException) -> None:
        """Only what the hub says by its status is final; everything else may be the connection."""
        if isinstance(exc, HfHubHTTPError):
            status = exc.response.status_code
            self.watch.reason = f"HTTP {status}"
            if status in _TRANSIENT or status == 409:  # 409: another commit came between
                return
            raise PushError(self._refusal(status, exc)) from None
        if isinstance(exc, httpx.TransportError):
            self.watch.reason = type(exc).__name__
            return
        raise PushError(f"Cannot push to {self._repository!r}: {self._redacted(str(exc))}") from None

    def _refusal(self, status: int, exc: HfHubHTTPError) -> str:
        if status == 401:
            why = "HF_TOKEN is not valid. Store a Hugging Face token with write access as HF_TOKEN."
        elif status == 403:
            why = (
                "HF_TOKEN may not write there. Use a token with write access to "
                f"{self._repository.partition('/')[0]!r}, or another finetuned_model_id."
            )
        else:
            said = exc.response.headers.get("X-Error-Message") or exc.server_message or ""
            why = f"Hugging Face answered {status}. {self._redacted(said)}".strip()
        return f"Cannot push to {self._repository!r}: {why}"

    def _redacted(self, text: str) -> str:
        """Without the token, and without what signs an address of the hub's storage."""
        return re.sub(r"\?[^\s'\"]+", "", text.replace(self._token, "***"))[:500]


def retry_after(response: httpx.Response) -> float:
    """Seconds that the hub asks to wait; 0 when it does not say, or says it as a date."""
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else 0.0


def _ignored(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in [*_NOT_PUSHED, ".git/*", ".cache/huggingface/*"])


def _is_weights(path: str) -> bool:
    return "/" not in path and any(fnmatch.fnmatch(path, pattern) for pattern in _WEIGHTS)


def _root(exc: BaseException) -> BaseException:
    """`huggingface_hub` wraps what went wrong in an upload."""
    while isinstance(exc, RuntimeError) and exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


@contextlib.contextmanager
def _guarded(watch: _Watch) -> Iterator[None]:
    """Give every request of the library a limit; afterwards the library is as it was.

    Uploads go by LFS, never by Xet: its compiled client has retries, waits and messages of its own, which
    none of our limits reach. The library's warnings are silenced, for they print signed addresses.
    """

    def client() -> httpx.Client:
        made: httpx.Client = default_client_factory()
        made.timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        made.event_hooks["request"].append(watch.on_request)
        made.event_hooks["response"].append(watch.on_response)
        return made

    verbosity, xet = huggingface_hub.logging.get_verbosity(), hub_constants.HF_HUB_DISABLE_XET
    quiet = are_progress_bars_disabled()
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    disable_progress_bars()
    hub_constants.HF_HUB_DISABLE_XET = True
    huggingface_hub.set_client_factory(client)
    try:
        yield
    finally:
        huggingface_hub.set_client_factory(default_client_factory)
        hub_constants.HF_HUB_DISABLE_XET = xet
        huggingface_hub.logging.set_verbosity(verbosity)
        if not quiet:
            enable_progress_bars()
