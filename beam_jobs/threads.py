"""Two elements of a bundle at a time, each in a thread: on the local runner it is what uses the second core."""

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apache_beam as beam
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from schemas.ahead import ahead

# Each has all rows of its unit in memory.
_AT_A_TIME = 2


class InThreads(beam.DoFn):
    """`function` of elements, as `beam.Map` has it, where one takes a second or more."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._function, self._arguments = function, arguments

    def start_bundle(self) -> None:
        # Threads that go on, since what an allocator keeps for a thread is lost for all others: one an element took 50 MiB more.
        self._threads, self._pending = ThreadPoolExecutor(_AT_A_TIME), collections.deque[Iterator[Any]]()

    def process(self, element: Any) -> Iterator[Any]:
        if len(self._pending) == _AT_A_TIME:
            yield from self._pending.popleft()
        self._pending.append(self._begin(element))

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for made in self._pending:
            yield from map(in_global_window, made)
        self._threads.shutdown()

    def _begin(self, element: Any) -> Iterator[Any]:
        done = self._threads.submit(self._function, element, *self._arguments)
        return (future.result() for future in (done,))


class EachInThreads(InThreads):
    """The same as `beam.FlatMap` has it: of what `function` gives, a few are made before they are asked for."""

    def _begin(self, element: Any) -> Iterator[Any]:
        return ahead(self._function(element, *self._arguments))


def in_global_window(value: Any) -> WindowedValue:
    """What a bundle's end yields."""
    return WindowedValue(value, GlobalWindow().max_timestamp(), (GlobalWindow(),))
