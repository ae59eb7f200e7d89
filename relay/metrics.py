"""What Prometheus sees: every name starts with ``pgtrickle_relay_``.

`METRICS` is the whole list, in the order of the exposition, each with its meaning, its labels and
where the board has it. Labels are bounded: a pipeline's name, its direction, the type of a backend,
the kind of an error, a state, the reason of a refusal. ``backend`` is the side in question: the
sink's for what is published or written, the source's for what is polled or consumed.

Counters of a pipeline start at 0 when it is described here; when it is gone, so are its series.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import msgspec
from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from relay import __version__
from relay.board import Board, Histogram, PipelineStats
from relay.catalog import DEAD_LETTERS_COUNTED
from relay.errors import ErrorKind
from relay.events import Direction, LagObserved, OutboxObserved, PipelineState

PREFIX = "pgtrickle_relay_"
INBOX_BACKEND = "pg-inbox"

# One value, one for each value of the metric's own label, or None before anything was observed.
Reading = float | Mapping[str, float] | Histogram | None


class MetricSpec(msgspec.Struct, frozen=True):
    """One metric, and how it is read: of each pipeline, of each outbox, or of the relay.

    ``of_idle``: of a pipeline that no relay runs, where that has it too. ``side`` says whose
    backend its label names, None where it has no such label. ``by``: a label of its own. ``of``:
    the only direction that has it, None for both.
    """

    name: str
    help: str
    read: Callable[[PipelineStats], Reading] | None = None
    of_idle: Callable[[LagObserved], float] | None = None
    of_outbox: Callable[[OutboxObserved], float | None] | None = None
    of_relay: Callable[[Board], float] | None = None
    by: str | None = None
    side: Literal["source", "sink"] | None = None
    of: Direction | None = None
    is_histogram: bool = False

    @property
    def type(self) -> Literal["counter", "gauge", "histogram"]:
        """By Prometheus' rule for names (https://prometheus.io/docs/practices/naming/)."""
        if self.is_histogram:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def label_names(self) -> Sequence[str]:
        """All labels of its series, in order."""
        common = [] if self.read is None else ["pipeline", "direction"]
        common = common if self.of_outbox is None else ["outbox"]
        backend = [] if self.side is None else ["backend"]
        return [*common, *backend, *([] if self.by is None else [self.by])]


