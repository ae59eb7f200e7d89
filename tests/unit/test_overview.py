from __future__ import annotations

import re
from datetime import UTC, datetime

from relay.catalog import DEAD_LETTERS_COUNTED, Seek
from relay.overview import Overview, PipelineOverview, table_of


def test_the_table_for_people_has_the_unwell_first_and_what_is_sent_again_last() -> None:
    pipelines = [_pipeline("able"), _pipeline("bold", "it refuses everything"), _pipeline("calm")]
    seek = Seek(
        pipeline="able", sought_to="5", sought_by="ada", sought_at=datetime(2026, 3, 1, tzinfo=UTC),
        after_id=4, through_id=9, reached_id=7,
    )  # fmt: skip

    *lines, last = table_of(Overview(group_id="g", relays=["w"], pipelines=pipelines, seeks=[seek]))

    assert [line.split()[0] for line in lines] == ["pipeline", "bold", "able", "calm"]
    assert last == (
        "relay_seek of able to 5 by ada at 2026-03-01 00:00:00: behind id 4, at id 7 of 9"
    )


def test_dead_letters_that_were_not_all_counted_are_said_to_be_more() -> None:
    known = _pipeline("known", dead_letters=DEAD_LETTERS_COUNTED - 1)
    more = _pipeline("more", dead_letters=DEAD_LETTERS_COUNTED)

    lines = table_of(Overview(group_id="g", relays=["w"], pipelines=[known, more]))

    assert [re.findall(r"\S*,\d+\S*", line) for line in lines] == [[], ["9,999"], ["10,000+"]]


def _pipeline(name: str, trouble: str = "", dead_letters: int = 0) -> PipelineOverview:
    return PipelineOverview(
        name=name,
        direction="forward",
        enabled=True,
        source="outbox",
        sink="nats",
        state="running",
        trouble=trouble,
        owners=["w"],
        lag_rows=0,
        oldest_unsent_age_s=0.0,
        dead_letters=dead_letters,
        outbox="outbox_orders",
        outbox_rows=0,
        outbox_bytes=0,
    )
