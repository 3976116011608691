"""The provider that is RunPod: its REST v2 over async httpx."""

from __future__ import annotations

import asyncio
import builtins
import random
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from openweights_prefect import __version__
from openweights_prefect.errors import ConfigurationError, ProviderError
from openweights_prefect.provisioning.provider import (
    Ambiguous,
    Cloud,
    NoCapacity,
    Offer,
    PodRequest,
    ProviderOutage,
    ProviderPod,
    RateLimited,
)
from openweights_prefect.provisioning.runpod import responses

USER_AGENT = f"openweights-prefect/{__version__} httpx/{httpx.__version__}"

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_CREATE_TIMEOUT = httpx.Timeout(90.0, connect=10.0)
_ATTEMPTS = 4
_LONGEST_WAIT_SECONDS = 15.0
_MOST_PAGES = 500
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CLOUDS: tuple[Cloud, ...] = ("SECURE", "COMMUNITY")
# Raised before a byte of the request left: the only transport errors that prove that nothing was created.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class RunPodClient:
    """RunPod's REST v2, as a `Provider`.

    `http` may be shared; a client made here is closed by `aclose()`. Reads and terminations are retried a few
    times; `create` never is.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        http: httpx.AsyncClient | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {_checked(api_key)}", "User-Agent": USER_AGENT}
        self._own_http = http is None
        # A proxy of the environment is for the outside world, not for a simulator on this machine.
        outside = httpx.URL(base_url).host not in _LOOPBACK
        self._http = http or httpx.AsyncClient(trust_env=outside)
        self._sleep = sleep

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self._base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections, unless they came in from outside."""
        if self._own_http:
            await self._http.aclose()

    async def create(self, request: PodRequest) -> ProviderPod:
        """Buy one pod with exactly one request; see `Provider.create`."""
        try:
            response = await self._send("POST", "/pods", json=_create_body(request), timeout=_CREATE_TIMEOUT)
        except _NOT_SENT as exc:
            raise ProviderOutage(f"Cannot reach {self._base_url!r} ({exc!r}). Nothing was created.") from exc
        except httpx.HTTPError as exc:
            raise Ambiguous(
                f"No answer to the creation of {request.name!r} ({exc!r}). Look for that name."
            ) from exc
        if response.status_code != 201:
            raise responses.refused_creation(response, request.name)
        pod = responses.created_pod(response, request.name)
        if request.price_ceiling is not None and pod.cost_per_hour > request.price_ceiling:
            await self._give_back(pod, request.price_ceiling)
        return pod

    async def list(self) -> builtins.list[ProviderPod]:
        """All pods of the account, page by page; see `Provider.list`."""
        pods: dict[str, ProviderPod] = {}
        seen: set[str] = set()
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            response = await self._ask("GET", "/pods", params={"cursor": cursor} if cursor else None)
            page = responses.pod_page(response)
            pods.update((pod.id, pod) for pod in page.pods)
            cursor = page.next_cursor
            if cursor is None:
                return [*pods.values()]
            if cursor in seen:
                break
            seen.add(cursor)
        raise ProviderOutage(f"The list of pods does not end (cursor {cursor!r}). Treat it as unknown.")

    async def get(self, pod_id: str) -> ProviderPod | None:
        """One pod, or None."""
        response = await self._ask("GET", f"/pods/{_segment(pod_id)}", gone_is_fine=True)
        return None if response.status_code == 404 else responses.one_pod(response)

    async def find_by_name(self, name: str) -> builtins.list[ProviderPod]:
        """The pods with exactly this name, from one complete list; those already terminated are left out."""
        return [pod for pod in await self.list() if pod.name == name and pod.status != "TERMINATED"]

    async def terminate(self, pod_id: str) -> None:
        """End a pod for good; silent when it is already gone."""
        await self._ask("DELETE", f"/pods/{_segment(pod_id)}", gone_is_fine=True)

    async def offers(self) -> builtins.list[Offer]:
        """What can be bought in both clouds, from two requests."""
        found: builtins.list[Offer] = []
        for cloud in _CLOUDS:
            query = {"include": "AVAILABILITY", "product": "POD", "cloud": cloud}
            found += responses.offers(await self._ask("GET", "/catalog/gpus", params=query), cloud)
        return found

    async def _give_back(self, pod: ProviderPod, ceiling: float) -> None:
        dearer = f"Pod {pod.id!r} costs {pod.cost_per_hour!r} USD/h, more than the ceiling {ceiling!r}"
        try:
            await self.terminate(pod.id)
        except ProviderError as exc:
            raise Ambiguous(f"{dearer}, and was not ended. Look for the name {pod.name!r}.") from exc
        raise NoCapacity(f"{dearer}; it was ended. Try the next offer.")

    async def _ask(
        self, method: str, path: str, *, params: Mapping[str, str] | None = None, gone_is_fine: bool = False
    ) -> httpx.Response:
        """One request that may be repeated: GET and DELETE only."""
        for attempt in range(1, _ATTEMPTS + 1):
            last = attempt == _ATTEMPTS
            try:
                response = await self._send(method, path, params=params)
            except httpx.HTTPError as exc:
                if last:
                    raise ProviderOutage(
                        f"{method} {path!r} failed {attempt} times, last with {exc!r}."
                    ) from exc
                await self._sleep(_backoff_seconds(attempt))
                continue
            if response.is_success or (gone_is_fine and response.status_code == 404):
                return response
            error = responses.failed(response, f"{method} {path}")
            wait = _backoff_seconds(attempt)
            if isinstance(error, RateLimited):
                wait = max(wait, error.retry_after_seconds)
            transient = isinstance(error, RateLimited) or response.status_code >= 500
            if last or not transient or wait > _LONGEST_WAIT_SECONDS:
                raise error
            await self._sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        json: Mapping[str, Any] | None = None,
        timeout: httpx.Timeout = _TIMEOUT,
    ) -> httpx.Response:
        # Redirects are never followed: a POST must go out once, and the key to one host only.
        return await self._http.request(
            method,
            self._base_url + path,
            params=params,
            json=json,
            headers=self._headers,
            timeout=timeout,
            follow_redirects=False,
        )


def _create_body(request: PodRequest) -> dict[str, Any]:
    gpu: dict[str, Any] = {"id": request.gpu_id, "count": request.gpu_count}
    if request.min_cuda:
        gpu["minCudaVersion"] = request.min_cuda
    body: dict[str, Any] = {
        "name": request.name,
        "image": request.image,
        "gpu": gpu,
        "cloud": request.cloud,
        "disk": request.disk_gb,
        "env": dict(request.env),
    }
    if request.args:
        body["args"] = request.args
    return body


def _checked(api_key: str) -> str:
    # An HTTP library quotes a header that it cannot send, and the key with it: never let it come to that.
    key = api_key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError("The RunPod API key is empty or malformed. Set RUNPOD_API_KEY.")
    return key


def _segment(pod_id: str) -> str:
    """A pod id as one path segment: an empty or crooked one must not reach another address."""
    if not pod_id.isalnum():
        raise ValueError(f"{pod_id!r} is not a pod id.")
    return pod_id


def _backoff_seconds(attempt: int) -> float:
    return random.uniform(0.5, 1.0) * 0.25 * float(2**attempt)
