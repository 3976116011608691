"""The budget of requests: what it learns, what it keeps for terminations, and that it never oversteps."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights_prefect.provisioning.provider import RateLimited
from openweights_prefect.provisioning.runpod.client import RunPodClient
from openweights_prefect.provisioning.runpod.rates import RateBudget, retry_after_seconds
from openweights_prefect.simulator.server import SimulatorServer

SECONDS = {"minute": 60, "hour": 3600}


class Clockwork(asyncio.SelectorEventLoop):
    """An event loop whose time only passes in `sleep`."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class LimitedServer:
    """Counts requests in fixed windows, each beginning with its first request, as RunPod describes it."""

    def __init__(self, clock: Clockwork, quotas: dict[str, int]) -> None:
        self._clock = clock
        self._quotas = quotas
        self._windows: dict[str, tuple[float, int]] = {}
        self.refused = 0

    def ask(self) -> tuple[int, dict[str, str]]:
        """Status and headers."""
        now = self._clock.now
        for name in self._quotas:
            began, _ = self._windows.get(name, (float("-inf"), 0))
            if now - began >= SECONDS[name]:
                self._windows[name] = (now, 0)
        exceeded = any(self._windows[name][1] >= quota for name, quota in self._quotas.items())
        if not exceeded:
            self._windows = {name: (began, used + 1) for name, (began, used) in self._windows.items()}
        self.refused += exceeded
        state = []
        for name, quota in self._quotas.items():
            began, used = self._windows[name]
            state.append(f'"{name}";r={quota - used};t={round(began + SECONDS[name] - now)}')
        policy = [f'"{name}";q={quota};w={SECONDS[name]}' for name, quota in self._quotas.items()]
        return 429 if exceeded else 200, {
            "RateLimit": ", ".join(state),
            "RateLimit-Policy": ", ".join(policy),
        }


def _on_clockwork(scene: Callable[[Clockwork], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=Clockwork) as runner:
        loop: Any = runner.get_loop()
        runner.run(scene(loop))  # type: ignore[arg-type]


async def _ask(budget: RateBudget, server: LimitedServer, *, ends_a_pod: bool = False) -> bool:
    try:
        await budget.take(ends_a_pod=ends_a_pod)
    except RateLimited:
        return False
    budget.answered(*server.ask())
    return True


@settings(max_examples=100)
@given(
    st.integers(31, 90),
    st.integers(31, 400),
    st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=200),
)
def test_no_request_is_refused_for_the_rate(minute: int, hour: int, calls: list[tuple[bool, int]]) -> None:
    """Whoever asks whenever: the server never has to say 429, and time passes only while one waits."""

    async def scene(clock: Clockwork) -> None:
        server = LimitedServer(clock, {"minute": minute, "hour": hour})
        budget = RateBudget(sleep=clock.sleep, patience_seconds=100)
        for ends_a_pod, pause in calls:
            clock.now += pause
            await _ask(budget, server, ends_a_pod=ends_a_pod)
        assert server.refused == 0

    _on_clockwork(scene)


def test_the_reserve_is_for_terminations() -> None:
    """With 60 a minute 50 reads go, then ten terminations, and then nothing until the window ends."""

    async def scene(clock: Clockwork) -> None:
        server = LimitedServer(clock, {"minute": 60, "hour": 3000})
        budget = RateBudget(sleep=clock.sleep)
        assert [await _ask(budget, server) for _ in range(60)].count(True) == 50
        assert [await _ask(budget, server, ends_a_pod=True) for _ in range(20)].count(True) == 10
        clock.now += 61
        assert await _ask(budget, server)
        assert server.refused == 0

    _on_clockwork(scene)