METRICS: Sequence[MetricSpec] = (
    MetricSpec(
        "messages_published_total",
        "Messages that the sink of a forward pipeline has accepted.",
        read=lambda stats: stats.accepted,
        side="sink",
        of="forward",
    ),
    MetricSpec(
        "messages_consumed_total",
        "Messages of a reverse pipeline's source that its sink has accepted.",
        read=lambda stats: stats.accepted,
        side="source",
        of="reverse",
    ),
    MetricSpec(
        "batches_committed_total",
        "Batches that the source has acknowledged durably.",
        read=lambda stats: stats.acknowledged_batches,
    ),
    MetricSpec(
        "polls_total",
        "Polls that returned, with or without messages.",
        read=lambda stats: stats.polls,
    ),
    MetricSpec(
        "publish_errors_total",
        "Failed attempts to connect the sink or to publish, each to be repeated.",
        read=lambda stats: stats.retries["sink"],
        side="sink",
    ),
    MetricSpec(
        "source_errors_total",
        "Failures of the source, each followed by a new connection, and of dead-letter writes.",
        read=lambda stats: stats.retries["source"],
        side="source",
    ),
    MetricSpec(
        "worker_messages_published_total",
        "The same of each worker, where a pipeline of a consumer group has several here.",
        read=lambda stats: {str(n): worker.accepted for n, worker in stats.workers.items()},
        by="worker",
        of="forward",
    ),
    MetricSpec(
        "worker_healthy",
        "1 while this one of several workers of a pipeline is healthy.",
        read=lambda stats: {
            str(n): float(not worker.trouble()) for n, worker in stats.workers.items()
        },
        by="worker",
        of="forward",
    ),
    MetricSpec(
        "leases_lost_total",
        "Leases of a consumer group that ran out before their rows were settled.",
        read=lambda stats: stats.leases_lost,
        of="forward",
    ),
    MetricSpec(
        "errors_total",
        "Failed attempts, dead-lettered messages and entries into failed or suspended, by kind.",
        read=lambda stats: {kind.value: stats.errors[kind] for kind in ErrorKind},
        by="kind",
    ),
    MetricSpec(
        "batch_publish_duration_seconds",
        "From the first attempt of a batch until all of it was accepted or dead-lettered.",
        read=lambda stats: stats.publish_durations,
        side="sink",
        is_histogram=True,
    ),
    MetricSpec(
        "poll_duration_seconds",
        "Duration of a poll, the wait for something to arrive included.",
        read=lambda stats: stats.poll_durations,
        side="source",
        is_histogram=True,
    ),
    MetricSpec(
        "delivery_latency_seconds",
        "From a message's creation until the sink accepted it.",
        read=lambda stats: stats.delivery_latencies,
        side="sink",
        is_histogram=True,
    ),
    MetricSpec(
        "claim_check_fetches_total",
        "Pages of claim-check rows that were read.",
        read=lambda stats: stats.claim_check_pages,
    ),
    MetricSpec(
        "full_refresh_batches_total",
        "Polled batches with rows of a full refresh.",
        read=lambda stats: stats.full_refresh_batches,
    ),
    MetricSpec(
        "inbox_writes_total",
        "Rows inserted into an inbox.",
        read=lambda stats: _of_inbox(stats, stats.accepted - stats.duplicates),
    ),
    MetricSpec(
        "inbox_dedup_skips_total",
        "Messages that an inbox already had and skipped.",
        read=lambda stats: _of_inbox(stats, stats.duplicates),
    ),
    MetricSpec(
        "dlq_depth",
        f"Dead letters that wait for an operator, counted up to {DEAD_LETTERS_COUNTED}.",
        read=lambda stats: stats.dead_letters,
        of_idle=lambda lag: lag.dead_letters,
    ),
    MetricSpec(
        "dlq_entries_total",
        "Messages that became dead letters.",
        read=lambda stats: stats.dead_lettered,
    ),
    MetricSpec(
        "messages_filtered_total",
        "Messages that `ops` or `where` of the pipeline left out.",
        read=lambda stats: stats.filtered,
    ),
    MetricSpec(
        "webhook_refused_total",
        "Requests that a webhook receiver did not answer with 200, by reason.",
        read=lambda stats: stats.refusals,
        by="reason",
        of="reverse",
    ),
    MetricSpec(
        "last_committed_offset",
        "The last committed position, where it is a number.",
        read=lambda stats: stats.offset,
    ),
    MetricSpec(
        "consumer_lag_rows",
        "Outbox rows that are not yet delivered.",
        read=lambda stats: None if stats.lag is None else stats.lag.lag_rows,
        of_idle=lambda lag: lag.lag_rows,
        of="forward",
    ),
    MetricSpec(
        "oldest_unsent_age_seconds",
        "Age of the oldest outbox row that is not yet delivered, 0 without any.",
        read=lambda stats: None if stats.lag is None else stats.lag.oldest_unsent_age_s,
        of_idle=lambda lag: lag.oldest_unsent_age_s,
        of="forward",
    ),
    MetricSpec(
        "source_lag",
        "Messages that the broker has for the source and that are not acknowledged, if it tells.",
        read=lambda stats: stats.source_lag,
        side="source",
        of="reverse",
    ),
    MetricSpec(
        "source_connected",
        "1 while the source is connected.",
        read=lambda stats: stats.source_connected,
        side="source",
    ),
    MetricSpec(
        "sink_connected",
        "1 while the sink is connected.",
        read=lambda stats: stats.sink_connected,
        side="sink",
    ),
    MetricSpec(
        "pipeline_state",
        "1 for the state in which the pipeline is, 0 for the others.",
        read=lambda stats: {state.value: state is stats.state for state in PipelineState},
        by="state",
    ),
    MetricSpec(
        "pipeline_healthy",
        "1 while the pipeline is healthy, as /health says; it has the reason where it is not.",
        read=lambda stats: not stats.trouble(),
    ),
    MetricSpec(
        "pipeline_stalled",
        "1 when there was something to do and no progress for metrics.stalled_after_s.",
        read=lambda stats: stats.is_stalled(),
    ),
    MetricSpec(
        "last_progress_timestamp_seconds",
        "Unix time at which a batch was last acknowledged.",
        read=lambda stats: None if stats.progress_at is None else stats.progress_at.timestamp(),
    ),
    MetricSpec(
        "pipelines_owned",
        "Pipelines that this relay alone runs; receivers, which every relay runs, are not counted.",
        of_relay=lambda board: board.owned,
    ),
    MetricSpec(
        "pipelines_unowned",
        "Enabled pipelines of the group that none of its relays owns.",
        of_relay=lambda board: len(board.catalog.unowned),
    ),
    MetricSpec(
        "outbox_rows",
        "Rows of an outbox, as PostgreSQL last estimated them.",
        of_outbox=lambda outbox: outbox.rows,
    ),
    MetricSpec(
        "outbox_bytes",
        "Bytes of an outbox on disk, with its indexes and claim checks.",
        of_outbox=lambda outbox: outbox.bytes,
    ),
    MetricSpec(
        "capture_problems",
        "What relay_capture_problems() finds wrong with the capture of an outbox.",
        of_outbox=lambda outbox: outbox.capture_problems,
    ),
    MetricSpec(
        "group_members",
        "Relays that share the pipelines.",
        of_relay=lambda board: board.members,
    ),
    MetricSpec(
        "database_connected",
        "1 while the relay's own database is connected.",
        of_relay=lambda board: board.is_database_connected,
    ),
    MetricSpec(
        "build_info",
        "Always 1; the version is a label.",
        of_relay=lambda _: 1,
        by="version",
    ),
)


