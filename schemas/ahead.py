"""Making things ahead of those who use them, so that both have a core of their own: Arrow, NumPy and files let go of Python's lock."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
_END = object()


def ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The items in their order, made in a thread of their own, up to `depth` of them before they are asked for, from now on."""
    made, thread = iter(items), ThreadPoolExecutor(1)
    return _made(made, thread, collections.deque(thread.submit(next, made, _END) for _ in range(depth)))


def _made(made: Iterator[T], thread: ThreadPoolExecutor, waiting: "collections.deque[Future[T | object]]") -> Iterator[T]:
    try:
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, made, _END))
            yield item  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)


def each_ahead(function: Callable[[T], U], items: Iterable[T], threads: int, depth: int) -> Iterator[U]:
    """`function` of each item, in their order, made by so many threads; no more than `depth` items are taken before their turn."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque[Future[U]]()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
