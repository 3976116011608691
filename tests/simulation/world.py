"""One simulation: the real observer, fleet, purchases and agents around a model of everything else."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import traceback
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import httpx

from openweights_prefect.errors import LedgerUnavailable, OpenWeightsError
from openweights_prefect.ledger.identity import hash_secret
from openweights_prefect.pod.agent import Agent
from openweights_prefect.settings import Settings
from openweights_prefect.worker.fleet import Fleet
from openweights_prefect.worker.observer import Observer
from openweights_prefect.worker.purchases import Purchases
from tests.simulation.chaos import Weather, storm
from tests.simulation.model_flow_runs import ModelFlowRuns
from tests.simulation.model_ledger import CONTROL, ORGANIZATION, ModelLedger, Speaker
from tests.simulation.model_pod import AgentDied, SimContainer
from tests.simulation.model_provider import ModelProvider, SimPod
from tests.simulation.model_rows import FINAL, Job, Row
from tests.simulation.people import IMPOSSIBLE, People, Plan
from tests.simulation.virtual_loop import Again, Process, VirtualLoop, outside, seeded_entropy
from tests.simulation.watch import LOOK_SECONDS, Violation, Watch

EPOCH = 1_800_000_000.0
PATIENCE_SECONDS = 30.0
SETTLING_SECONDS = 6 * 3600.0
COST_SECONDS = 60.0
"""By so much the ledger's bill of a pod may be wrong while both sides can be reached."""

# Rounds that change nothing cost most of the time here.
SLOWER = [
    ("worker.observer", "_PASS_SECONDS", 4.0),
    ("worker.observer", "_AGREE_SECONDS", 6.0),
    ("pod.agent", "_WATCH_SECONDS", 2.0),
]


