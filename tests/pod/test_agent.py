"""The agent with a ledger, a machine and runs that the test plays: when it works, and when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from openweights_prefect.errors import BudgetExceeded, ConflictError, LedgerUnavailable
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.pod.agent import Agent
from openweights_prefect.pod.collaborators import Verdict
from openweights_prefect.settings import Settings

SETTINGS = replace(
    Settings(),
    heartbeat_seconds=0.05,
    lease_seconds=120,
    pod_idle_seconds=600,
    cancel_grace_seconds=1.0,
    checkpoint_grace_seconds=3.0,
)


class World:
    """The ledger's answers, the machine and the runs of one pod; `calls` is what the agent asked for."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.deadline_seconds = 86400.0
        self.next_run: UUID | None = None
        self.held: UUID | None = None
        self.cancel = self.shutdown = self.away = self.file_appeared = False
        self.why_unusable: str | None = None
        self.verdict: Verdict | None = None
        self.extension = "extended"
        self.heard: list[float] = []
        self.cleaned: list[tuple[UUID, bool]] = []
        self.runs: list[Run] = []
        self.agent = Agent(
            worker_id="pod-1",
            settings=settings,
            ask=self.ask,
            hints=self.hints,
            zygote=self,
            executions=self.execution,
            machine=self,
            proxy_hash="f" * 64,
            provider_id="rp-1",
        )

    # As the ledger ------------------------------------------------------------------------------

    async def ask(self, function: str, **arguments: Any) -> Row:
        self.calls.append((function, arguments))
        if self.away:
            raise LedgerUnavailable("It is away.")
        answer: Row = getattr(self, f"_{function}")(**arguments)
        return answer

    async def hints(self) -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    def _register_pod(self, **_: Any) -> Row:
        return {"outcome": "registered", "deadline_seconds": self.deadline_seconds, "gpu_count": 1}

    def _renew_lease(self, **_: Any) -> Row:
        next_run, self.next_run = self.next_run, None
        return {
            "fenced": False,
            "shutdown": self.shutdown,
            "cancel": self.cancel,
            "run_id": self.held,
            "next_run": str(next_run) if next_run else None,
            "deadline_seconds": self.deadline_seconds,
        }

    def _release_pod(self, **_: Any) -> Row:
        return {"outcome": "draining"}

    def _reject_pod(self, **_: Any) -> Row:
        return {"outcome": "rejected"}

    def _extend_pod(self, deadline_seconds: float, **_: Any) -> Row:
        if self.extension == "extended":
            self.deadline_seconds = deadline_seconds
        return {"outcome": self.extension, "deadline_seconds": self.deadline_seconds}

    def asked(self, function: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name == function]

    # As the zygote and the machine --------------------------------------------------------------

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def check(self) -> str | None:
        return self.why_unusable

    async def clean(self, run_id: UUID, *, suspected: bool) -> Verdict | None:
        self.cleaned.append((run_id, suspected))
        return self.verdict

    def heard_deadline(self, seconds_left: float) -> None:
        self.heard.append(seconds_left)

    def wants_to_end(self) -> bool:
        return self.file_appeared

    def execution(self, run_id: UUID, boot: UUID) -> Run:
        self.runs.append(Run(run_id))
        return self.runs[-1]


class Run:
    """A run that goes on until the test, or its agent, ends it."""

    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        self.gpu_suspected = False
        self.ended = asyncio.Event()
        self.told: list[tuple[str, str, float | None]] = []
        self.killed = 0

    async def execute(self) -> None:
        await self.ended.wait()

    async def settle(self) -> None: ...

    def cancel(
        self, result: str = "canceled", why: str = "by the user", *, grace_seconds: float | None = None
    ) -> None:
        self.told.append((result, why, grace_seconds))
        self.ended.set()

    def kill(self) -> None:
        self.killed += 1
        self.ended.set()


Scene = Callable[[World], Awaitable[None]]


def play(scene: Scene, world: Callable[[], World] = World) -> World:
    """Run an agent while the scene goes on; both must end in time."""

    async def both() -> World:
        made = world()
        async with asyncio.timeout(20):
            await asyncio.gather(made.agent.run(), scene(made))
        return made

    return asyncio.run(both())


