"""An asyncio loop in virtual time, and processes on it that can be paused and killed at any await.

When nothing is ready, the clock jumps to the next timer. Nothing sleeps and no thread runs:
`asyncio.to_thread` calls its function on the loop, after and before a virtual latency.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")

MOST_AT_ONCE = 100_000
_PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class DeadLock(AssertionError):
    """Something is awaited that no timer and no callback will bring."""


class Runaway(AssertionError):
    """Callbacks go on and on while the clock does not."""


class Again(Exception):
    """Raised by what is called in a thread: it is called again so many seconds later."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Process:
    """Tasks that live and die together, as those of one operating-system process."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.dies_after: int | None = None
        """So many callbacks later it is killed, wherever that is."""
        self.on_death: Callable[[], None] = lambda: None
        self._loop = loop
        self._backlog: list[events.Handle] = []

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine, and all that it starts, as this process."""
        with self:
            return self._loop.create_task(work, name=self.name)

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more, no `finally` either."""
        if self.alive:
            self.alive = False
            self._loop.graveyard += self._backlog
            self._backlog = []
            self.on_death()

    def pause(self) -> None:
        """SIGSTOP: what becomes ready waits."""
        self.paused = True

    def resume(self) -> None:
        """SIGCONT: what became ready runs, in its order."""
        self.paused = False
        backlog, self._backlog = self._backlog, []
        for handle in backlog:
            self._loop.add_ready(handle)

    def admits(self, handle: events.Handle) -> bool:
        """True when a callback of this process may run now; else it is kept or dropped."""
        if self.alive and not self.paused and self.dies_after is None:
            return True
        if self.alive and self.paused:
            self._backlog.append(handle)
            return False
        if self.alive and self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after >= 0:
                return True
            self.kill()
        self._loop.graveyard.append(handle)
        return False

    def __enter__(self) -> Process:
        self._token = _PROCESS.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _PROCESS.reset(self._token)


@contextmanager
def outside() -> Iterator[None]:
    """What is started in here belongs to the world around, whoever started it."""
    token = _PROCESS.set(None)
    try:
        yield
    finally:
        _PROCESS.reset(token)


def current_process() -> Process | None:
    """The one whose callback runs; None for the world around."""
    return _PROCESS.get()


class _Numbered:
    """Hashes by number: sets of tasks and futures are iterated alike in every process."""

    def __init__(self, *args: Any, loop: VirtualLoop, **kwargs: Any) -> None:
        self._number = next(loop.numbers)
        super().__init__(*args, loop=loop, **kwargs)  # type: ignore[call-arg]

    def __hash__(self) -> int:
        return self._number


class _Task(_Numbered, asyncio.Task):  # type: ignore[type-arg]
    pass


class _Future(_Numbered, asyncio.Future):  # type: ignore[type-arg]
    pass


class _Handle(events.Handle):
    """A callback, which runs if its process may."""

    def _run(self) -> None:
        loop: Any = self._loop  # type: ignore[attr-defined]
        loop.steps += 1
        process = self._context.get(_PROCESS)  # type: ignore[attr-defined]
        if process is None or loop.is_over or process.admits(self):
            super()._run()


class _TimerHandle(_Handle):
    """One that is due at some time. Not asyncio's own, whose heap compares in Python."""

    def __init__(self, when: float, callback: Any, args: Any, loop: Any, context: Any) -> None:
        super().__init__(callback, args, loop, context)
        self._at = when

    def when(self) -> float:
        return self._at