class _Ear(logging.Handler):
    """Hears of errors that the edges of the real loops catch and log: each is a bug that we did not make."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(logging.ERROR)
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(
            error, (AgentDied, OpenWeightsError, AssertionError, httpx.HTTPError)
        ):
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._watch.fail(f"{record.getMessage()}: {error!r} at {where.filename}:{where.lineno}")


@contextmanager
def _overheard(watch: Watch) -> Iterator[None]:
    logger, ear = logging.getLogger("openweights_prefect"), _Ear(watch)
    before = logger.level, logger.propagate
    logger.addHandler(ear)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(ear)
        logger.level, logger.propagate = before
        logger.setLevel(before[0])


class WatchedLedger(ModelLedger):
    """Tells the watch of every change of a job."""

    watch: Watch

    def _set_status(self, job: Job, status: str) -> None:
        self.watch.job_moves(job, status)
        super()._set_status(job, status)

    def do_intend_pod(self, speaker: Speaker, **arguments: Any) -> list[Row]:  # type: ignore[override]
        answer = super().do_intend_pod(speaker, **arguments)
        if answer[0]["outcome"] == "intended":
            self.watch.intended(arguments["pod"]["id"])
        return answer


class Wire:
    """The ledger as one process reaches it, over a network that may be down."""

    def __init__(self, world: World, speaker: Speaker, pod: SimPod | None) -> None:
        self._world = world
        self._speaker = speaker
        self._pod = pod
        self._lost_once: set[tuple[object, float]] = set()

    @property
    def organization_id(self) -> str:
        return ORGANIZATION

    def call(self, function: str, *, patience_seconds: float | None = None, **arguments: Any) -> list[Row]:
        self._pass(function, patience_seconds or PATIENCE_SECONDS)
        self._world.watch.saw_call(self._speaker, function, arguments)
        rows = self._world.ledger.call(self._speaker, function, arguments)
        self._world.watch.look_at_jobs()
        if self._world.losing_answers and self._world.random.random() < 0.1:
            self._world.watch.reached("an answer was lost")
            raise Again(self._world.random.uniform(0.1, 3))
        return rows

    def redeem(self, worker_id: str, bootstrap_hash: str, session: str) -> bool:
        self._pass("redeem_bootstrap", PATIENCE_SECONDS)
        return self._world.ledger.redeem(worker_id, bootstrap_hash, session)

    def close(self) -> None:
        """Nothing to give back."""

    def _pass(self, function: str, patience: float) -> None:
        """Raises when the ledger cannot be reached."""
        world = self._world
        if not (world.ledger_down or (self._pod is not None and world.is_cut(self._pod))):
            return
        _, since = world.loop.caller
        if world.loop.time() - since < patience:
            raise Again(world.random.uniform(0.5, 2))
        world.watch.reached("the ledger did not answer")
        raise LedgerUnavailable(f"The ledger did not answer `{function}` in {patience:g} s.")


class World:
    """Everything of one seed."""

    fleet_class = Fleet
    purchases_class = Purchases
    observer_class = Observer
    agent_class = Agent
    leaks = 0.01
    """How often memory of a GPU stays held after a run."""
    slower: Sequence[tuple[str, str, float]] = SLOWER

    def __init__(self, seed: int, *, weather: Weather | None = None, **options: Any) -> None:
        self.random = Random(seed)
        self.loop = VirtualLoop(lambda: self.random.uniform(0.001, 0.02))
        self.watch = Watch(self.loop.time)
        self.weather = weather or Weather.draw(self.random)
        self.hours = options.pop("hours", None) or self.random.choice([0.5, 1.0, 1.5])
        self.jobs = options.pop("jobs", None) or self.random.randint(10, 60)
        self.calm_at = 3600.0 * self.hours
        self.worker_count = options.pop("workers", None) or self.random.choice([1, 1, 1, 2, 3])
        self.settings = self._settings(**options)
        self.offset = 0.0
        self.ledger = WatchedLedger(self.ledger_time)
        self.ledger.watch = self.watch
        self.ledger.budget = self.random.choice([None, None, None, 40.0, 400.0])
        self.flow_runs = ModelFlowRuns(self.random)
        self.provider = ModelProvider(
            random=self.random,
            witness=self.watch,
            now=self.epoch,
            container=lambda pod: SimContainer(self, pod),
        )
        self.people = People(self, self.random)
        self.watch.ledger, self.watch.provider = self.ledger, self.provider
        self.watch.stop = self.loop.fail
        self.watch.max_workers = self.settings.max_workers
        self.watch.single_worker = self.worker_count == 1
        self.ledger_down = False
        self.losing_answers = False
        self.self_ending = self.random.random() < 0.5
        """Pods can end themselves at the provider."""
        self._listening = self.random.random() < 0.5
        self._listeners: dict[str, list[asyncio.Queue[str]]] = {}
        self._cut_until: dict[str, float] = {}
        self._until: dict[str, float] = {}
        self._jumped_at = float("-inf")
        self._jumped_seconds = 0.0
        """What was measured across a jump is wrong by it, and nobody can know."""
        self._workers: dict[int, Process] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        for host in self.provider.hosts:
            host.bad_gpu = self.random.random() < 0.05
            host.cuda_error = self.random.random() < 0.05

    def _settings(self, **options: Any) -> Settings:
        random = self.random
        lease = random.choice([60, 120, 120])
        known = {
            "organization_id": ORGANIZATION,
            "max_workers": random.choice([2, 4, 8]),
            "lease_seconds": lease,
            "heartbeat_seconds": random.choice([5.0, 10.0, 15.0]) if lease == 120 else 5.0,
            "pod_idle_seconds": random.choice([60, 120, 300]),
            "pod_ttl_hours": random.choice([0.5, 1.5, 24.0]),
            "boot_seconds": random.choice([600, 1500]),
            "home": Path("/nonexistent"),
        }
        return dataclasses.replace(Settings(), **{**known, **options})

    # Time ------------------------------------------------------------------------------------------

    def epoch(self) -> float:
        """The right time in seconds since 1970."""
        return EPOCH + self.loop.time()

    def ledger_time(self) -> float:
        """The ledger's."""
        return EPOCH + self.offset + self.loop.time()

    # From beginning to end -------------------------------------------------------------------------

    def run(self) -> Watch:
        """Let the seed happen; raises `Violation` where an invariant breaks."""
        with ExitStack() as stack:
            stack.enter_context(_overheard(self.watch))
            stack.enter_context(seeded_entropy(Random(self.random.getrandbits(64))))
            stack.enter_context(
                mock.patch("openweights_prefect.worker.observer.notifications", self.notifications)
            )
            for module, name, seconds in self.slower:
                stack.enter_context(mock.patch(f"openweights_prefect.{module}.{name}", seconds))
            self.ledger.notify = self._notify
            try:
                self.loop.run(self._live())
            except Violation:
                raise
            except AssertionError as exc:
                self.watch.note(f"FAILED {exc}")
                raise
        return self.watch

    async def _live(self) -> None:
        for number in range(self.worker_count):
            self.start_worker(number)
        look = self.loop.create_task(self._look())
        submitting = self.loop.create_task(self.people.submit_jobs(self.jobs, 0.6 * self.calm_at))
        await storm(self)
        self._calm_down()
        await submitting
        await self._converge()
        look.cancel()
        self._check_end()

    async def _look(self) -> None:
        able = False
        while True:
            now_able = self._control_is_able()
            if now_able and not able:
                self.watch.able_since = self.loop.time()
            able = self.watch.control_able = now_able
            self.watch.look_at_pods()
            await asyncio.sleep(LOOK_SECONDS)

    def _control_is_able(self) -> bool:
        workers = any(process.alive and not process.paused for process in self._workers.values())
        faults = self.provider.faults
        reachable = not (self.ledger_down or faults.down or faults.revoked or faults.lists or faults.deletes)
        return workers and reachable and not self.flow_runs.down

    def _calm_down(self) -> None:
        self.watch.note("it is calm from here on")
        faults = self.provider.faults
        for waiting in (faults.creates, faults.lists, faults.deletes, faults.boots, faults.no_stock):
            waiting.clear()
        faults.down = faults.revoked = faults.no_funds = False
        faults.hides_seconds = 0.0
        self.ledger_down = self.losing_answers = self.flow_runs.down = self.flow_runs.paused = False
        self.ledger.budget = None
        self._cut_until.clear()
        for number, process in self._workers.items():
            if process.paused:
                process.resume()
            if not process.alive:
                self.start_worker(number)

    async def _converge(self) -> None:
        """Until every job has ended or has its reason, and every pod is gone."""
        until = self.loop.time() + SETTLING_SECONDS
        while self.loop.time() < until:
            await asyncio.sleep(30)
            if not self._open_jobs() and not self.ledger.alive and not self.provider.existing():
                return
        left = [f"{job.id} {job.status} ({job.pending_reason})" for job in self._open_jobs()]
        pods = [f"{pod.id} {pod.status}" for pod in self.ledger.alive.values()]
        existing = [f"{pod.id} {pod.request.name}" for pod in self.provider.existing()]
        self.watch.fail(f"nothing settles: jobs {left}, rows {pods}, pods {existing}")

    def _open_jobs(self) -> list[Job]:
        """Those that are neither finished nor impossible with a reason."""
        return [
            job
            for job in self.ledger.jobs.values()
            if job.status not in FINAL
            and not (
                self.people.kinds[job.id] in IMPOSSIBLE and job.status == "pending" and job.pending_reason
            )
        ]

    def _check_end(self) -> None:
        watch, ledger = self.watch, self.ledger
        if ledger.reservations:
            watch.fail(f"reservations are left: {ledger.reservations}")
        for pod in self.provider.pods.values():
            if pod.foreign and not pod.exists:
                watch.fail(f"foreign pod {pod.id} is gone")
        self._compare_bills()

    def _compare_bills(self) -> None:
        for row in self.ledger.pods.values():
            pods = [pod for pod in self.provider.pods.values() if pod.request.env.get("OW_POD_ID") == row.id]
            bill = sum(self.provider.billed_seconds(pod) * pod.price for pod in pods) / 3600
            cost = self.ledger.cost(row)
            price = max([pod.price for pod in pods], default=row.price_per_hour)
            wrong = (cost - bill) / price * 3600 if price else 0.0
            self.watch.bill_errors.append(wrong)
            if abs(wrong) > COST_SECONDS + self.watch.blind_seconds(pods) + self._jumped_seconds:
                self.watch.fail(
                    f"the bill of {row.id} is {bill:.4f}, the ledger says {cost:.4f}: {wrong:.0f} s"
                )

    # Workers ---------------------------------------------------------------------------------------

    def start_worker(self, number: int) -> None:
        """A process of the control plane."""
        process = Process(self.loop, f"worker {number}")
        self._workers[number] = process
        ledger = Wire(self, CONTROL, None)
        with process:
            provider = self.provider_of_worker()
            purchases = self.purchases_class(
                provider=provider, ledger=ledger, settings=self.settings, announce=self._announce
            )
            fleet = self.fleet_class(
                provider=provider,
                ledger=ledger,
                settings=self.settings,
                purchases=purchases,
                announce=self._announce,
            )
            observer = self.observer_class(
                ledger=ledger,
                flow_runs=self.flow_runs,  # type: ignore[arg-type]
                purchases=purchases,
                fleet=fleet,
                settings=self.settings,
            )
        process.start(self._serve(observer))
        self.watch.note(f"{process.name} starts")

    def provider_of_worker(self) -> Any:
        """The provider as a worker reaches it."""
        return self.provider

    async def _serve(self, observer: Observer) -> None:
        try:
            await observer.run()
        except Exception as exc:
            self.loop.fail(Violation(f"a worker ended: {exc!r}"))

    def kill_worker(self) -> None:
        """SIGKILL at some await of the next seconds, and another one a while later."""
        alive = [
            number
            for number, process in self._workers.items()
            if process.alive and process.dies_after is None
        ]
        if not alive:
            return
        number = self.random.choice(alive)
        process = self._workers[number]
        process.dies_after = self.random.randint(0, 60)

        def dead() -> None:
            self.watch.note(f"{process.name} is killed")
            self.spawn(self._restart_worker(number))

        process.on_death = dead

    async def _restart_worker(self, number: int) -> None:
        await asyncio.sleep(self.random.choice([0.5, 5.0, 60.0]))
        if not self._workers[number].alive:
            self.start_worker(number)

    def pause_worker(self, seconds: float) -> None:
        """SIGSTOP and SIGCONT."""
        running = [process for process in self._workers.values() if process.alive and not process.paused]
        if running:
            process = self.random.choice(running)
            process.pause()
            self.spawn(self._resume(process, seconds))

    async def _resume(self, process: Process, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if process.alive and process.paused:
            self.watch.note(f"{process.name} goes on")
            process.resume()

    def _announce(self, kind: str, worker_id: str, details: object) -> None:
        self.watch.note(f"{kind} {worker_id} {details}")
        self.watch.reached(f"announced: {kind}")

    # Pods ------------------------------------------------------------------------------------------

    def view(self, speaker: Speaker, pod: SimPod) -> Wire:
        """The ledger as a pod reaches it."""
        return Wire(self, speaker, pod)

    def plan_of(self, job_id: str, attempt: int) -> Plan:
        """What an attempt does."""
        return self.people.plan_of(job_id, attempt)

    def hash_of(self, token: str) -> str:
        return hash_secret(token)

    def agent_failed(self, container: SimContainer, _: Exception) -> None:
        """Its container exits, and is started again."""
        with outside():
            self.loop.call_soon(self.provider.crash_container, container.pod)

    def self_terminate(self, pod: SimPod) -> None:
        """A pod asks to be ended, with its own key."""
        if self.self_ending and not self.is_cut(pod) and not self.provider.faults.down:
            self.watch.reached("pod: ended itself")
            self.provider.end_itself(pod)

    def preempt(self, pod: SimPod) -> None:
        """SIGTERM, a grace, and gone."""
        self.watch.reached("pod: preempted")
        if isinstance(pod.container, SimContainer):
            pod.container.terminate()
        self.spawn(self._die_later(pod, self.random.uniform(1, 12)))

    async def _die_later(self, pod: SimPod, seconds: float) -> None:
        how = self.random.choice(["exited", "vanished"])
        await asyncio.sleep(seconds)
        self.provider.die(pod, how)

    def freeze(self, pod: SimPod, seconds: float) -> None:
        """The whole pod stands still, and goes on as if nothing had been."""
        container = pod.container
        if not isinstance(container, SimContainer) or container.process is None or container.process.paused:
            return
        self.watch.reached("pod: frozen")
        container.process.pause()
        self.spawn(self._thaw(container.process, seconds))

    async def _thaw(self, process: Process, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if process.alive:
            self.watch.note(f"{process.name} thaws")
            self.watch.thawed(process)
            process.resume()

    def cut(self, pod: SimPod, seconds: float) -> None:
        """The pod's network is gone for a while."""
        self.watch.reached("pod: cut off")
        self._cut_until[pod.id] = max(self._cut_until.get(pod.id, 0.0), self.loop.time() + seconds)

    def is_cut(self, pod: SimPod) -> bool:
        return self._cut_until.get(pod.id, 0.0) > self.loop.time()

    # Faults that pass --------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Something of the world around."""
        with outside():
            task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def for_a_while(self, name: str, seconds: float) -> None:
        """Set a flag of the world."""
        self._passing(self, name, seconds)

    def fault_for(self, name: str, seconds: float) -> None:
        """Set a flag of the provider's faults."""
        self._passing(self.provider.faults, name, seconds)

    def prefect_away(self, seconds: float) -> None:
        self._passing(self.flow_runs, "down", seconds)

    def pause_pool(self, seconds: float) -> None:
        """Somebody pauses the work pool."""
        self._passing(self.flow_runs, "paused", seconds)

    def no_stock(self, seconds: float) -> None:
        """Some offers, or all, cannot be had."""
        offers = [offer.key for offer in self.provider.every_offer]
        gone = {"*"} if self.random.random() < 0.3 else {*self.random.sample(offers, len(offers) // 2)}
        self.provider.faults.no_stock |= gone
        self.spawn(self._later(seconds, lambda: self.provider.faults.no_stock.difference_update(gone)))

    def hide_pods(self, hidden_seconds: float, seconds: float) -> None:
        """New pods are not listed for a while."""
        self.provider.faults.hides_seconds = hidden_seconds
        self.spawn(self._later(seconds, lambda: setattr(self.provider.faults, "hides_seconds", 0.0)))

    def jump(self) -> None:
        """The ledger's clock is set: back by much, or ahead by less than what a lease has to spare."""
        seconds = self.random.choice([-600.0, -60.0, -15.0, 0.1 * self.settings.lease_seconds])
        if seconds > 0 and self.loop.time() - self._jumped_at < 2 * self.settings.lease_seconds:
            return
        if abs(self.offset + seconds) > 600:
            return  # Beyond what is left to live, a pod that trusts its own clock ends at once.
        if seconds > 0:
            self._jumped_at = self.loop.time()
        self.watch.note(f"the ledger's clock jumps by {seconds:g} s")
        self.offset += seconds
        self._jumped_seconds += abs(seconds)

    def _passing(self, holder: object, name: str, seconds: float) -> None:
        setattr(holder, name, True)
        key = f"{type(holder).__name__}.{name}"
        until = self._until[key] = max(self._until.get(key, 0.0), self.loop.time() + seconds)

        def over() -> None:
            if self.loop.time() >= self._until[key] - 1e-6:
                self.watch.note(f"{name} is over")
                setattr(holder, name, False)

        self.spawn(self._later(until - self.loop.time(), over))

    async def _later(self, seconds: float, act: Any) -> None:
        await asyncio.sleep(seconds)
        act()

    # Notifications -----------------------------------------------------------------------------------

    async def notifications(self, url: str, channel: str) -> AsyncIterator[str]:
        """PostgreSQL's NOTIFY; in some seeds there is none."""
        queue: asyncio.Queue[str] = asyncio.Queue()
        if self._listening:
            self._listeners.setdefault(channel, []).append(queue)
        while True:
            yield await queue.get()

    def _notify(self, channel: str, payload: str) -> None:
        if not self.ledger_down:
            for queue in self._listeners.get(channel, []):
                if channel == "ow_control" or not queue.qsize():
                    queue.put_nowait(payload)

    # What it was -------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """The same for the same seed."""
        summary = sorted((job.id, job.status, job.attempt) for job in self.ledger.jobs.values())
        return hashlib.sha256(f"{self.watch.digest.hexdigest()} {summary}".encode()).hexdigest()
