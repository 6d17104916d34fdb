"""The one thread that touches llama.cpp, and the queue before it."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from kvcompose_local.errors import ContextFull, InvalidInput, KVComposeError, TemplateError
from kvcompose_local.server.requests import Failed, Job, Refused

log = logging.getLogger("kvcompose_local.server")

#: The work of a job, which emits its own events.
Work = Callable[[Job], None]
#: Jobs that may wait. More would wait for long, and clients give up.
BOUND = 512
#: Jobs of one client that may wait, so that others find room.
BOUND_OF_ONE = 256


class FairQueue:
    """Waiting jobs, which clients take turns in: one that asks often does not keep the others waiting."""

    def __init__(self, bound: int = BOUND, bound_of_one: int = BOUND_OF_ONE) -> None:
        self.bound, self._bound_of_one = bound, bound_of_one
        self._waiting: OrderedDict[str, deque[tuple[Job, Work]]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, job: Job, work: Work) -> None:
        """Raises Refused where too many wait."""
        with self._changed:
            own = self._waiting.get(job.client, ())
            if self._closed:
                raise Refused(503, "the server is stopping", retry_after=5)
            n_waiting = sum(map(len, self._waiting.values()))
            if n_waiting >= self.bound or len(own) >= self._bound_of_one:
                bounds = f"at most {self._bound_of_one} of one client's may, and {self.bound} in all"
                what = f"{n_waiting} requests wait already, {len(own)} of them yours: {bounds}"
                raise Refused(503, what, retry_after=10)
            self._waiting.setdefault(job.client, deque()).append((job, work))
            self._changed.notify()

    def before(self, job: Job) -> int:
        """Jobs that wait and come before this one; -1 where it does not wait."""
        with self._changed:
            rows = [[waiting for waiting, _ in jobs] for jobs in self._waiting.values()]
        for turn, row in enumerate(rows):
            if job in row:
                i = row.index(job)
                return i + sum(min(len(other), i + (j < turn)) for j, other in enumerate(rows) if j != turn)
        return -1

    def take(self, timeout: float) -> tuple[Job, Work] | None:
        """The next job, None where there is none for so many seconds."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(timeout)
            if not self._waiting:
                return None
            client, jobs = next(iter(self._waiting.items()))
            taken = jobs.popleft()
            del self._waiting[client]
            if jobs:  # behind the others
                self._waiting[client] = jobs
            return taken

    def close(self) -> list[Job]:
        """Take no more; returns the jobs that wait."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._waiting.values() for job, _ in jobs]
            self._waiting.clear()
            self._changed.notify()
            return left


class Worker:
    """Runs jobs one after another, between ``at_start`` and ``at_the_end``; where there are none, ``at_rest``."""

    def __init__(
        self, at_start: Callable[[], None], at_rest: Callable[[], None], at_the_end: Callable[[], None]
    ) -> None:
        self.queue = FairQueue()
        self.running: Job | None = None
        self._at_start, self._at_rest, self._at_the_end = at_start, at_rest, at_the_end
        self.is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job, work: Work) -> None:
        """Raises Refused where too many wait."""
        self.queue.put(job, work)

    def stop(self) -> None:
        """End what runs at its next token, and take no more; returns at once."""
        self.is_stopping.set()
        for job in self.queue.close():
            job.emit(Failed(Refused(503, "the server is stopping", retry_after=5)))
        if running := self.running:
            running.cancel()

    def join(self, timeout: float) -> bool:
        """Whether all is in order within so many seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._at_start()
        while not self.is_stopping.is_set():
            taken = self.queue.take(1.0)
            try:
                if taken is None:
                    self._at_rest()
                    continue
            except Exception as error:  # the next request must not find a dead thread
                log.warning("%s", error if isinstance(error, KVComposeError) else f"unexpected {type(error).__name__}")
                continue
            self.running, work = taken
            if not self.running.is_cancelled:
                self._work(self.running, work)
            self.running = None
        self._at_the_end()

    def _work(self, job: Job, work: Work) -> None:
        try:
            work(job)
        except Refused as error:
            job.emit(Failed(error))
        except ContextFull as error:
            job.emit(Failed(Refused(400, str(error), code="context_length_exceeded")))
        except (InvalidInput, TemplateError) as error:
            job.emit(Failed(Refused(400, str(error))))
        except MemoryError:
            job.emit(Failed(Refused(503, "out of memory: lower --keep, --ctx or --budget", retry_after=30)))
        except KVComposeError as error:
            job.emit(Failed(Refused(503, str(error), retry_after=30)))
        except Exception as error:  # the next request must not find a dead thread
            log.exception("unexpected %s", type(error).__name__)
            job.emit(Failed(Refused(500, f"unexpected {type(error).__name__}")))