class VirtualLoop(asyncio.BaseEventLoop):
    """One thread, virtual seconds, no sockets."""

    def __init__(self, latency: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__()
        self.latency = latency
        """Seconds of one way to what is called in a thread."""
        self.caller: tuple[Process | None, float] = (None, 0.0)
        """Of the call in a thread that is made now: whose it is, and since when."""
        self.is_over = False
        """Nothing is paused, dead or looked at any more: everything unwinds."""
        self.steps = 0
        self.tasks: list[asyncio.Task[Any]] = []
        self.failure: BaseException | None = None
        self.graveyard: list[events.Handle] = []
        """Callbacks of dead processes."""
        self._now = 0.0
        self._at_this_moment = 0
        self._timers: list[tuple[float, int, _TimerHandle]] = []
        self.numbers = itertools.count()
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._note)

    # The clock -------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        """Run what is ready; when nothing is, jump to the next timer."""
        ready: deque[events.Handle] = self._ready  # type: ignore[attr-defined]
        if not ready:
            self._advance(ready)
        count = len(ready)
        self._at_this_moment += count
        if self._at_this_moment > MOST_AT_ONCE:
            raise Runaway(f"{self._at_this_moment} callbacks at {self._now:.3f} s")
        for _ in range(count):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _advance(self, ready: deque[events.Handle]) -> None:
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not timers:
            raise DeadLock(f"nothing will ever happen after {self._now:.3f} s")
        self._at_this_moment = 0
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])

    # Callbacks -------------------------------------------------------------------------------------

    def add_ready(self, handle: events.Handle) -> None:
        """Run a callback that was kept back."""
        self._ready.append(handle)  # type: ignore[attr-defined]

    def _call_soon(self, callback: Any, args: Any, context: Any) -> events.Handle:
        handle = _Handle(callback, args, self, context)
        self.add_ready(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        timer = _TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self.numbers), timer))
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self)

    def _make_task(self, loop: Any, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = _Task(work, loop=self, **options)
        self.tasks.append(task)
        return task

    # What else a loop must have --------------------------------------------------------------------

    def _write_to_self(self) -> None:
        """Nobody else could wake this loop."""

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Call the function on the loop: a way there, the call, a way back."""
        answer = self.create_future()
        process, since = current_process(), self._now
        own, world = contextvars.copy_context(), contextvars.copy_context()
        world.run(_PROCESS.set, None)

        def deliver(value: Any, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        def arrive() -> None:
            value: Any = None
            error: Exception | None = None
            self.caller = (process, since)
            try:
                value = func(*args)
            except AssertionError as exc:
                self.fail(exc)
                raise
            except Again as again:
                self.call_at(self._now + again.seconds, arrive, context=own)
                return
            except Exception as exc:
                error = exc
            if (delay := self.latency()) < self.latency() / 2:
                deliver(value, error)
            else:
                self.call_at(self._now + delay, deliver, value, error, context=own)

        self.call_at(self._now + self.latency(), arrive, context=world)
        return answer

    # From beginning to end -------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end of `work`, then unwind whatever is left."""
        try:
            result = self.run_until_complete(work)
        except BaseException as exc:
            if self.failure is None or self.failure is exc:
                raise
            raise self.failure from None
        else:
            if self.failure is not None:
                raise self.failure
            return result
        finally:
            self._unwind()
            self.close()

    def fail(self, error: BaseException) -> None:
        """Stop at once: `run()` raises it."""
        if self.failure is None:
            self.failure = error
        self.stop()

    def _unwind(self) -> None:
        """Cancel everything, the dead as well, so that nothing is left half done."""
        self.is_over = True
        for handle in self.graveyard:
            self.add_ready(handle)
        for _ in range(50):
            left = [task for task in self.tasks if not task.done()]
            if not left:
                return
            for task in left:
                task.cancel()
            for _ in range(5):
                self.call_soon(self.stop)
                self.run_forever()

    def _note(self, _: Any, context: dict[str, Any]) -> None:
        """An error that nobody awaits; those of the world around end the simulation."""
        error = context.get("exception")
        if isinstance(error, AssertionError) and not self.is_over:
            self.fail(error)


@contextmanager
def seeded_entropy(random: Random) -> Iterator[None]:
    """Whatever asks the system for random bytes gets those of the seed."""
    with mock.patch("os.urandom", random.randbytes), mock.patch("random._urandom", random.randbytes):
        yield
