"""What Prometheus sees: every name starts with ``pgtrickle_relay_``.

`METRICS` is the whole list, in the order of the exposition, each with its meaning and labels.
Labels are bounded: a pipeline's name, its direction, the type of a backend, the kind of an error,
a state. ``backend`` is the side in question: the sink's for what is published or written, the
source's for what is polled or consumed.

Counters of a pipeline start at 0 when it is described here; when it is gone, so are its series.
"""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from relay import __version__
from relay.board import Roster
from relay.errors import ErrorKind
from relay.events import (
    BatchAcknowledged,
    BatchPublished,
    ClaimCheckFetched,
    ConnectionChanged,
    DatabaseChanged,
    DeadLettered,
    DeadLettersRetried,
    Direction,
    Event,
    LagObserved,
    OwnershipChanged,
    PipelineDescribed,
    PipelineEvent,
    PipelineState,
    Polled,
    Retried,
    StateChanged,
)

PREFIX = "pgtrickle_relay_"
INBOX_BACKEND = "pg-inbox"

_PIPELINE = ("pipeline", "direction")
_DURATION_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
_LATENCY_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    300.0, 1800.0, 3600.0,
)  # fmt: skip


class MetricSpec(msgspec.Struct, frozen=True):
    """One metric; ``side`` says whose backend its label names, None where it has no such label.

    ``of``: the only direction that has it, None for both. ``bounds_s``: of a histogram's buckets.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Sequence[str] = _PIPELINE
    side: Literal["source", "sink"] | None = None
    of: Direction | None = None
    bounds_s: Sequence[float] = ()

    @property
    def label_names(self) -> Sequence[str]:
        """All labels of its series, in order."""
        return self.labels if self.side is None else (*self.labels, "backend")


METRICS: Sequence[MetricSpec] = (
    MetricSpec(
        "messages_published_total",
        "counter",
        "Messages that the sink of a forward pipeline has accepted.",
        side="sink",
        of="forward",
    ),
    MetricSpec(
        "messages_consumed_total",
        "counter",
        "Messages of a reverse pipeline's source that its sink has accepted.",
        side="source",
        of="reverse",
    ),
    MetricSpec(
        "batches_committed_total",
        "counter",
        "Batches that the source has acknowledged durably.",
    ),
    MetricSpec("polls_total", "counter", "Polls that returned, with or without messages."),
    MetricSpec(
        "publish_errors_total",
        "counter",
        "Failed attempts to connect the sink or to publish, each to be repeated.",
        side="sink",
    ),
    MetricSpec(
        "source_errors_total",
        "counter",
        "Failures of the source, each followed by a new connection, and of dead-letter writes.",
        side="source",
    ),
    MetricSpec(
        "errors_total",
        "counter",
        "Failed attempts, dead-lettered messages and entries into failed or suspended, by kind.",
        labels=(*_PIPELINE, "kind"),
    ),
    MetricSpec(
        "batch_publish_duration_seconds",
        "histogram",
        "From the first attempt of a batch until all of it was accepted or dead-lettered.",
        side="sink",
        bounds_s=_DURATION_BOUNDS_S,
    ),
    MetricSpec(
        "poll_duration_seconds",
        "histogram",
        "Duration of a poll, the wait for something to arrive included.",
        side="source",
        bounds_s=_DURATION_BOUNDS_S,
    ),
    MetricSpec(
        "delivery_latency_seconds",
        "histogram",
        "From a message's creation until the sink accepted it.",
        side="sink",
        bounds_s=_LATENCY_BOUNDS_S,
    ),
    MetricSpec("claim_check_fetches_total", "counter", "Pages of claim-check rows that were read."),
    MetricSpec(
        "full_refresh_batches_total",
        "counter",
        "Polled batches with rows of a full refresh.",
    ),
    MetricSpec("inbox_writes_total", "counter", "Rows inserted into an inbox."),
    MetricSpec(
        "inbox_dedup_skips_total", "counter", "Messages that an inbox already had and skipped."
    ),
    MetricSpec("dlq_depth", "gauge", "Dead letters that wait for an operator."),
    MetricSpec("dlq_entries_total", "counter", "Messages that became dead letters."),
    MetricSpec(
        "last_committed_offset", "gauge", "The last committed position, where it is a number."
    ),
    MetricSpec(
        "consumer_lag_rows", "gauge", "Outbox rows that are not yet delivered.", of="forward"
    ),
    MetricSpec(
        "oldest_unsent_age_seconds",
        "gauge",
        "Age of the oldest outbox row that is not yet delivered, 0 without any.",
        of="forward",
    ),
    MetricSpec("source_connected", "gauge", "1 while the source is connected.", side="source"),
    MetricSpec("sink_connected", "gauge", "1 while the sink is connected.", side="sink"),
    MetricSpec(
        "pipeline_state",
        "gauge",
        "1 for the state in which the pipeline is, 0 for the others.",
        labels=(*_PIPELINE, "state"),
    ),
    MetricSpec(
        "pipeline_stalled",
        "gauge",
        "1 when there was something to do and no progress for metrics.stalled_after_s.",
    ),
    MetricSpec(
        "last_progress_timestamp_seconds",
        "gauge",
        "Unix time at which a batch was last acknowledged.",
    ),
    MetricSpec(
        "pipelines_owned",
        "gauge",
        "Pipelines that this relay alone runs; receivers, which every relay runs, are not counted.",
        labels=(),
    ),
    MetricSpec("group_members", "gauge", "Relays that share the pipelines.", labels=()),
    MetricSpec(
        "database_connected",
        "gauge",
        "1 while the relay's own database is connected.",
        labels=(),
    ),
    MetricSpec("build_info", "gauge", "Always 1; the version is a label.", labels=("version",)),
)


class Metrics:
    """An observer that counts, and renders what it counted; own registry, no process metrics.

    ``stalled`` is asked at every scrape which pipelines are stalled (`relay.board.Board.stalled`).
    ``now`` gives the time of day in seconds since 1970.
    """

    def __init__(
        self,
        *,
        stalled: Callable[[], Mapping[str, bool]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._stalled = stalled
        self._now = now
        self._roster = Roster()
        self._pipelines: dict[str, _Series] = {}
        self._owned = 0
        self._members = 0
        self._database_connected = False

    def __call__(self, event: Event) -> None:
        """Count one event."""
        for name in self._roster.observe(event):
            self._pipelines.pop(name, None)
        if isinstance(event, PipelineEvent):
            if event.pipeline in self._roster:
                self._series(event).observe(event, self._now())
        elif isinstance(event, OwnershipChanged):
            self._owned = len(event.pipelines) - len(event.everywhere)
            self._members = event.members
        elif isinstance(event, DatabaseChanged):
            self._database_connected = event.is_connected

    def families(self) -> list[Metric]:
        """All metrics as they stand, as a copy that nobody changes."""
        stalled = self._stalled()
        for name, series in self._pipelines.items():
            series.values["pipeline_stalled", ""] = float(stalled.get(name, False))
        return [self._family(spec) for spec in METRICS]

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that an ``Accept`` header asks for, and its content type.

        Text is made in a thread: many pipelines give many lines, and the loop has better to do.
        """
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Frozen(self.families()))
        return await asyncio.to_thread(encode, registry), content_type

    def _series(self, event: PipelineEvent) -> _Series:
        series = self._pipelines.get(event.pipeline)
        if isinstance(event, PipelineDescribed):
            labels = (event.direction, event.source, event.sink)
            if series is None or (series.direction, series.source, series.sink) != labels:
                series = _Series(*labels)
        elif series is None:
            series = _Series(event.direction, "", "")
        self._pipelines[event.pipeline] = series
        return series

    def _family(self, spec: MetricSpec) -> Metric:
        name = PREFIX + spec.name
        if spec.type == "histogram":
            histogram = HistogramMetricFamily(name, spec.help, labels=spec.label_names)
            for pipeline, series in self._pipelines.items():
                if spec.of in (None, series.direction):
                    buckets, total = series.histograms[spec.name].cumulative()
                    histogram.add_metric(series.labels_of(spec, pipeline), buckets, total)
            return histogram
        make = CounterMetricFamily if spec.type == "counter" else GaugeMetricFamily
        family = make(name, spec.help, labels=spec.label_names)
        for labels, value in self._values(spec):
            family.add_metric(labels, value)
        return family

    def _values(self, spec: MetricSpec) -> Iterator[tuple[Sequence[str], float]]:
        match spec.name:
            case "pipelines_owned":
                yield (), float(self._owned)
            case "group_members":
                yield (), float(self._members)
            case "database_connected":
                yield (), float(self._database_connected)
            case "build_info":
                yield (__version__,), 1.0
            case _:
                for pipeline, series in self._pipelines.items():
                    yield from series.values_of(spec, pipeline)