async def until(look: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not look():
            await asyncio.sleep(0.01)


async def running(world: World) -> Run:
    """A run that the agent has begun."""
    world.next_run = uuid4()
    await until(lambda: world.runs)
    return world.runs[-1]


def test_a_pod_registers_with_its_proxy_hash_and_ends_when_told() -> None:
    """It hears its deadline with the first answer, and with every heartbeat."""

    async def scene(world: World) -> None:
        await until(lambda: len(world.heard) > 2)
        world.shutdown = True

    world = play(scene)
    [registration] = world.asked("register_pod")
    assert (registration["proxy_hash"], registration["provider_id"]) == ("f" * 64, "rp-1")
    assert world.asked("release_pod")[-1]["why"] == "told to end"
    assert set(world.heard) == {86400.0}


def test_an_unusable_machine_is_never_registered() -> None:
    """The ledger is told, however long it was away."""

    def world() -> World:
        made = World()
        made.why_unusable, made.away = "1 GPUs instead of 2", True
        return made

    async def scene(world: World) -> None:
        await until(lambda: world.calls)
        world.away = False

    seen = play(scene, world)
    assert {name for name, _ in seen.calls} == {"reject_pod"}
    assert seen.calls[-1][1] == {"for_worker": "pod-1", "why": "1 GPUs instead of 2"}


def test_after_a_run_the_machine_is_cleaned_before_the_next() -> None:
    """It is told whether the run made the GPUs suspect."""

    async def scene(world: World) -> None:
        first = await running(world)
        first.gpu_suspected = True
        first.ended.set()
        await until(lambda: world.cleaned)
        world.next_run = uuid4()
        await until(lambda: len(world.runs) == 2)
        world.shutdown = True
        world.runs[1].ended.set()

    world = play(scene)
    assert world.cleaned == [(world.runs[0].run_id, True), (world.runs[1].run_id, False)]


@pytest.mark.parametrize(
    ("unusable", "function"), [(False, "release_pod"), (True, "reject_pod")], ids=["dirty", "broken"]
)
def test_a_machine_that_cannot_be_cleaned_takes_no_more_work(unusable: bool, function: str) -> None:
    """The pod ends with the reason; a broken machine is refused for others, too."""

    async def scene(world: World) -> None:
        run = await running(world)
        world.verdict = Verdict("the disk is full", unusable)
        world.next_run = uuid4()
        run.ended.set()

    world = play(scene)
    assert len(world.runs) == 1
    assert [call["why"] for call in world.asked(function)] == ["the disk is full"]


def test_an_idle_pod_ends() -> None:
    """Only if the ledger agrees: it is not forced."""
    world = play(nothing, lambda: World(replace(SETTINGS, pod_idle_seconds=0)))
    [release] = world.asked("release_pod")
    assert (release["why"], release["forced"]) == ("idle", False)


async def nothing(world: World) -> None: ...


def test_the_deadline_ends_a_run_before_it_comes() -> None:
    """Early enough for the grace of a checkpoint; the run is lost, so that it goes on elsewhere."""

    async def scene(world: World) -> None:
        run = await running(world)
        world.deadline_seconds = 2.0
        await until(lambda: run.told)

    world = play(scene)
    assert world.runs[0].told[0] == ("lost", "the pod reached its deadline", 3.0)
    assert world.asked("release_pod")[-1]["why"] == "deadline"


def test_a_later_deadline_counts() -> None:
    """Moved in the ledger, it takes effect with the next heartbeat."""

    def world() -> World:
        made = World()
        made.deadline_seconds = 2.0
        return made

    async def scene(world: World) -> None:
        run = await running(world)
        world.deadline_seconds = 600.0
        await asyncio.sleep(3)
        assert run.told == []
        world.shutdown = True
        run.ended.set()

    play(scene, world)


def test_the_deadline_holds_without_a_ledger() -> None:
    """Nobody has to answer for a pod to end in time."""

    def world() -> World:
        made = World()
        made.deadline_seconds = 2.0
        return made

    async def scene(world: World) -> None:
        run = await running(world)
        world.away = True
        await until(lambda: run.told)

    seen = play(scene, world)
    assert seen.runs[0].told[0][0] == "lost"
    assert seen.asked("release_pod") == [] or seen.away


def test_a_run_goes_on_while_the_lease_lasts() -> None:
    """Failed renewals alone end nothing; before the lease can be given away, the run is killed."""
    settings = replace(SETTINGS, lease_seconds=4)

    async def scene(world: World) -> None:
        run = await running(world)
        world.away = True
        await asyncio.sleep(2)
        assert (run.killed, run.told) == (0, [])
        await until(lambda: run.killed)
        world.away, world.shutdown = False, True

    play(scene, lambda: World(settings))


def test_a_signal_gives_the_run_back() -> None:
    """With no more time than RunPod leaves; the agent says that it was a signal."""

    async def scene(world: World) -> None:
        await running(world)
        world.agent.end()

    world = play(scene, lambda: World(replace(SETTINGS, checkpoint_grace_seconds=600)))
    assert world.runs[0].told == [("lost", "the pod was told to end", 5.0)]
    assert world.agent.signaled


def test_a_file_ends_the_pod_after_its_run() -> None:
    """The run is left alone; no other one is begun."""

    async def scene(world: World) -> None:
        run = await running(world)
        world.file_appeared = True
        await asyncio.sleep(0.3)
        assert run.told == []
        world.next_run = uuid4()
        run.ended.set()

    world = play(scene)
    assert len(world.runs) == 1
    assert "shutdown.txt" in world.asked("release_pod")[-1]["why"]


def test_the_deadline_is_moved_from_inside() -> None:
    """By so many hours, or to so many from now; the new one is known at once."""

    async def scene(world: World) -> None:
        await until(lambda: world.heard)
        shown = await world.agent.time_to_live()
        assert (shown["pod"], round(shown["deadline_seconds"])) == ("pod-1", 86400)
        longer = await world.agent.time_to_live(1, added=True)
        assert round(longer["deadline_seconds"]) == 90000
        assert round(world.heard[-1]) == 90000
        assert (await world.agent.time_to_live(0.5))["deadline_seconds"] == 1800
        world.extension = "budget"
        with pytest.raises(BudgetExceeded, match="Ask for less"):
            await world.agent.time_to_live(100)
        world.extension = "not_found"
        with pytest.raises(ConflictError, match="about to end"):
            await world.agent.time_to_live(100)
        world.shutdown = True

    play(scene)
