"""Choosing and shaping in a relay at work: what goes out, what is counted, what fails alone."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from relay.events import BatchPublished, DeadLettered, DeadLettersRetried, PipelineState
from tests.effects.relay_at_work import AtWork, Catalog, at_work, lines, to_file
from tests.servers.postgres import Database

PEPPER = "a-secret-of-the-tests"


@pytest.fixture
async def catalog(migrated_database: Database) -> AsyncIterator[Catalog]:
    connection = await asyncpg.connect(migrated_database.dsn)
    made = Catalog(migrated_database.dsn, connection)
    await made.orders(", claim_check_rows => 3")
    yield made
    await connection.close()


def filtered(relay: AtWork, pipeline: str) -> int:
    return sum(one.filtered for one in relay.heard.of(BatchPublished) if one.pipeline == pipeline)


def rows(path: Path) -> list[tuple[object, object]]:
    return [(line["op"], line["payload"]) for line in lines(path)]


async def position(catalog: Catalog, pipeline: str) -> object:
    return await catalog.value(
        "select last_change_id from pgtrickle.relay_consumer_offsets where pipeline_id = $1",
        pipeline,
    )


@pytest.mark.shows(
    "pipeline:ops",
    "pipeline:where",
    "pipeline:select",
    "pipeline:exclude",
    "pipeline:rename",
    "pipeline:mask",
)
async def test_each_key_chooses_or_shapes_what_goes_out(catalog: Catalog, tmp_path: Path) -> None:
    await catalog.insert(1, 2, "Vienna")
    await catalog.run("update public.orders set note = 'Graz' where id = 2")
    await catalog.run("insert into public.orders select g, 'many' from generate_series(3, 9) as g")
    keys: dict[str, dict[str, object]] = {
        "ops": {"ops": ["delete"]},
        "where": {"where": 'payload.note == "Vienna" && op == "insert"'},
        "nothing": {"where": "payload.id < 0"},
        "select": {"select": ["id"], "where": "payload.id == 1"},
        "exclude": {"exclude": ["note"], "where": "payload.id == 1"},
        "rename": {"rename": {"note": "city"}, "where": "payload.id == 1"},
        "mask": {"mask": {"note": {"hash": "${env:RELAY_PEPPER}"}}, "where": "payload.id == 9"},
    }
    for name, given in keys.items():
        await catalog.forward(name, to_file(tmp_path / name), **given)

    async with at_work(catalog.dsn, environment={"RELAY_PEPPER": PEPPER}) as relay:
        await relay.heard.until(
            lambda: [filtered(relay, name) for name in keys] == [10, 9, 11, 10, 10, 10, 10]
        )
        await relay.a_while("nothing")
        status = relay.relay.board.snapshot()
        positions = [await position(catalog, name) for name in keys]

    digest = hmac.new(PEPPER.encode(), b"many", hashlib.sha256).hexdigest()
    assert rows(tmp_path / "ops") == [("delete", {"id": 2, "note": "Vienna"})]
    assert rows(tmp_path / "where") == [
        ("insert", {"id": 1, "note": "Vienna"}),
        ("insert", {"id": 2, "note": "Vienna"}),
    ]
    assert not (tmp_path / "nothing").exists() or not rows(tmp_path / "nothing")
    assert rows(tmp_path / "select") == [("insert", {"id": 1})]
    assert rows(tmp_path / "exclude") == [("insert", {"id": 1})]
    assert rows(tmp_path / "rename") == [("insert", {"id": 1, "city": "Vienna"})]
    assert rows(tmp_path / "mask") == [("insert", {"id": 9, "note": digest})]
    assert positions == [4] * len(keys)
    nothing = next(one for one in status.pipelines if one.name == "nothing")
    assert (nothing.is_healthy, nothing.filtered, nothing.published) == (True, 11, 0)


async def test_updates_of_a_claim_check_are_put_together_behind_the_condition(
    catalog: Catalog, tmp_path: Path
) -> None:
    await catalog.run("insert into public.orders select g, 'open' from generate_series(1, 6) as g")
    await catalog.run(
        "update public.orders set note = case when id <= 3 then 'paid' else 'void' end"
    )
    await catalog.run(
        "update public.orders set note = case when id < 3 then 'paid' else 'open' end"
    )
    await catalog.forward(
        "paid", to_file(tmp_path / "out"), collapse_updates=True, where='payload.note == "paid"'
    )

    async with at_work(catalog.dsn, relay={"batch_size": 2}) as relay:
        await relay.heard.until(lambda: len(relay.heard.of(BatchPublished)) >= 9)
        await relay.a_while("paid")

    told = [(line["op"], line["key"]) for line in lines(tmp_path / "out")]
    assert sorted(told[:3]) == [("insert", "1"), ("insert", "2"), ("insert", "3")]
    assert sorted(told[3:]) == [("delete", "3"), ("update", "1"), ("update", "2")]


async def test_a_reverse_pipeline_chooses_and_shapes_before_it_fills_columns(
    catalog: Catalog, tmp_path: Path
) -> None:
    (tmp_path / "in").write_text(
        '{"id": 1, "email": "ann", "size": 3}\n{"id": 2, "email": "bob", "size": 1}\nnone\n'
    )
    await catalog.reverse(
        "in",
        {"type": "file", "input": str(tmp_path / "in")},
        "received",
        where="payload.size > 2",
        exclude=["size"],
        rename={"email": "mail"},
        mask={"email": "redact"},
        columns={"aggregate_id": "payload:mail"},
    )

    async with at_work(catalog.dsn) as relay:
        await relay.until_state("in", PipelineState.COMPLETED)

    found = await catalog.connection.fetch(
        "select aggregate_id, payload::text as payload from pgtrickle.received"
    )
    assert [(row["aggregate_id"], json.loads(row["payload"])) for row in found] == [
        ("***", {"id": 1, "mail": "***"})
    ]
    assert filtered(relay, "in") == 1
    (letter,) = relay.heard.of(DeadLettered)
    assert (letter.messages, letter.kind.value) == (1, "message")


async def test_a_dead_letter_is_shaped_once_and_one_that_is_left_out_now_stays(
    catalog: Catalog, tmp_path: Path
) -> None:
    """Three letters: of a condition, of a template behind the shape, and one to be left out."""
    await catalog.run("alter table public.orders add column total int")
    await catalog.run("insert into public.orders values (1, 'x', null), (2, null, 5), (3, 'z', 7)")
    await catalog.insert(4, 4, "no total: also refused")
    sink = {**to_file(tmp_path / "out"), "subject_template": "orders.{payload.place}"}
    keys: dict[str, object] = {"rename": {"note": "place"}, "ops": ["insert"]}
    await catalog.forward("p", sink, where="payload.total > 0", **keys)

    async with at_work(catalog.dsn) as relay:
        await relay.heard.until(
            lambda: sum(one.messages for one in relay.heard.of(DeadLettered)) == 3
        )
        await relay.until_acknowledged(1, "p")
        await catalog.forward(
            "p",
            sink | {"subject_template": "orders"},
            where="payload.id != 4 && has(payload.note)",
            **keys,
        )
        await relay.heard.until(lambda: relay.states("p").count(PipelineState.RUNNING) >= 2)
        await catalog.run("select pgtrickle.relay_dlq_retry_all('p')")
        await relay.heard.until(
            lambda: sum(one.delivered for one in relay.heard.of(DeadLettersRetried)) == 2
        )
        await relay.a_while("p")

    assert sorted(str(payload) for _, payload in rows(tmp_path / "out")) == [
        "{'id': 1, 'place': 'x', 'total': None}",
        "{'id': 2, 'place': None, 'total': 5}",
        "{'id': 3, 'place': 'z', 'total': 7}",
    ]
    left = await catalog.connection.fetch("select error from pgtrickle.relay_dlq_list('p')")
    assert ["leave it out" in row["error"] for row in left] == [True]


async def test_messages_that_a_condition_can_not_judge_never_suspend_the_sink(
    catalog: Catalog, tmp_path: Path
) -> None:
    await catalog.insert(1, 30)
    await catalog.forward("p", to_file(tmp_path / "out"), where="payload.absent > 1")

    async with at_work(catalog.dsn) as relay:
        await relay.heard.until(lambda: sum(o.messages for o in relay.heard.of(DeadLettered)) == 30)
        await relay.heard.until(lambda: not relay.relay.board.snapshot().pipelines[0].is_healthy)
        await relay.until_acknowledged(30, "p")

    assert PipelineState.SUSPENDED not in relay.states("p")
    assert "lacks a field" in relay.heard.of(DeadLettered)[0].error


async def test_a_shape_that_can_not_be_right_fails_its_pipeline_alone(
    catalog: Catalog, tmp_path: Path
) -> None:
    await catalog.insert(1, 1)
    await catalog.forward("sound", to_file(tmp_path / "out"))
    await catalog.forward("uncompiled", to_file(tmp_path / "a"), where="payload.id >")
    await catalog.forward("by-hand", to_file(tmp_path / "b"))
    await catalog.run(
        'update pgtrickle.relay_outbox_config set config = config || \'{"exclude": ["id"]}\''
        " where name = 'by-hand'"
    )

    async with at_work(catalog.dsn) as relay:
        await relay.until_acknowledged(1, "sound")
        for name in ("uncompiled", "by-hand"):
            await relay.until_state(name, PipelineState.FAILED)

    assert "where does not compile" in relay.reasons("uncompiled")[0]
    assert "key needs the column id, which exclude leaves out" in relay.reasons("by-hand")[0]
