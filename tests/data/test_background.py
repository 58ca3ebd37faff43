import gc
import threading
import weakref

import pytest

from hamner.data.background import NotReady, Prefetcher


def test_items_come_in_order_and_then_the_end():
    prefetcher = Prefetcher(iter(range(20)), 3, "test")
    assert [prefetcher.get() for _ in range(20)] == list(range(20))
    for _ in range(2):
        with pytest.raises(StopIteration):
            prefetcher.get()


def test_exception_arrives_in_its_place_and_stays():
    def items():
        yield 1
        yield 2
        raise KeyError("broken")

    prefetcher = Prefetcher(items(), 8, "test")
    assert [prefetcher.get(), prefetcher.get()] == [1, 2]
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            prefetcher.get()


def test_time_out_of_the_iterator_is_not_a_slow_item():
    def items():
        raise TimeoutError("read timed out")
        yield

    with pytest.raises(TimeoutError, match="read timed out"):
        Prefetcher(items(), 1, "test").get(timeout=60)


def test_slow_item_times_out_and_is_not_lost():
    ready = threading.Event()

    def items():
        ready.wait()
        yield 1

    prefetcher = Prefetcher(items(), 1, "test")
    with pytest.raises(NotReady):
        prefetcher.get(timeout=0.05)
    ready.set()
    assert prefetcher.get() == 1


def test_never_more_than_depth_items_ahead():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    prefetcher = Prefetcher(items(), 4, "test")
    assert prefetcher.get() == 0
    prefetcher.close()
    assert len(made) <= 1 + 4 + 1  # handed out, in the queue, waiting for room


def test_close_and_collection_end_the_thread():
    def items():
        yield from iter(int, 1)

    for end in ("close", "collect"):
        prefetcher = Prefetcher(items(), 1, "test")
        thread = prefetcher._thread
        assert prefetcher.get() == 0
        if end == "close":
            prefetcher.close()
            with pytest.raises(RuntimeError, match="closed"):
                prefetcher.get()
        else:
            gone = weakref.ref(prefetcher)
            del prefetcher
            gc.collect()
            assert gone() is None
        assert not thread.is_alive()
