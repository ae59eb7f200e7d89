"""Rates and latencies of the last minute, and histograms since ever, in constant memory."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from relay.board.status import Latency

RATE_SECONDS = 60

_SLOT_S = 10.0
_SLOTS = 6
_SAMPLES_OF_A_BATCH = 100
# From 100 µs in steps of a twelfth of a doubling (6 %) to more than an hour.
_BOUNDS_S = [0.0001 * 2 ** (step / 12) for step in range(310)]


class RateWindow:
    """Counts per second, for the last `RATE_SECONDS` complete ones and the present one."""

    def __init__(self) -> None:
        self._counts = [0] * (RATE_SECONDS + 1)
        self._second = 0

    def add(self, messages: int, clock_s: float) -> None:
        self._move_to(math.floor(clock_s))
        self._counts[self._second % len(self._counts)] += messages

    def history(self, clock_s: float) -> Sequence[int]:
        """Of the complete seconds, the earliest first."""
        self._move_to(math.floor(clock_s))
        size = len(self._counts)
        return [self._counts[(self._second + 1 + age) % size] for age in range(RATE_SECONDS)]

    def _move_to(self, second: int) -> None:
        for skipped in range(max(self._second + 1, second - RATE_SECONDS), second + 1):
            self._counts[skipped % len(self._counts)] = 0
        self._second = max(self._second, second)


class LatencyWindow:
    """Latencies of the last minute in fine buckets, one histogram for each ten seconds.

    Of a large batch every n-th latency counts for n, so that a batch costs the same at any size.
    """

    def __init__(self) -> None:
        self._slots: deque[tuple[float, list[int]]] = deque(maxlen=_SLOTS)

    def add(self, latencies_s: Sequence[float], clock_s: float) -> None:
        if not latencies_s:
            return
        if not self._slots or clock_s - self._slots[-1][0] >= _SLOT_S:
            self._slots.append((clock_s, [0] * (len(_BOUNDS_S) + 1)))
        counts = self._slots[-1][1]
        stride = -(-len(latencies_s) // _SAMPLES_OF_A_BATCH)
        for latency_s in latencies_s[::stride]:
            counts[bisect_right(_BOUNDS_S, latency_s)] += stride

    def percentiles(self, clock_s: float) -> Latency | None:
        """None where the last minute saw none."""
        while self._slots and clock_s - self._slots[0][0] >= _SLOT_S * _SLOTS:
            self._slots.popleft()
        if not self._slots:
            return None
        merged = [sum(column) for column in zip(*(slot[1] for slot in self._slots), strict=True)]
        total = sum(merged)
        return Latency(
            p50_s=_quantile(merged, total * 0.50),
            p95_s=_quantile(merged, total * 0.95),
            p99_s=_quantile(merged, total * 0.99),
        )


class Histogram:
    """Counts per bucket; many observations at once cost one sort."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: Sequence[float]) -> None:
        """A clock that is ahead of the database's gives no negative latency, but 0."""
        if not seconds:
            return
        ascending = sorted(seconds)
        if ascending[0] < 0:
            ascending = [max(0.0, value) for value in ascending]
        below = 0
        for bucket, bound_s in enumerate(self._bounds_s):
            through = bisect_right(ascending, bound_s, below)
            self._counts[bucket] += through - below
            below = through
        self._counts[-1] += len(ascending) - below
        self._sum_s += math.fsum(ascending)

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Buckets as Prometheus wants them, each with all below it, and the sum in seconds."""
        running = 0
        buckets = []
        for bound_s, count in zip((*self._bounds_s, math.inf), self._counts, strict=True):
            running += count
            buckets.append(("+Inf" if math.isinf(bound_s) else str(bound_s), float(running)))
        return buckets, self._sum_s


def _quantile(counts: Sequence[int], rank: float) -> float:
    """The upper bound of the bucket in which the message of that rank lies."""
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= rank:
            return _BOUNDS_S[min(bucket, len(_BOUNDS_S) - 1)]
    return _BOUNDS_S[-1]
