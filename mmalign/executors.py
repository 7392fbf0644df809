"""Where work runs: worker processes on this machine (the default), or inline for debugging.

An executor opens a session for a recipe; a session says what the loaded object is and turns items into outcomes, batch by batch and in
any order. That is all the evaluation asks, so a cluster (Ray) is one more class with `open`; only the driver writes the store.

What can go wrong with a batch, and what becomes of it:

    an exception, a wrong number of results, out of memory    halved, and halved again, until only the guilty item fails
    no answer in time                                         the worker is killed and restarted, the items go singly
    the worker dies                                           once: the batch goes again; twice: the items go singly
    a single item                                             Failure at once, or after its third dead worker
    workers die while loading beside others that work         after the third the run goes on with those others

A model or scorer that cannot be loaded is an error of the run, raised once. Inline has no timeouts and cannot survive a crash.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, Self

from mmalign.types import Failure, Kind, MmalignError, Stage
from mmalign.worker import BatchFailure, Description, LoadFailure, Outcome, Recipe, Served, load_failure

Outcomes = list[tuple[int, Outcome]]  # (position of the item, what became of it)

CRASHES_OF_A_BATCH = 2
CRASHES_OF_AN_ITEM = 3
CRASHES_WHILE_LOADING = 3


class Session(Protocol):
    """A loaded object, somewhere. Leave it (`with`) to free what it holds."""

    @property
    def description(self) -> Description: ...

    def run(self, items: Sequence[Any], batch: int) -> Iterator[Outcomes]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Executor(Protocol):
    """A place where work runs."""

    def open(self, recipe: Recipe) -> Session: ...


@dataclass
class Task:
    """Items that travel together, and how many workers have died on them."""

    positions: list[int]
    crashes: int = 0


class Schedule:
    """Which batches are still to be done, and how a batch that failed is split. No clocks, no processes."""

    def __init__(self, count: int, batch: int, stage: Stage) -> None:
        self._stage = stage
        self._waiting = deque(Task(list(range(start, min(start + batch, count)))) for start in range(0, count, batch))

    def __len__(self) -> int:
        return len(self._waiting)

    def next(self) -> Task:
        return self._waiting.popleft()

    def finish(self, task: Task, reply: list[Outcome] | BatchFailure) -> Outcomes:
        """Take a worker's reply; what is not settled goes back to the front, so that a batch ends before new ones begin."""
        if not isinstance(reply, BatchFailure):
            return list(zip(task.positions, reply, strict=True))
        if len(task.positions) == 1:
            return self._give_up(task, reply.kind, reply.message)
        middle = len(task.positions) // 2
        self._waiting.extendleft([Task(task.positions[middle:]), Task(task.positions[:middle])])
        return []

    def time_out(self, task: Task, message: str) -> Outcomes:
        if len(task.positions) == 1:
            return self._give_up(task, "timeout", message)
        self._put_back_singly(task)
        return []

    def crash(self, task: Task, message: str) -> Outcomes:
        task.crashes += 1
        if len(task.positions) == 1 and task.crashes >= CRASHES_OF_AN_ITEM:
            return self._give_up(task, "error", f"{message} This happened {task.crashes} times with this item alone.")
        if len(task.positions) > 1 and task.crashes >= CRASHES_OF_A_BATCH:
            self._put_back_singly(task)
        else:
            self._waiting.appendleft(task)
        return []

    def _put_back_singly(self, task: Task) -> None:
        self._waiting.extendleft(Task([position]) for position in reversed(task.positions))

    def _give_up(self, task: Task, kind: Kind, message: str) -> Outcomes:
        return [(task.positions[0], Outcome(Failure(self._stage, kind, message), 0.0))]


@dataclass(frozen=True)
class Inline:
    """Runs in this process: for debugging, and for objects that are loaded here anyway."""

    device: str = "cpu"

    def open(self, recipe: Recipe) -> InlineSession:
        try:
            return InlineSession(recipe, Served(recipe, self.device))
        except Exception as error:  # worker boundary: loading runs a plug-in's code
            raise load_failure(recipe, error).error() from error


@dataclass
class InlineSession:
    recipe: Recipe
    served: Served

    @property
    def description(self) -> Description:
        return self.served.description

    def run(self, items: Sequence[Any], batch: int) -> Iterator[Outcomes]:
        schedule = Schedule(len(items), batch, self.recipe.stage)
        while schedule:
            task = schedule.next()
            done = schedule.finish(task, self.served.run([items[position] for position in task.positions]))
            if done:
                yield done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self.served  # frees the weights


@dataclass(frozen=True)
class Processes:
    """Worker processes on this machine, one batch at a time each, on the devices in turn.

    A batch may take `seconds_per_item` for each of its items; loading may take `load_seconds`.
    """

    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    devices: tuple[str, ...] = ("cpu",)
    seconds_per_item: float = 600.0
    load_seconds: float = 1800.0

    def open(self, recipe: Recipe) -> ProcessSession:
        return ProcessSession(recipe, self)