class _Frozen(Collector):
    """What the encoder reads in its thread."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Series:
    """What is counted for one pipeline, under the metric's name and the value of its own label."""

    def __init__(self, direction: Direction, source: str, sink: str) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        self.values: dict[tuple[str, str], float] = {}
        self.histograms: dict[str, _Histogram] = {}
        for spec in METRICS:
            if "pipeline" not in spec.labels or spec.of not in (None, direction):
                continue
            if spec.type == "histogram":
                self.histograms[spec.name] = _Histogram(spec.bounds_s)
            elif "kind" in spec.labels:
                self.values.update({(spec.name, kind.value): 0.0 for kind in ErrorKind})
            elif "state" in spec.labels:
                self.values.update({(spec.name, state.value): 0.0 for state in PipelineState})
            elif spec.type == "counter" or spec.name in ("source_connected", "sink_connected"):
                self.values[spec.name, ""] = 0.0

    def values_of(self, spec: MetricSpec, pipeline: str) -> Iterator[tuple[Sequence[str], float]]:
        """The series of one metric: none where nothing was observed yet."""
        common = self.labels_of(spec, pipeline)
        if "kind" in spec.labels:
            keys = [kind.value for kind in ErrorKind]
        elif "state" in spec.labels:
            keys = [state.value for state in PipelineState]
        else:
            if (spec.name, "") in self.values:
                yield common, self.values[spec.name, ""]
            return
        for key in keys:
            yield (*common, key), self.values[spec.name, key]

    def labels_of(self, spec: MetricSpec, pipeline: str) -> Sequence[str]:
        """The values of a metric's labels, but for its own last one (kind, state)."""
        if spec.side is None:
            return pipeline, self.direction
        return pipeline, self.direction, self.source if spec.side == "source" else self.sink

    def observe(self, event: PipelineEvent, now: float) -> None:
        match event:
            case Polled():
                self._add("polls_total", 1)
                self._add("full_refresh_batches_total", int(event.full_refresh))
                self.histograms["poll_duration_seconds"].observe(event.duration_s)
            case BatchPublished():
                self._settled(event)
            case BatchAcknowledged():
                self._add("batches_committed_total", 1)
                self._set("last_progress_timestamp_seconds", now)
                if event.offset is not None:
                    self._set("last_committed_offset", event.offset)
            case Retried():
                name = "publish_errors_total" if event.side == "sink" else "source_errors_total"
                self._add(name, 1)
                self._add("errors_total", 1, event.kind.value)
            case DeadLettered():
                self._add("dlq_entries_total", event.messages)
                self._add("dlq_depth", event.messages)
                self._add("errors_total", event.messages, event.kind.value)
            case DeadLettersRetried():
                self._accepted(event.delivered, duplicates=0)
                self._set("dlq_depth", max(0.0, self._get("dlq_depth") - event.delivered))
            case StateChanged():
                self._changed(event.state)
            case ConnectionChanged():
                self._set(f"{event.side}_connected", float(event.is_connected))
            case ClaimCheckFetched():
                self._add("claim_check_fetches_total", 1)
            case LagObserved():
                self._set("dlq_depth", event.dead_letters)
                if self.direction == "forward":
                    self._set("consumer_lag_rows", event.lag_rows)
                    self._set("oldest_unsent_age_seconds", event.oldest_unsent_age_s)
            case _:
                pass

    def _settled(self, event: BatchPublished) -> None:
        self._accepted(event.messages, duplicates=event.duplicates)
        if event.messages or event.dead_lettered:
            self.histograms["batch_publish_duration_seconds"].observe(event.duration_s)
        self.histograms["delivery_latency_seconds"].observe_many(event.latencies_s)

    def _accepted(self, messages: int, *, duplicates: int) -> None:
        is_forward = self.direction == "forward"
        self._add("messages_published_total" if is_forward else "messages_consumed_total", messages)
        if self.sink == INBOX_BACKEND:
            self._add("inbox_writes_total", messages - duplicates)
            self._add("inbox_dedup_skips_total", duplicates)

    def _changed(self, state: PipelineState) -> None:
        for other in PipelineState:
            self._set("pipeline_state", float(other is state), other.value)
        if state is PipelineState.FAILED:
            self._add("errors_total", 1, ErrorKind.CONFIGURATION.value)
        elif state is PipelineState.SUSPENDED:
            self._add("errors_total", 1, ErrorKind.OUTAGE.value)

    def _get(self, name: str, key: str = "") -> float:
        return self.values.get((name, key), 0.0)

    def _set(self, name: str, value: float, key: str = "") -> None:
        self.values[name, key] = value

    def _add(self, name: str, amount: float, key: str = "") -> None:
        self.values[name, key] = self._get(name, key) + amount


class _Histogram:
    """Counts per bucket; many observations at once cost one sort."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.observe_many((seconds,))

    def observe_many(self, seconds: Sequence[float]) -> None:
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