class Metrics:
    """Renders what the board counts, and Prometheus' usual metrics of the process."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._process = ProcessCollector(registry=None)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that an ``Accept`` header asks for, and its content type.

        Text is made in a thread: many pipelines give many lines, and the loop has better to do.
        """
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Frozen([self._family(spec) for spec in METRICS]))
        registry.register(self._process)
        return await asyncio.to_thread(encode, registry), content_type

    def _family(self, spec: MetricSpec) -> Metric:
        name, labels = PREFIX + spec.name, spec.label_names
        read: list[tuple[list[str], Reading]] = []
        if spec.of_relay is not None:
            read = [([__version__] if labels else [], spec.of_relay(self._board))]
        elif spec.read is not None:
            running = self._board.pipelines
            read = [
                (_labels_of(spec, stats), spec.read(stats))
                for stats in running.values()
                if spec.of in (None, stats.direction)
            ]
            if spec.of_idle is not None:
                read += [
                    ([lag.pipeline, lag.direction], spec.of_idle(lag))
                    for lag in self._board.catalog.idle
                    if spec.of in (None, lag.direction) and lag.pipeline not in running
                ]
        elif spec.of_outbox is not None:
            outboxes = self._board.catalog.outboxes
            read = [([outbox.outbox], spec.of_outbox(outbox)) for outbox in outboxes]
        if spec.type == "histogram":
            histogram = HistogramMetricFamily(name, spec.help, labels=labels)
            for common, value in read:
                if isinstance(value, Histogram):
                    histogram.add_metric(common, *value.cumulative())
            return histogram
        make = CounterMetricFamily if spec.type == "counter" else GaugeMetricFamily
        family = make(name, spec.help, labels=labels)
        for common, value in read:
            if isinstance(value, Mapping):
                for own, part in value.items():
                    family.add_metric([*common, own], part)
            elif not isinstance(value, Histogram | None):
                family.add_metric(common, value)
        return family


class _Frozen(Collector):
    """What the encoder reads in its thread."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _labels_of(spec: MetricSpec, stats: PipelineStats) -> list[str]:
    """The values of its labels, but for its own last one (kind, state)."""
    common = [stats.name, stats.direction]
    if spec.side is None:
        return common
    return [*common, stats.source if spec.side == "source" else stats.sink]


def _of_inbox(stats: PipelineStats, messages: int) -> int:
    return messages if stats.sink == INBOX_BACKEND else 0
