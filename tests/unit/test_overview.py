from __future__ import annotations

from relay.overview import Overview, PipelineOverview, table_of


def test_the_table_for_people_has_the_unwell_first() -> None:
    pipelines = [_pipeline("able"), _pipeline("bold", "it refuses everything"), _pipeline("calm")]

    lines = table_of(Overview(group_id="g", relays=["w"], pipelines=pipelines))

    assert [line.split()[0] for line in lines] == ["pipeline", "bold", "able", "calm"]


def _pipeline(name: str, trouble: str = "") -> PipelineOverview:
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
        dead_letters=0,
        outbox="outbox_orders",
        outbox_rows=0,
        outbox_bytes=0,
    )
