"""What each worker counts, in memory that it shares with the process that tells Prometheus.

A worker adds to integers of its own, so a request pays for an addition and no lock; whoever reads adds the workers up. A worker that
died leaves its counts to the one that takes its place.
"""

import mmap
import time

ROUTES = ("scores", "lookup", "status", "openapi", "other")
# The first is what the hot path does not count: the histogram does.
STATUSES = (200, 304, 400, 401, 404, 405, 408, 413, 431, 500, 503)
STATUS = {status: i for i, status in enumerate(STATUSES)}
# Upper ends of the histogram's buckets: 2¹⁴ nanoseconds (16 µs), and each twice the one before, to 1.07 s; then all above.
SHIFT, BUCKETS = 14, 17
BOUNDS = [2 ** (SHIFT + i) / 1e9 for i in range(BUCKETS)]
KEYS, MISSES = 0, 1  # Of batches.
HISTOGRAMS = 2 + len(ROUTES) * len(STATUSES)
OF_A_ROUTE = BUCKETS + 2  # The last is the sum of all times, in nanoseconds.
SLOTS = HISTOGRAMS + len(ROUTES) * OF_A_ROUTE
BYTES = 8 * SLOTS


class Counters:
    """One worker's counts: shape (SLOTS,), unsigned 64-bit."""

    def __init__(self, memory: mmap.mmap | bytearray, worker: int = 0) -> None:
        self.slots = memoryview(memory)[worker * BYTES : (worker + 1) * BYTES].cast("Q")

    def request(self, route: int, status: int, began: int) -> None:
        """An answer with that status; `began` is what `time.perf_counter_ns` said when its request came."""
        slots, took = self.slots, time.perf_counter_ns() - began
        first, bucket = HISTOGRAMS + route * OF_A_ROUTE, (took >> SHIFT).bit_length()
        slots[first + (bucket if bucket < BUCKETS else BUCKETS)] += 1
        slots[first + BUCKETS + 1] += took
        if status != 200:
            slots[2 + route * len(STATUSES) + STATUS[status]] += 1

    def refused(self, status: int) -> None:
        """A connection was answered with that status whatever it wanted."""
        self.request(len(ROUTES) - 1, status, time.perf_counter_ns())

    def batch(self, keys: int, misses: int) -> None:
        """So many keys were looked up in a batch, and so many of them not found."""
        self.slots[KEYS] += keys
        self.slots[MISSES] += misses
