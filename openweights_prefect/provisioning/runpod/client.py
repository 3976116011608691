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
from openweights_prefect.provisioning.runpod import contract, creation, refusals, responses, system_log
from openweights_prefect.provisioning.runpod.rates import RateBudget

USER_AGENT = f"openweights-prefect/{__version__} httpx/{httpx.__version__}"

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_CREATE_TIMEOUT = httpx.Timeout(90.0, connect=10.0)
_ATTEMPTS = 4
_LOG_LINES = 500
_MOST_PAGES = 500
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CLOUDS: tuple[Cloud, ...] = ("SECURE", "COMMUNITY")
# Raised before a byte of the request left: the only transport errors that prove that nothing was created.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class RunPodClient:
    """RunPod's REST v2, as a `Provider`.

    `http` may be shared; a client made here is closed by `aclose()`. Reads and terminations are retried a few
    times; `create` never is. All calls draw on one budget of requests: `budget` may be shared by the clients
    of one account, which has the limits.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        http: httpx.AsyncClient | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        budget: RateBudget | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {_checked(api_key)}", "User-Agent": USER_AGENT}
        self._own_http = http is None
        # A proxy of the environment is for the outside world, not for a simulator on this machine.
        outside = httpx.URL(base_url).host not in _LOOPBACK
        self._http = http or httpx.AsyncClient(trust_env=outside)
        self._sleep = sleep
        self._budget = budget or RateBudget(sleep=sleep)
        self._host_minima: bool | None = None

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
        body = creation.create_body(request, host_minima=await self._may_ask_for_minima(request))
        try:
            response = await self._send("POST", "/pods", json=body, timeout=_CREATE_TIMEOUT)
        except _NOT_SENT as exc:
            raise ProviderOutage(f"Cannot reach {self._base_url!r} ({exc!r}). Nothing was created.") from exc
        except httpx.HTTPError as exc:
            raise Ambiguous(
                f"No answer to the creation of {request.name!r} ({exc!r}). Look for that name."
            ) from exc
        if response.status_code != 201:
            raise refusals.refused_creation(response, request.name, unsaid=request.env.values())
        pod = responses.created_pod(response, request.name)
        if disappointment := creation.disappointment(request, pod):
            await self._give_back(pod, disappointment)
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

    async def system_log(self, pod_id: str) -> builtins.list[str]:
        """The newest lines that the machine logged of a pod; empty when there is no log to read."""
        request = self._http.build_request(
            "GET",
            f"{self._base_url}/pods/{_segment(pod_id)}/logs",
            params={"source": "system", "tail": str(_LOG_LINES)},
            # Unpacked, a compressed stream could have any size.
            headers={**self._headers, "Accept": "text/event-stream", "Accept-Encoding": "identity"},
            timeout=_TIMEOUT,
        )
        try:
            response = await self._counted(request, stream=True)
        except httpx.HTTPError as exc:
            raise ProviderOutage(f"The log of pod {pod_id!r} cannot be read ({exc!r}).") from exc
        try:
            if response.status_code in (403, 404):
                return []
            if response.is_success:
                return system_log.lines_of(await system_log.read_backlog(response.aiter_raw()))
            await response.aread()
            raise refusals.failed(response, f"GET the log of pod {pod_id!r}")
        except httpx.HTTPError as exc:
            raise ProviderOutage(f"The log of pod {pod_id!r} broke off ({exc!r}).") from exc
        finally:
            await response.aclose()

    async def specification(self) -> Mapping[str, Any]:
        """RunPod's own description of its API; needs no key, and is told none."""
        url = f"{self._base_url}/openapi.json"
        headers = {"User-Agent": USER_AGENT}
        try:
            response = await self._http.get(url, headers=headers, timeout=_TIMEOUT, follow_redirects=False)
        except httpx.HTTPError as exc:
            raise ProviderOutage(f"Cannot read {url!r} ({exc!r}).") from exc
        return responses.specification(response)

    async def _may_ask_for_minima(self, request: PodRequest) -> bool:
        """Whether this server knows the keys; asked once, and only for a request that has them."""
        if request.min_vcpu_per_gpu is None and request.min_ram_gb_per_gpu is None:
            return False
        if self._host_minima is None:
            try:
                self._host_minima = contract.compare(await self.specification()).host_minima
            except ProviderError:
                return False
        return self._host_minima

    async def _give_back(self, pod: ProviderPod, disappointment: str) -> None:
        try:
            await self.terminate(pod.id)
        except ProviderError as exc:
            raise Ambiguous(f"{disappointment}, and was not ended. Look for the name {pod.name!r}.") from exc
        raise NoCapacity(f"{disappointment}; it was ended. Try the next offer.")

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
            error = refusals.failed(response, f"{method} {path}")
            # The budget has learned of a refusal for the rate: it waits, or ends the attempts.
            if last or not (isinstance(error, RateLimited) or response.status_code >= 500):
                raise error
            if not isinstance(error, RateLimited):
                await self._sleep(_backoff_seconds(attempt))
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
        request = self._http.build_request(
            method,
            self._base_url + path,
            params=params,
            json=json,
            headers=self._headers,
            timeout=timeout,
        )
        return await self._counted(request)

    async def _counted(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """Send one request when the budget allows it, and let the budget learn from the answer."""
        await self._budget.take(ends_a_pod=request.method == "DELETE")
        try:
            # Redirects are never followed: a POST must go out once, and the key to one host only.
            response = await self._http.send(request, stream=stream, follow_redirects=False)
        except BaseException:
            self._budget.unanswered()
            raise
        self._budget.answered(response.status_code, response.headers)
        return response


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
