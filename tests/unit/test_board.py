"""The board: what it remembers, and what it calls well, stalled, delivered and gone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from relay.board import RATE_SECONDS, RECENT_BATCHES, Board, PipelineStatus
from relay.errors import ErrorKind, MessageRejected, Outage
from relay.events import (
    BatchAcknowledged,
    BatchPublished,
    CatalogObserved,
    ConnectionChanged,
    DatabaseChanged,
    DeadLettered,
    DeadLettersRetried,
    Direction,
    LagObserved,
    OwnershipChanged,
    PipelineDescribed,
    PipelineState,
    Polled,
    RequestRefused,
    Retried,
    Side,
    StateChanged,
)
from tests.unit.in_memory import Line, message

STALLED_AFTER_S = 60.0
STARTED_AT = datetime(2026, 1, 1, tzinfo=UTC)


class Stage:
    """A board with a clock in our hands, and short words for events."""

    def __init__(self) -> None:
        self.clock_s = 0.0
        self.jump_s = 0.0
        self.board = Board(
            worker_id="w1",
            group_id="default",
            stalled_after_s=STALLED_AFTER_S,
            mask=lambda text: text.replace("hunter22", "******"),
            clock=lambda: self.clock_s,
            now=lambda: STARTED_AT + timedelta(seconds=self.clock_s + self.jump_s),
        )
        self.board(DatabaseChanged(is_connected=True))

    def described(self, name: str = "p", direction: Direction = "forward") -> None:
        self.board(
            PipelineDescribed(
                pipeline=name,
                direction=direction,
                source="outbox" if direction == "forward" else "nats",
                sink="nats" if direction == "forward" else "pg-inbox",
                settings={"sink": {"password": "******"}},
            )
        )

    def state(self, state: PipelineState, reason: str = "", name: str = "p") -> None:
        self.board(StateChanged(pipeline=name, direction="forward", state=state, reason=reason))

    def running(self, name: str = "p", direction: Direction = "forward") -> None:
        self.described(name, direction)
        self.state(PipelineState.STARTING, name=name)
        self.connected("source", name=name)
        self.connected("sink", name=name)
        self.state(PipelineState.RUNNING, name=name)

    def connected(self, side: Side, *, is_connected: bool = True, name: str = "p") -> None:
        self.board(
            ConnectionChanged(
                pipeline=name, direction="forward", side=side, is_connected=is_connected
            )
        )

    def polled(self, messages: int, rejected: int = 0) -> None:
        self.board(
            Polled(
                pipeline="p",
                direction="forward",
                messages=messages,
                rejected=rejected,
                full_refresh=False,
                duration_s=0.01,
            )
        )

    def published(
        self,
        messages: int,
        *,
        duplicates: int = 0,
        dead_lettered: int = 0,
        latencies_s: tuple[float, ...] = (),
    ) -> None:
        if dead_lettered:
            self.board(
                DeadLettered(
                    pipeline="p",
                    direction="forward",
                    messages=dead_lettered,
                    kind=ErrorKind.MESSAGE,
                    error="not for this sink",
                )
            )
        self.board(
            BatchPublished(
                pipeline="p",
                direction="forward",
                messages=messages,
                duplicates=duplicates,
                dead_lettered=dead_lettered,
                duration_s=0.02,
                attempts=1,
                latencies_s=latencies_s,
            )
        )

    def acknowledged(self, messages: int, offset: int = 0) -> None:
        self.board(
            BatchAcknowledged(
                pipeline="p",
                direction="forward",
                messages=messages,
                checkpoint=str(offset),
                offset=offset,
            )
        )

    def delivered(self, messages: int, offset: int = 0) -> None:
        self.polled(messages)
        self.published(messages)
        self.acknowledged(messages, offset)

    def lag(self, rows: int, age_s: float = 0.0, dead_letters: int = 0) -> None:
        self.board(
            LagObserved(
                pipeline="p",
                direction="forward",
                lag_rows=rows,
                oldest_unsent_age_s=age_s,
                dead_letters=dead_letters,
            )
        )

    def retried(self, error: str = "refused", side: Side = "source") -> None:
        self.state(PipelineState.RETRYING, error)
        self.board(
            Retried(
                pipeline="p",
                direction="forward",
                side=side,
                attempt=1,
                delay_s=1.0,
                kind=ErrorKind.OUTAGE,
                error=error,
            )
        )

    def refused(self, status: int, reason: str) -> None:
        self.board(RequestRefused(pipeline="p", direction="forward", status=status, reason=reason))

    def owned(self, *names: str, members: int = 1) -> None:
        self.board(OwnershipChanged(pipelines=names, members=members))

    @property
    def names(self) -> list[str]:
        return [pipeline.name for pipeline in self.board.snapshot().pipelines]

    @property
    def pipeline(self) -> PipelineStatus:
        (pipeline,) = self.board.snapshot().pipelines
        return pipeline


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_new_board_says_that_the_database_is_not_connected() -> None:
    board = Board(worker_id="w", group_id="g", stalled_after_s=1, mask=str)

    status = board.snapshot()

    assert not status.is_ready
    assert not status.is_healthy
    assert status.trouble == "the database is not connected"


def test_it_is_ready_once_the_database_is_connected_and_ownership_was_told(stage: Stage) -> None:
    assert not stage.board.snapshot().is_ready

    stage.owned(members=3)

    status = stage.board.snapshot()
    assert status.is_ready
    assert status.members == 3


def test_a_lost_database_is_degraded_with_its_reason_masked(stage: Stage) -> None:
    stage.board(DatabaseChanged(is_connected=False, reason="refused hunter22"))

    status = stage.board.snapshot()

    assert status.trouble == "refused ******"
    assert not status.is_ready


def test_a_running_pipeline_shows_what_it_connects_and_both_connections(stage: Stage) -> None:
    stage.running()

    shown = stage.pipeline

    assert (shown.source, shown.sink, shown.direction) == ("outbox", "nats", "forward")
    assert shown.settings == {"sink": {"password": "******"}}
    assert shown.state is PipelineState.RUNNING
    assert shown.source_connected
    assert shown.sink_connected
    assert shown.is_healthy


def test_counts_checkpoint_offset_and_recent_batches_follow_the_batches(stage: Stage) -> None:
    stage.running()
    stage.polled(10, rejected=2)
    assert stage.pipeline.in_flight == 12

    stage.published(9, duplicates=3, dead_lettered=3)
    stage.acknowledged(12, offset=77)

    shown = stage.pipeline
    assert (shown.published, shown.consumed) == (9, 0)
    assert (shown.duplicates, shown.dead_lettered) == (3, 3)
    assert (shown.checkpoint, shown.offset, shown.in_flight) == ("77", 77, 0)
    (batch,) = shown.recent_batches
    assert (batch.messages, batch.dead_lettered, batch.checkpoint) == (9, 3, "77")
    assert shown.last_progress_at == STARTED_AT


def test_only_the_latest_batches_are_kept_and_without_their_latencies(stage: Stage) -> None:
    stage.running()

    for offset in range(RECENT_BATCHES + 5):
        stage.delivered(1, offset)

    kept = stage.pipeline.recent_batches
    assert [batch.checkpoint for batch in kept] == [str(n) for n in range(5, RECENT_BATCHES + 5)]


def test_a_reverse_pipeline_counts_what_its_sink_accepted_as_consumed(stage: Stage) -> None:
    stage.running(direction="reverse")

    stage.delivered(4)

    assert (stage.pipeline.published, stage.pipeline.consumed) == (0, 4)


def test_delivered_dead_letters_count_as_published(stage: Stage) -> None:
    stage.running()

    stage.board(DeadLettersRetried(pipeline="p", direction="forward", delivered=5, failed=1))

    assert stage.pipeline.published == 5


def test_the_last_error_is_masked_and_has_its_time(stage: Stage) -> None:
    stage.running()
    stage.clock_s = 7.0

    stage.board(
        DeadLettered(
            pipeline="p",
            direction="forward",
            messages=1,
            kind=ErrorKind.MESSAGE,
            error="no hunter22",
        )
    )

    assert stage.pipeline.last_error == "no ******"
    assert stage.pipeline.last_error_at == STARTED_AT + timedelta(seconds=7)
    assert stage.pipeline.errors == 1


def test_reasons_of_states_are_masked(stage: Stage) -> None:
    stage.running()

    stage.state(PipelineState.FAILED, "password hunter22 refused")

    assert stage.pipeline.reason == "password ****** refused"
    assert stage.pipeline.trouble == "failed: password ****** refused"


def test_since_is_when_the_state_was_entered_whatever_its_reason_has_been_since(
    stage: Stage,
) -> None:
    stage.running()
    stage.clock_s = 5.0
    stage.retried("first")
    stage.clock_s = 8.0
    stage.retried("second")

    assert stage.pipeline.since == STARTED_AT + timedelta(seconds=5)
    assert stage.pipeline.reason == "second"


@pytest.mark.parametrize("state", [PipelineState.FAILED, PipelineState.SUSPENDED])
def test_failed_and_suspended_are_unhealthy_at_once(stage: Stage, state: PipelineState) -> None:
    stage.running()

    stage.state(state, "why")

    assert stage.pipeline.trouble == f"{state.value}: why"
    assert stage.board.snapshot().trouble == "not healthy: p"


def test_what_no_relay_takes_for_a_while_is_not_healthy_and_what_is_paused_is(
    stage: Stage,
) -> None:
    idle = [
        LagObserved(
            pipeline=name,
            direction="forward",
            lag_rows=7,
            oldest_unsent_age_s=1.0,
            dead_letters=0,
        )
        for name in ("free", "held", "off")
    ]
    seen = CatalogObserved(outboxes=[], unowned=["free", "held"], idle=idle)
    stage.board(OwnershipChanged(pipelines=[], members=2, blocked={"held": "pid 7"}))

    stage.board(seen)
    stage.clock_s = 14.0
    stage.board(seen)
    at_once = stage.board.snapshot()
    stage.clock_s = 15.0
    while_held = stage.board.snapshot()
    stage.board(OwnershipChanged(pipelines=[], members=2))
    later = stage.board.snapshot()
    stage.board(CatalogObserved(outboxes=[], unowned=[], idle=idle[2:]))

    assert (at_once.unowned, at_once.paused) == ([], {"off": 7})
    assert while_held.unowned == ["free"]
    assert later.unowned == ["free", "held"]
    assert later.trouble == "no relay of the group runs: free, held"
    assert stage.board.snapshot().is_healthy


def test_a_short_retry_is_healthy_and_a_long_one_is_not(stage: Stage) -> None:
    stage.running()
    stage.retried("refused", side="sink")
    stage.clock_s = 9.0
    assert stage.pipeline.is_healthy

    stage.clock_s = 11.0

    assert stage.pipeline.trouble == "no progress for 11 s: refused"


def test_a_source_that_connects_and_fails_in_turn_does_not_look_healthy(stage: Stage) -> None:
    stage.running()

    for _ in range(12):
        stage.retried("closed by the server")
        stage.clock_s += 1.0
        stage.state(PipelineState.RUNNING)

    assert stage.pipeline.state is PipelineState.RUNNING
    assert stage.pipeline.trouble == "no progress for 12 s: closed by the server"


def test_an_acknowledged_batch_ends_the_trouble(stage: Stage) -> None:
    stage.running()
    stage.retried()
    stage.clock_s = 30.0
    stage.state(PipelineState.RUNNING)
    assert not stage.pipeline.is_healthy

    stage.delivered(1)

    assert stage.pipeline.is_healthy


def test_a_poll_that_found_nothing_ends_the_trouble_of_a_running_pipeline(stage: Stage) -> None:
    stage.running()
    stage.retried()
    stage.clock_s = 30.0
    stage.state(PipelineState.RUNNING)

    stage.polled(0)

    assert stage.pipeline.is_healthy


def test_polls_do_not_end_the_trouble_of_a_sink_that_is_away(stage: Stage) -> None:
    stage.running()
    stage.polled(5)
    stage.retried(side="sink")

    stage.clock_s = 30.0
    stage.polled(0)

    assert not stage.pipeline.is_healthy


def test_a_clock_that_jumps_changes_no_judgement(stage: Stage) -> None:
    stage.running()
    stage.retried()

    stage.jump_s = 86_400.0

    assert stage.pipeline.is_healthy


def test_messages_in_flight_that_do_not_settle_are_a_stall(stage: Stage) -> None:
    stage.running()
    stage.polled(5)
    stage.clock_s = STALLED_AFTER_S - 1
    assert not stage.board.pipelines["p"].is_stalled()

    stage.clock_s = STALLED_AFTER_S

    assert stage.pipeline.is_stalled
    assert stage.pipeline.trouble == "stalled: 5 messages in flight, none settled"
    assert stage.board.pipelines["p"].is_stalled()


def test_an_outbox_that_is_ahead_of_a_pipeline_that_finds_nothing_is_a_stall(stage: Stage) -> None:
    stage.running()
    for _ in range(13):
        stage.lag(3, age_s=stage.clock_s)
        stage.polled(0)
        stage.clock_s += 5.0

    assert stage.pipeline.trouble == "stalled: 3 rows behind and nothing moves"


def test_a_pipeline_of_which_all_messages_die_is_not_well_until_one_is_accepted(
    stage: Stage,
) -> None:
    stage.running()
    stage.published(3, dead_lettered=2)
    assert stage.pipeline.is_healthy

    stage.published(0, dead_lettered=1)
    assert stage.pipeline.is_healthy
    stage.published(0, dead_lettered=6)

    assert stage.pipeline.trouble == "the last 7 messages became dead letters: not for this sink"
    stage.lag(0, dead_letters=0)
    assert stage.pipeline.is_healthy
    stage.lag(0, dead_letters=9)
    stage.published(1)
    assert stage.pipeline.is_healthy


def test_a_receiver_that_refuses_every_request_is_not_well(stage: Stage) -> None:
    stage.running()
    stage.refused(404, "unknown_path")
    assert stage.pipeline.is_healthy
    stage.refused(401, "unauthorized")

    assert stage.pipeline.trouble == (
        "requests are refused, and none was accepted: 401, unauthorized"
    )
    assert stage.pipeline.refused == {"unknown_path": 1, "unauthorized": 1}
    stage.delivered(1)
    assert stage.pipeline.is_healthy
    stage.clock_s += 61.0
    stage.refused(413, "too_large")
    assert not stage.pipeline.is_healthy
    stage.clock_s += 61.0
    stage.polled(0)
    assert stage.pipeline.is_healthy


def test_a_backlog_that_moves_is_not_a_stall(stage: Stage) -> None:
    stage.running()

    for offset in range(20):
        stage.lag(1_000_000, age_s=3_600.0)
        stage.delivered(10, offset)
        stage.clock_s += 30.0

    assert not stage.pipeline.is_stalled


def test_lag_that_was_observed_before_the_last_progress_is_not_a_stall(stage: Stage) -> None:
    stage.running()
    stage.lag(3)
    stage.delivered(3)

    stage.clock_s = STALLED_AFTER_S + 1
    stage.polled(0)

    assert not stage.pipeline.is_stalled


def test_an_idle_pipeline_is_not_stalled_by_its_first_message(stage: Stage) -> None:
    stage.running()
    stage.clock_s = 3_600.0
    stage.polled(0)

    stage.polled(1)

    assert not stage.pipeline.is_stalled


def test_a_source_whose_poll_never_returns_is_a_stall(stage: Stage) -> None:
    stage.running(direction="reverse")
    stage.polled(0)

    stage.clock_s = STALLED_AFTER_S

    assert stage.pipeline.trouble == "stalled: the source does not answer"


def test_a_pipeline_that_never_gets_to_run_is_a_stall(stage: Stage) -> None:
    stage.described()
    stage.state(PipelineState.STARTING)

    stage.clock_s = STALLED_AFTER_S

    assert stage.pipeline.trouble == "stalled: still starting"


def test_a_lost_source_takes_its_messages_in_flight_back(stage: Stage) -> None:
    stage.running()
    stage.polled(5)
    stage.published(5)

    stage.connected("source", is_connected=False)
    stage.connected("source")
    stage.delivered(2, offset=9)

    assert stage.pipeline.in_flight == 0
    (batch,) = stage.pipeline.recent_batches
    assert (batch.messages, batch.checkpoint) == (2, "9")


def test_completed_pipelines_are_healthy_and_drained(stage: Stage) -> None:
    stage.running()
    stage.delivered(2)
    stage.state(PipelineState.COMPLETED)
    stage.clock_s = 3_600.0

    assert stage.pipeline.is_healthy
    assert stage.pipeline.is_drained


def test_a_forward_pipeline_is_drained_when_its_measured_lag_is_zero(stage: Stage) -> None:
    stage.running()
    assert stage.pipeline.undelivered == "not measured yet"
    stage.lag(4)
    assert stage.pipeline.undelivered == "4 rows behind"
    stage.polled(4)
    assert stage.pipeline.undelivered == "4 messages in flight"

    stage.published(4)
    stage.acknowledged(4)
    stage.lag(0)

    assert stage.pipeline.is_drained


def test_a_reverse_pipeline_is_drained_when_it_runs_and_finds_nothing(stage: Stage) -> None:
    stage.described(direction="reverse")
    stage.state(PipelineState.STARTING)
    assert stage.pipeline.undelivered == "starting"
    stage.state(PipelineState.RUNNING)
    stage.delivered(3)
    assert stage.pipeline.undelivered == "the last poll found messages"

    stage.polled(0)

    assert stage.pipeline.is_drained


def test_a_pipeline_goes_when_it_is_not_owned_any_more(stage: Stage) -> None:
    stage.running("a")
    stage.running("b")
    stage.owned("a", "b")

    stage.state(PipelineState.STOPPED, name="b")
    assert stage.names == ["a", "b"]
    stage.owned("a")

    assert stage.names == ["a"]


def test_a_pipeline_that_is_gone_is_not_brought_back_by_its_last_words(stage: Stage) -> None:
    stage.running()
    stage.owned("p")
    stage.owned()

    stage.connected("sink", is_connected=False)
    stage.state(PipelineState.STOPPED)

    assert stage.names == []


def test_a_pipeline_that_stops_after_ownership_has_moved_on_goes_then(stage: Stage) -> None:
    stage.owned()
    stage.running()

    stage.state(PipelineState.STOPPED)

    assert stage.names == []


def test_a_pipeline_that_comes_back_starts_from_nothing(stage: Stage) -> None:
    stage.running()
    stage.delivered(5)
    stage.owned("p")
    stage.owned()

    stage.running()

    assert stage.pipeline.published == 0


def test_a_restarted_pipeline_stays_and_keeps_its_counts(stage: Stage) -> None:
    stage.owned("p")
    stage.running()
    stage.delivered(5)

    stage.state(PipelineState.STOPPED)
    stage.running()

    assert stage.pipeline.published == 5


def test_a_pipeline_that_could_not_be_built_is_shown_failed(stage: Stage) -> None:
    stage.described()

    stage.state(PipelineState.FAILED, "unknown key")

    assert stage.pipeline.trouble == "failed: unknown key"


def test_the_rate_averages_complete_seconds_and_its_history_forgets(stage: Stage) -> None:
    stage.running()
    for _ in range(5):
        stage.delivered(100)
        stage.clock_s += 1.0

    assert stage.pipeline.rate_per_s == 100
    assert list(stage.pipeline.rate_history[-6:]) == [0, 100, 100, 100, 100, 100]
    assert len(stage.pipeline.rate_history) == RATE_SECONDS

    stage.clock_s += RATE_SECONDS
    assert sum(stage.pipeline.rate_history) == 0
    assert stage.pipeline.rate_per_s == 0


def test_a_second_that_is_not_over_does_not_count_yet(stage: Stage) -> None:
    stage.running()
    stage.delivered(100)

    assert stage.pipeline.rate_per_s == 0
    assert sum(stage.pipeline.rate_history) == 0


def test_latency_percentiles_are_right_within_a_step_of_the_buckets(stage: Stage) -> None:
    stage.running()

    stage.published(1000, latencies_s=tuple(n / 1000 for n in range(1, 1001)))

    latency = stage.pipeline.latency
    assert latency is not None
    assert latency.p50_s == pytest.approx(0.5, rel=0.08)
    assert latency.p95_s == pytest.approx(0.95, rel=0.08)
    assert latency.p99_s == pytest.approx(0.99, rel=0.08)


def test_latencies_older_than_a_minute_are_forgotten(stage: Stage) -> None:
    stage.running()
    stage.published(1, latencies_s=(5.0,))
    stage.clock_s = 61.0

    forgotten = stage.pipeline.latency
    stage.published(1, latencies_s=(0.001,))
    latest = stage.pipeline.latency

    assert forgotten is None
    assert latest is not None
    assert latest.p99_s < 0.01


def test_latencies_below_zero_and_above_an_hour_stay_in_the_outer_buckets(stage: Stage) -> None:
    stage.running()

    stage.published(2, latencies_s=(-3.0, 1e9))

    latency = stage.pipeline.latency
    assert latency is not None
    assert latency.p50_s == pytest.approx(0.0001)
    assert latency.p99_s > 3_600


def test_the_status_is_one_json_object_with_readable_times(stage: Stage) -> None:
    stage.running()
    stage.delivered(1, offset=3)

    read = json.loads(stage.board.snapshot().to_json())

    assert read["worker_id"] == "w1"
    assert read["started_at"] == "2026-01-01T00:00:00Z"
    assert read["pipelines"][0]["state"] == "running"
    assert read["pipelines"][0]["offset"] == 3


async def test_what_a_real_pipeline_tells_adds_up(stage: Stage) -> None:
    line = Line(batch_size=3)
    line.write(*(message(str(n)) for n in range(8)))
    line.faults.refused["5"] = MessageRejected("poison")
    line.faults.fail_next(2, Outage("away"))
    stage.described()

    await line.run_to_the_end()
    for event in line.heard.events:
        stage.board(event)

    shown = stage.pipeline
    assert shown.state is PipelineState.COMPLETED
    assert (shown.published, shown.dead_lettered, shown.in_flight) == (7, 1, 0)
    assert shown.errors == 3
    assert [batch.messages for batch in shown.recent_batches] == [3, 2, 2]
    assert [batch.attempts for batch in shown.recent_batches] == [3, 1, 1]
    assert shown.is_healthy
    assert shown.is_drained


def test_a_snapshot_does_not_change_when_the_board_does(stage: Stage) -> None:
    stage.running()
    before = stage.pipeline

    stage.delivered(5)

    assert before.published == 0
    assert list(before.recent_batches) == []


def test_several_workers_are_told_apart_and_summed() -> None:
    stage = Stage()
    stage.described()
    board, of_worker = stage.board, {"pipeline": "p", "direction": "forward"}
    for worker in (1, 2):
        for state in (PipelineState.STARTING, PipelineState.RUNNING):
            board(StateChanged(**of_worker, worker=worker, state=state))
        for side in ("source", "sink"):
            board(ConnectionChanged(**of_worker, worker=worker, side=side, is_connected=True))
        board(
            Polled(
                **of_worker,
                worker=worker,
                messages=worker * 10,
                rejected=0,
                full_refresh=False,
                duration_s=0.1,
            )
        )
        board(
            BatchPublished(
                **of_worker,
                worker=worker,
                messages=worker * 10,
                duplicates=0,
                dead_lettered=0,
                duration_s=0.1,
                attempts=1,
            )
        )
    board(BatchAcknowledged(**of_worker, worker=2, messages=20, checkpoint="30"))

    whole = stage.pipeline
    assert (whole.published, whole.in_flight, whole.is_healthy) == (30, 10, True)
    assert [batch.messages for batch in whole.recent_batches] == [20]
    assert [(one.number, one.published, one.in_flight) for one in whole.workers] == [
        (1, 10, 10),
        (2, 20, 0),
    ]

    board(StateChanged(**of_worker, worker=1, state=PipelineState.FAILED, reason="no stream"))

    whole = stage.pipeline
    assert (whole.state, whole.trouble) == ("failed", "worker 1: failed: no stream")
    board(StateChanged(**of_worker, worker=1, state=PipelineState.RUNNING))
    board(ConnectionChanged(**of_worker, worker=1, side="source", is_connected=False))
    assert (stage.pipeline.source_connected, stage.pipeline.in_flight) == (False, 0)
    board(BatchAcknowledged(**of_worker, worker=1, messages=0, checkpoint="31"))
    board(Polled(**of_worker, worker=1, messages=5, rejected=0, full_refresh=False, duration_s=0.1))
    stage.clock_s += STALLED_AFTER_S
    assert stage.pipeline.trouble == "worker 1: stalled: 5 messages in flight, none settled"


def test_what_a_pipeline_delivered_is_kept_when_it_is_paused_moved_or_set_differently(
    stage: Stage,
) -> None:
    stage.owned("p")
    stage.running()
    stage.published(5)

    stage.owned()
    assert stage.names == []
    assert stage.board.snapshot().delivered_before == {"p": 5}

    stage.owned("p")
    stage.running()
    stage.published(2)
    assert (stage.pipeline.published, stage.board.snapshot().delivered_before) == (2, {"p": 5})

    stage.described(direction="reverse")
    assert (stage.pipeline.published, stage.board.snapshot().delivered_before) == (0, {"p": 7})
