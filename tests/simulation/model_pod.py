"""A pod's container in virtual time: the real agent, and a pretended execution of runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import TYPE_CHECKING, Any
from uuid import UUID

from openweights_prefect.errors import OpenWeightsError
from openweights_prefect.ledger.protocol import ask_one
from openweights_prefect.orchestration.flow_runs import FlowRunGone
from openweights_prefect.pod.agent import Agent
from openweights_prefect.pod.collaborators import Verdict
from openweights_prefect.pod.outage import call_until_answered
from tests.simulation.model_ledger import Speaker
from tests.simulation.virtual_loop import Process, current_process
from tests.simulation.watch import Executing

if TYPE_CHECKING:
    from tests.simulation.model_provider import SimPod
    from tests.simulation.world import World

_STEP_SECONDS = 20.0
_REST_SECONDS = 60.0
_DEADMAN_SECONDS = 60.0


class AgentDied(Exception):
    """The agent ended in an error of its own: the container exits."""


class SimContainer:
    """One container of a pod, started again when its processes die."""

    def __init__(self, world: World, pod: SimPod) -> None:
        self.world = world
        self.pod = pod
        self.worker_id = pod.request.env["OW_POD_ID"]
        self.process: Process | None = None
        self.agent: Agent | None = None
        self.deadline_at = float(pod.request.env["OW_DEADLINE_AT"])
        self._session = f"session of {pod.id}"
        self._serving = False

    def start(self) -> None:
        process = Process(self.world.loop, f"{self.pod.id}")
        process.on_death = lambda: self.world.watch.end_all_of(process)
        self.process = process
        process.start(self._main())
        process.start(self._deadman(process))

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def terminate(self) -> None:
        """SIGTERM to the agent."""
        if self.agent is not None and self._serving and self.process is not None and self.process.alive:
            with self.process:
                self.agent.end()

    async def _main(self) -> None:
        try:
            await self._serve()
        except Exception as exc:
            self.world.watch.note(f"the agent of {self.worker_id} ended in an error: {exc!r}")
            self.world.watch.reached("agent: ended in an error")
            self.world.agent_failed(self, exc)
            return
        await self._rest()

    async def _serve(self) -> None:
        if not await self._redeem():
            self.world.watch.reached("agent: refused at the door")
            return
        self.agent = self._make_agent()
        self._serving = True
        try:
            await self.agent.run()
        finally:
            self._serving = False

    def _make_agent(self) -> Agent:
        world = self.world
        ledger = world.view(Speaker("pod", self.worker_id, self._session), self.pod)

        def executions(run_id: UUID, boot: UUID) -> SimExecution:
            return SimExecution(
                world=world,
                run_id=run_id,
                worker_id=self.worker_id,
                boot=boot,
                ledger=ledger,
                flow_runs=world.flow_runs,
                cancel_grace_seconds=world.settings.cancel_grace_seconds,
            )

        return world.agent_class(
            worker_id=self.worker_id,
            settings=world.settings,
            ask=functools.partial(ask_one, ledger),
            hints=functools.partial(world.notifications, "", "ow_pod"),
            zygote=SimZygote(),
            executions=executions,
            machine=SimMachine(self),
            provider_id=self.pod.id,
        )

    async def _redeem(self) -> bool:
        token = self.world.hash_of(self.pod.request.env["OW_POD_TOKEN"])
        view = self.world.view(Speaker("service"), self.pod)
        while True:
            try:
                return await asyncio.to_thread(view.redeem, self.worker_id, token, self._session)
            except OpenWeightsError:
                await asyncio.sleep(1)

    async def _rest(self) -> None:
        """Ask to be ended, again and again."""
        while True:
            self.world.self_terminate(self.pod)
            await asyncio.sleep(_REST_SECONDS)

    async def _deadman(self, process: Process) -> None:
        while (left := self.deadline_at + _DEADMAN_SECONDS - self.world.epoch()) > 0:
            await asyncio.sleep(min(left, 3600.0))
        self.world.watch.reached("deadman")
        self.world.watch.note(f"the dead-man of {self.worker_id} ends everything")
        self.world.watch.end_all_of(process)
        self.world.self_terminate(self.pod)
        process.kill()


class SimZygote:
    """A preloaded process that takes a moment to start."""

    async def start(self) -> None:
        await asyncio.sleep(4)

    async def stop(self) -> None:
        """Nothing to stop."""


class SimMachine:
    """The machine under a pod, whose GPU may be broken."""

    def __init__(self, container: SimContainer) -> None:
        self._container = container
        self._world = container.world

    async def check(self) -> str | None:
        await asyncio.sleep(self._world.random.uniform(1, 20))
        if self._container.pod.host.bad_gpu:
            self._world.watch.reached("agent: bad GPU")
            return "GPU 0 computes wrong results"
        return None

    async def clean(self, run_id: UUID, *, suspected: bool) -> Verdict | None:
        await asyncio.sleep(0.3)
        drawn = self._world.random.random()
        if drawn < self._world.leaks:
            self._world.watch.reached("agent: memory stays")
            return Verdict(
                "GPU 0 keeps 20 GB of memory that nobody holds", unusable=drawn < self._world.leaks / 2
            )
        return None

    def heard_deadline(self, seconds_left: float) -> None:
        self._container.deadline_at = self._world.epoch() + seconds_left

    def wants_to_end(self) -> bool:
        return False


class SimExecution:
    """What `Execution` does, with a job that only takes time."""

    def __init__(
        self,
        *,
        world: World,
        run_id: UUID,
        worker_id: str,
        boot: UUID,
        ledger: Any,
        flow_runs: Any,
        cancel_grace_seconds: float = 3.0,
    ) -> None:
        self.run_id = run_id
        self.gpu_suspected = False
        self._world = world
        self._worker_id = worker_id
        self._boot = boot
        self._ledger = ledger
        self._flow_runs = flow_runs
        self._grace = cancel_grace_seconds
        self._intent: tuple[str, str] | None = None
        self._kill_at = float("inf")
        self._killed = asyncio.Event()
        self._changed = asyncio.Event()
        self._finished = False

    async def execute(self) -> None:
        try:
            if await self._claim() is None:
                return
            opened = await self._call(
                "open_run", for_run=self.run_id, for_worker=self._worker_id, as_boot=self._boot
            )
            if opened["outcome"] != "opened" or self._killed.is_set():
                return
            await self._run(opened["job"])
        finally:
            if not self._finished:
                self.kill()

    async def settle(self) -> None:
        await asyncio.sleep(0.1)
        self.kill()

    def cancel(
        self,
        result: str = "canceled",
        why: str = "canceled by the user",
        *,
        grace_seconds: float | None = None,
    ) -> None:
        if self._finished:
            return
        grace = self._grace if grace_seconds is None else grace_seconds
        self._kill_at = min(self._kill_at, self._world.loop.time() + grace)
        self._intent = self._intent or (result, why)
        self._changed.set()

    def kill(self) -> None:
        self._killed.set()
        self._changed.set()
        self._world.watch.end(str(self.run_id))

    async def _claim(self) -> Any:
        try:
            return await self._flow_runs.claim(self.run_id, owner=self._worker_id)
        except FlowRunGone:
            self._world.watch.reached("agent: flow run gone")
            await self._call("abandon_run", for_run=self.run_id, why="its flow run was deleted from Prefect")
            return None

    async def _run(self, job: dict[str, Any]) -> None:
        process = current_process()
        assert process is not None
        plan = self._world.plan_of(job["id"], job["attempt"])
        self._world.watch.begin(
            Executing(str(self.run_id), job["id"], self._worker_id, str(self._boot), process)
        )
        await self._work(plan)
        if self._killed.is_set():
            return  # without a word
        self._world.watch.end(str(self.run_id))
        if plan.agent_breaks:
            raise AgentDied("an error in the execution")
        result, why = self._intent or (plan.result, plan.why)
        answer = await self._call(
            "finish_run",
            for_run=self.run_id,
            as_boot=self._boot,
            result=result,
            why=why,
            result_outputs={"loss": 1.0} if result == "completed" else None,
        )
        self._finished = answer["outcome"] == "finished"

    async def _work(self, plan: Any) -> None:
        """Until the job ends, is killed, or heeds the order to end."""
        loop = self._world.loop
        ends_at = loop.time() + plan.seconds
        sequence = 0
        while not self._killed.is_set() and loop.time() < min(ends_at, self._kill_at):
            if self._intent is not None:
                heeds_at = loop.time() + (plan.stops_after or float("inf"))
                ends_at = min(ends_at, heeds_at)
            self._changed.clear()
            pause = min(ends_at, self._kill_at, loop.time() + _STEP_SECONDS) - loop.time()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, pause))
            if plan.talks and not self._killed.is_set():
                sequence = await self._log(sequence)

    async def _log(self, sequence: int) -> int:
        try:
            answer = await asyncio.to_thread(
                self._ledger.call,
                "append_events",
                for_run=self.run_id,
                as_boot=self._boot,
                first_sequence=sequence,
                batch=[{"data": {"x": sequence}}],
            )
        except OpenWeightsError:
            return sequence
        if answer[0]["outcome"] == "stale":
            self.kill()
        return sequence + 1

    async def _call(self, function: str, **arguments: Any) -> dict[str, Any]:
        return await call_until_answered(self._ledger, function, **arguments)