@dataclass
class _Worker:
    """One process as its driver sees it. `task` is None while it loads or waits."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    device: str
    deadline: float
    is_ready: bool = False
    task: Task | None = None

    def kill(self) -> None:
        """End the process and all that it started (it leads its own process group)."""
        try:
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone, or killed before it made its group
            self.process.kill()
        self.process.join()
        self.connection.close()


class ProcessSession:
    """The driver's side of `Processes`: starts, feeds, watches, kills and restarts workers."""

    def __init__(self, recipe: Recipe, settings: Processes) -> None:
        self._recipe, self._settings = recipe, settings
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._most_workers = settings.workers
        self._deaths_while_loading = 0
        self._description: Description | None = None
        try:
            while self._description is None:
                if not self._workers:
                    self._start()
                self._watch(None, [])
        except BaseException:
            self.__exit__()
            raise

    @property
    def description(self) -> Description:
        assert self._description is not None
        return self._description

    def run(self, items: Sequence[Any], batch: int) -> Iterator[Outcomes]:
        schedule = Schedule(len(items), batch, self._recipe.stage)
        while schedule or self._busy():
            while len(self._workers) < min(self._most_workers, len(schedule) + self._busy()):
                self._start()
            self._feed(schedule, items)
            done = self._watch(schedule, items)
            if done:
                yield done

    def _busy(self) -> int:
        return sum(worker.task is not None for worker in self._workers)

    def _start(self) -> None:
        taken = [worker.device for worker in self._workers]
        device = min(self._settings.devices, key=taken.count)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._recipe, device, os.getpid()), name=f"mmalign {self._recipe}")
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, device, time.monotonic() + self._settings.load_seconds))

    def _feed(self, schedule: Schedule, items: Sequence[Any]) -> None:
        for worker in self._workers:
            if schedule and worker.is_ready and worker.task is None:
                worker.task = schedule.next()
                worker.deadline = time.monotonic() + self._settings.seconds_per_item * len(worker.task.positions)
                with suppress(OSError):  # it died while idle: _watch finds it and puts the task back
                    worker.connection.send([items[position] for position in worker.task.positions])

    def _watch(self, schedule: Schedule | None, items: Sequence[Any]) -> Outcomes:
        """Wait for the first thing to happen, handle all that has happened, and hand out new work before returning outcomes."""
        active = [worker for worker in self._workers if worker.task is not None or not worker.is_ready]
        patience = max(0.0, min(worker.deadline for worker in active) - time.monotonic())
        happened = set(wait([thing for worker in self._workers for thing in (worker.connection, worker.process.sentinel)], patience))
        done: Outcomes = []
        for worker in list(self._workers):
            if happened & {worker.connection, worker.process.sentinel}:
                done += self._hear(worker, schedule)
            elif worker in active and time.monotonic() >= worker.deadline:
                done += self._time_out(worker, schedule)
        if schedule is not None:
            self._feed(schedule, items)  # before the caller's disk writes, so that no worker waits for them
        return done

    def _hear(self, worker: _Worker, schedule: Schedule | None) -> Outcomes:
        try:
            message = worker.connection.recv() if worker.connection.poll() else None
        except (EOFError, OSError):
            message = None
        if message is None:
            return self._bury(worker, schedule)
        if isinstance(message, LoadFailure):
            raise message.error()
        if isinstance(message, Description):
            self._welcome(worker, message)
            return []
        assert schedule is not None and worker.task is not None
        task, worker.task = worker.task, None
        return schedule.finish(task, message)

    def _welcome(self, worker: _Worker, description: Description) -> None:
        first = self._description or description
        if (description.name, description.fingerprint, description.options) != (first.name, first.fingerprint, first.options):
            raise MmalignError(
                f"The {self._recipe} changed while it ran: fingerprint {first.fingerprint} at the start, {description.fingerprint} now. "
                "Its files must not be edited during a run; what is saved belongs to the first. Run the same command again."
            )
        self._description, worker.is_ready, self._deaths_while_loading = first, True, 0

    def _bury(self, worker: _Worker, schedule: Schedule | None) -> Outcomes:
        """A worker has died: forget it, and let the schedule decide on its batch."""
        worker.process.join(5)
        code = worker.process.exitcode or 0
        self._remove(worker)
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if not worker.is_ready:
            self._deaths_while_loading += 1
            if self._deaths_while_loading >= CRASHES_WHILE_LOADING and any(other.is_ready for other in self._workers):
                self._most_workers, self._deaths_while_loading = len(self._workers), 0  # the machine bears no more than these
            elif self._deaths_while_loading >= CRASHES_WHILE_LOADING:
                raise MmalignError(
                    f"The worker of the {self._recipe} died {CRASHES_WHILE_LOADING} times while loading ({cause}). SIGKILL often means "
                    "that memory ran out: try fewer workers (-j), a smaller dtype, or a machine with more memory."
                )
        if schedule is None or worker.task is None:
            return []
        return schedule.crash(worker.task, f"The worker died ({cause}) while it ran the {self._recipe}.")

    def _time_out(self, worker: _Worker, schedule: Schedule | None) -> Outcomes:
        self._remove(worker)
        if not worker.is_ready:
            limit = self._settings.load_seconds
            raise MmalignError(f"The {self._recipe} did not load within {limit:g} s. Raise the limit, or look at what it waits for.")
        assert schedule is not None and worker.task is not None
        limit = self._settings.seconds_per_item
        return schedule.time_out(worker.task, f"The {self._recipe} gave no answer within {limit:g} s for this item and was stopped.")

    def _remove(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._workers):
            self._remove(worker)


def _work(connection: Connection, recipe: Recipe, device: str, driver: int) -> None:
    """A worker process: load, say what was loaded, then answer batches until the driver goes away."""
    os.setpgid(0, 0)  # so that the driver can end it with all its children, and Ctrl-C is the driver's to handle
    _die_with(driver)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output belongs to the command's own answer
    try:
        served = Served(recipe, device)
    except Exception as error:  # noqa: BLE001 (worker boundary: loading runs a plug-in's code)
        connection.send(load_failure(recipe, error))
        return
    connection.send(served.description)
    while True:
        try:
            items = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(served.run(items))


def _die_with(driver: int) -> None:
    """No orphans: end when the driver ends, also by kill -9, and also while a plug-in holds the interpreter."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != driver:
            os._exit(1)
        return

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
