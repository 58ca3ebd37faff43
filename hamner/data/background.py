"""The module lets an iterator run ahead in a background thread."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

LEAVE_SECONDS = 2.0
"""longest that a thread which is no longer wanted is waited for"""


class NotReady(Exception):
    """No item is there yet. It is no TimeoutError, which the iterator itself may have raised."""


class Prefetcher(Generic[Item]):
    """A prefetcher takes items from an iterator in a thread and keeps up to `depth` of them ready.

    An exception of the iterator, its end included, is raised instead of the item that it would have
    been, and again from then on.
    """

    def __init__(self, items: Iterator[Item], depth: int, name: str) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(
            target=_run, args=(items, self._queue, self._stop), name=name, daemon=True
        )
        # For an owner that never calls `close`, and for the interpreter's exit.
        shared = (self._queue, self._stop, self._thread)
        self._finalizer = weakref.finalize(self, _stop, *shared)
        self._thread.start()

    def get(self, timeout: float | None = None) -> Item:
        """The item is the next one of the iterator.

        Args:
            timeout: seconds to wait; None waits for ever.

        Raises:
            NotReady: no item in that time; a later call may have it.
            StopIteration: the iterator has ended.
            RuntimeError: after `close`.
            Exception: whatever the iterator raised.
        """
        if self._stop.is_set():
            raise RuntimeError("closed")
        if self._end is None:
            try:
                item, self._end = self._queue.get(timeout=timeout)
            except queue.Empty:
                raise NotReady from None
        if self._end is not None:
            raise self._end
        return item

    def close(self) -> None:
        """The thread stops; `close` waits for it, but not for a network that does not answer."""
        self._finalizer()


def _run(items: Iterator[Item], output: queue.Queue, stop: threading.Event) -> None:
    """The thread runs this; it does not know the prefetcher, which can be collected meanwhile."""
    try:
        for item in items:
            output.put((item, None))
            if stop.is_set():
                return
        end: BaseException = StopIteration()
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        end = error
    output.put((None, end))


def _stop(output: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    with contextlib.suppress(queue.Empty):
        output.get_nowait()  # room for the one item that the thread may still put
    if thread is not threading.current_thread():
        # A thread inside a call to the network does not see the flag. It is a daemon, so it
        # cannot hold up the process's end.
        thread.join(timeout=LEAVE_SECONDS)
