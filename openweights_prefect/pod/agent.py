"""The agent: registers its pod, keeps the lease, and executes one run after another until the pod ends."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

from openweights_prefect.errors import BudgetExceeded, ConflictError, OpenWeightsError
from openweights_prefect.ledger.protocol import Row
from openweights_prefect.pod.collaborators import Ask, Executing, Executions, Hints, Machine, Verdict, Zygote
from openweights_prefect.settings import Settings

logger = logging.getLogger(__name__)

_END_SECONDS = 8.0
_SIGNAL_GRACE_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
_WATCH_SECONDS = 0.5
_MOST_SETTLING = 2
_MOST_LEAD = 0.1
"""Of the time that was left when the pod registered: a short-lived pod shall work, too."""


class Agent:
    """One pod's agent. `run()` returns when the pod is to end.

    It takes the time from its event loop alone, and reaches the world only through what it is given.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        settings: Settings,
        ask: Ask,
        hints: Hints,
        zygote: Zygote,
        executions: Executions,
        machine: Machine,
        proxy_hash: str | None = None,
        provider_id: str | None = None,
        new_boot: Callable[[], UUID] = uuid4,
    ) -> None:
        self._worker_id = worker_id
        self._settings = settings
        self._ask = ask
        self._hints = hints
        self._zygote = zygote
        self._executions = executions
        self._machine = machine
        self._proxy_hash = proxy_hash
        self._provider_id = provider_id
        self._new_boot = new_boot
        self.signaled = False
        self._boot = new_boot()
        self._safe_until = 0.0
        self._deadline_at = math.inf
        self._lead_seconds = 0.0
        self._beat_lock = asyncio.Lock()
        self._ended = asyncio.Event()
        self._models: list[str] = []
        self._execution: Executing | None = None
        self._task: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._verdict: Verdict | None = None
        self._idle_since = _now()

    async def run(self) -> None:
        """Serve until idle for too long, past the deadline, or told to end."""
        try:
            # A pod that cannot run anything never becomes active.
            why, _ = await asyncio.gather(self._machine.check(), self._zygote.start())
            if why is not None:
                await self._reject(why)
            await self._register()
            if not self._ended.is_set():
                await self._serve()
        finally:
            if unfinished := [task for task in (self._task, *self._settling) if task is not None]:
                await asyncio.wait(unfinished, timeout=_END_SECONDS)
            if self._execution is not None:
                self._execution.kill()
            await self._zygote.stop()

    def end(self) -> None:
        """End now, as on SIGTERM: the pod is going away. The run is given back for another pod."""
        self.signaled = True
        if self._execution is not None:
            grace = min(self._settings.checkpoint_grace_seconds, _SIGNAL_GRACE_SECONDS)
            self._execution.cancel("lost", "the pod was told to end", grace_seconds=grace)
        self._ended.set()

    async def time_to_live(self, hours: float | None = None, *, added: bool = False) -> dict[str, Any]:
        """The seconds until the deadline, after moving it to `hours` from now, or by `hours` if `added`.

        Raises:
            BudgetExceeded: The pod could cost more than what is left.
            ConflictError: The pod is about to end.
        """
        left = max(0.0, self._deadline_at - _now())
        if hours is not None:
            seconds = 3600 * hours + (left if added else 0.0)
            answer = await self._ask("extend_pod", for_worker=self._worker_id, deadline_seconds=seconds)
            if answer["outcome"] == "budget":
                raise BudgetExceeded(
                    f"Pod {self._worker_id} could cost more than what is left of the budget if it had "
                    f"{seconds / 3600:g} hours. Ask for less, or raise the budget."
                )
            if answer["outcome"] != "extended":
                raise ConflictError(f"Pod {self._worker_id} is about to end; its deadline stays.")
            left = float(answer["deadline_seconds"])
            self._heard_deadline(left)
        return {"pod": self._worker_id, "deadline_seconds": left}

    async def _serve(self) -> None:
        loops = [asyncio.create_task(loop()) for loop in (self._keep_beating, self._listen, self._watch)]
        ended = asyncio.create_task(self._ended.wait())
        try:
            done, _ = await asyncio.wait([*loops, ended], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in [*loops, ended]:
                task.cancel()

    async def _reject(self, why: str) -> None:
        while not self._ended.is_set():
            try:
                await self._retire(Verdict(why, unusable=True))
            except OpenWeightsError as exc:
                logger.warning("Cannot say so yet: %s", exc)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _register(self) -> None:
        while not self._ended.is_set():
            try:
                started = _now()
                answer = await self._ask(
                    "register_pod",
                    for_worker=self._worker_id,
                    as_boot=self._boot,
                    lease_seconds=self._settings.lease_seconds,
                    models=self._models,
                    proxy_hash=self._proxy_hash,
                    provider_id=self._provider_id,
                )
            except OpenWeightsError as exc:
                logger.warning("Cannot register yet: %s", exc)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            if answer["outcome"] != "registered":
                logger.info("The ledger says that this pod is to end (%s).", answer["outcome"])
                self._ended.set()
                return
            left = float(answer["deadline_seconds"])
            self._lead_seconds = min(self._settings.checkpoint_grace_seconds, _MOST_LEAD * left)
            self._renewed(started)
            self._heard_deadline(left)
            logger.info("Pod %s is registered.", self._worker_id)
            return

    async def _keep_beating(self) -> None:
        while True:
            await self._beat()
            await asyncio.sleep(self._settings.heartbeat_seconds)

    async def _listen(self) -> None:
        """Beat at once when somebody points at this pod."""
        async for payload in self._hints():
            if payload in ("", self._worker_id):
                await self._beat()

    async def _beat(self) -> None:
        async with self._beat_lock:
            started = _now()
            try:
                answer = await self._ask(
                    "renew_lease",
                    for_worker=self._worker_id,
                    as_boot=self._boot,
                    lease_seconds=self._settings.lease_seconds,
                    models=self._models,
                )
                if answer["fenced"]:
                    await self._lost_lease()
                    return
                self._renewed(started)
                self._heard_deadline(float(answer["deadline_seconds"]))
                await self._obey(answer)
            except OpenWeightsError as exc:
                logger.warning("A heartbeat failed: %s", exc)

    async def _obey(self, answer: Row) -> None:
        if answer["cancel"] and self._execution is not None:
            self._execution.cancel()
        if self._task is not None and not self._task.done():
            return
        if answer["run_id"]:
            await self._give_back(answer["run_id"])
        if self._verdict is not None:
            await self._retire(self._verdict)
        elif answer["shutdown"]:
            await self._release("told to end", forced=True)
        elif self._is_time_to_end():
            await self._release("deadline", forced=True)
        elif self._machine.wants_to_end():
            await self._release("its file `~/shutdown.txt` appeared", forced=True)
        elif answer["next_run"]:
            self._start(UUID(answer["next_run"]))
        elif _now() - self._idle_since > self._settings.pod_idle_seconds:
            await self._release("idle", forced=False)

    def _start(self, run_id: UUID) -> None:
        self._execution = self._executions(run_id, self._boot)
        self._task = asyncio.create_task(self._execute(self._execution))

    async def _execute(self, execution: Executing) -> None:
        try:
            await execution.execute()
        except Exception:
            # The edge of one run: the ledger's lease and reconciler deal with it, the pod goes on.
            logger.exception("Run %s ended in an error of the agent", execution.run_id)
            await asyncio.sleep(_PAUSE_SECONDS)  # what it needs may be down: do not ask without pause
        finally:
            self._settling.add(settling := asyncio.create_task(execution.settle()))
            settling.add_done_callback(self._settling.discard)
            self._verdict = await self._clean(execution)
            if len(self._settling) > _MOST_SETTLING:
                await asyncio.wait(self._settling, return_when=asyncio.FIRST_COMPLETED)
            self._execution = None
            self._task = None
            self._idle_since = _now()
        await self._beat()  # there may be a next one

    async def _clean(self, execution: Executing) -> Verdict | None:
        try:
            return await self._machine.clean(execution.run_id, suspected=execution.gpu_suspected)
        except Exception as exc:  # Of a machine that cannot be cleaned no more is known.
            logger.exception("Cleaning up after run %s failed", execution.run_id)
            return Verdict(f"cleaning up failed: {exc}")

    async def _retire(self, verdict: Verdict) -> None:
        logger.warning("Pod %s takes no more work: %s", self._worker_id, verdict.why)
        if verdict.unusable:
            await self._ask("reject_pod", for_worker=self._worker_id, why=verdict.why)
            self._ended.set()
        else:
            await self._release(verdict.why, forced=True)

    async def _give_back(self, run_id: str) -> None:
        """The ledger holds us to a run that ended in an error here: it is lost, and tried again."""
        why = f"its execution on pod {self._worker_id} ended in an error"
        await self._ask("finish_run", for_run=UUID(run_id), as_boot=self._boot, result="lost", why=why)

    async def _release(self, why: str, *, forced: bool) -> None:
        answer = await self._ask(
            "release_pod", for_worker=self._worker_id, as_boot=self._boot, why=why, forced=forced
        )
        if answer["outcome"] == "draining":
            logger.info("Pod %s ends: %s.", self._worker_id, why)
            self._ended.set()

    async def _watch(self) -> None:
        """What must happen on time, also while the ledger does not answer.

        A run is stopped before its lease can be given away: whoever cannot renew must not go on. It is told
        to end early enough before the deadline to save what it has.
        """
        while True:
            if self._execution is not None:
                if _now() > self._safe_until:
                    logger.error("The lease was not renewed in time: run %s stops.", self._execution.run_id)
                    self._execution.kill()
                elif self._is_time_to_end():
                    grace = self._settings.checkpoint_grace_seconds
                    self._execution.cancel("lost", "the pod reached its deadline", grace_seconds=grace)
            elif _now() > self._deadline_at:
                logger.info("Pod %s ends: deadline.", self._worker_id)
                self._ended.set()
            await asyncio.sleep(_WATCH_SECONDS)

    async def _lost_lease(self) -> None:
        if self._execution is not None:
            self._execution.kill()
        self._boot = self._new_boot()
        await self._register()

    def _renewed(self, at: float) -> None:
        self._safe_until = at + 0.8 * self._settings.lease_seconds

    def _heard_deadline(self, seconds_left: float) -> None:
        self._deadline_at = _now() + seconds_left
        self._machine.heard_deadline(seconds_left)

    def _is_time_to_end(self) -> bool:
        return _now() >= self._deadline_at - self._lead_seconds


def _now() -> float:
    return asyncio.get_running_loop().time()