def test_a_short_wait_is_waited_and_a_long_one_is_an_error() -> None:
    """The error carries the wait, with a second for the server's rounding."""

    async def scene(clock: Clockwork) -> None:
        budget = RateBudget(sleep=clock.sleep, patience_seconds=15)
        await budget.take()
        budget.answered(200, {"RateLimit": '"minute";r=0;t=14', "RateLimit-Policy": '"minute";q=60;w=60'})
        await budget.take()
        assert clock.now == 1015
        budget.answered(200, {"RateLimit": '"minute";r=0;t=15, "hour";r=0;t=900'})
        with pytest.raises(RateLimited) as caught:
            await budget.take()
        assert caught.value.retry_after_seconds == 901

    _on_clockwork(scene)


def test_before_any_answer_the_pace_is_modest() -> None:
    """Thirty at once, and five of those only for terminations; answers without limits lift it."""

    async def scene(clock: Clockwork) -> None:
        budget = RateBudget(sleep=clock.sleep)
        for _ in range(25):
            await budget.take()
            budget.unanswered()
        with pytest.raises(RateLimited):
            await budget.take()
        await budget.take(ends_a_pod=True)
        budget.answered(500, {})
        with pytest.raises(RateLimited):
            await budget.take()
        await budget.take(ends_a_pod=True)
        budget.answered(200, {})
        for _ in range(1000):
            await budget.take()
            budget.answered(200, {})

    _on_clockwork(scene)


def test_requests_under_way_count_before_they_are_answered() -> None:
    """Many at once cannot all take the one that is left."""

    async def scene(clock: Clockwork) -> None:
        budget = RateBudget(sleep=clock.sleep, patience_seconds=1)
        await budget.take()
        budget.answered(200, {"RateLimit": '"minute";r=13;t=60', "RateLimit-Policy": '"minute";q=60;w=60'})
        outcomes = await asyncio.gather(*(budget.take() for _ in range(8)), return_exceptions=True)
        assert [isinstance(outcome, RateLimited) for outcome in outcomes] == [False] * 3 + [True] * 5
        # The first of the three is answered: the other two were not counted in what it says.
        budget.answered(200, {"RateLimit": '"minute";r=12;t=60', "RateLimit-Policy": '"minute";q=60;w=60'})
        with pytest.raises(RateLimited):
            await budget.take()

    _on_clockwork(scene)


def test_a_refusal_stops_everything_for_its_time() -> None:
    """Terminations too: while RunPod refuses, asking again only makes it longer."""

    async def scene(clock: Clockwork) -> None:
        budget = RateBudget(sleep=clock.sleep, patience_seconds=5)
        await budget.take()
        budget.answered(429, {"Retry-After": "20"})
        for ends_a_pod in (True, False):
            with pytest.raises(RateLimited, match="21 s"):
                await budget.take(ends_a_pod=ends_a_pod)
        clock.now += 21
        await budget.take()

    _on_clockwork(scene)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "12"}, 12),
        ({"Retry-After": "12", "RateLimit": '"minute";r=0;t=13, "hour";r=9;t=2000'}, 13),
        ({"RateLimit": "minute;r=0;t=7"}, 7),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 10),
        ({"RateLimit": "nonsense; ;;="}, 10),
        ({}, 10),
    ],
)
def test_the_wait_is_the_longest_that_is_named(headers: dict[str, str], seconds: float) -> None:
    """Windows that are not used up do not count."""
    assert retry_after_seconds(headers) == seconds


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_pods_can_be_ended_when_the_reads_are_used_up(anyio_backend: str) -> None:
    """Against the simulator with 12 a minute: lists stop at the reserve, and the termination still goes."""
    with SimulatorServer(config={"rate_limits": {"minute": 12}}, profile="instant") as server:
        async with RunPodClient(base_url=server.rest, api_key=server.api_key) as client:
            for _ in range(10):
                await client.list()
            with pytest.raises(RateLimited):
                await client.list()
            await client.terminate("nosuchpod")
            await client.terminate("nosuchpod")
            with pytest.raises(RateLimited):
                await client.terminate("nosuchpod")
