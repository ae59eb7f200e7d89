"""Subject, topic and key templates."""

from __future__ import annotations

import pytest

from relay.errors import MessageUndecodable, TemplateInvalid
from relay.message import RelayMessage
from relay.template import VARIABLES, compile_routing, compile_template, payload_field

MESSAGE = RelayMessage(
    dedup_key="outbox_orders:7:0",
    payload=b'{"id": 7, "customer": {"name": "Ada", "vip": true}, "big": 1e400, "list": [1]}',
    key="7",
    op="update",
    stream_table="orders",
    outbox_id=7,
    refresh_id="r-1",
    headers={"event_type": "order.created", "subject": "orders"},
)


@pytest.mark.parametrize(
    "template,expected",
    [
        ("pgtrickle.{stream_table}.{op}", "pgtrickle.orders.update"),
        ("{key}/{outbox_id}/{refresh_id}/{dedup_key}", "7/7/r-1/outbox_orders:7:0"),
        ("{payload.customer.name}", "Ada"),
        ("{payload.customer.vip}", "true"),
        ("{payload.id}", "7"),
        ("{payload.big}", "1e400"),
        ("{{literal}}", "{literal}"),
        ("constant", "constant"),
        ("", ""),
    ],
)
def test_a_template_renders(template: str, expected: str) -> None:
    assert compile_template(template)(MESSAGE) == expected


def test_every_documented_variable_renders() -> None:
    for name in VARIABLES:
        assert compile_template(f"{{{name}}}")(MESSAGE)


def test_only_values_are_escaped() -> None:
    render = compile_template("a.{stream_table}.{op}", escape=lambda value: value.upper())

    assert render(MESSAGE) == "a.ORDERS.UPDATE"


def test_a_remembered_rendering_does_not_leak_into_another_table() -> None:
    render = compile_template("{stream_table}.{op}")
    render(MESSAGE)

    other = RelayMessage(dedup_key="d", payload=b"{}", stream_table="users", op="delete")

    assert render(other) == "users.delete"


@pytest.mark.parametrize(
    "template,said",
    [
        ("{stream_tabel}", "did you mean {stream_table}"),
        ("{payload}", "unknown variable {payload}"),
        ("{}", "unknown variable {}"),
        ("{op", "stray '{'"),
        ("op}", "stray '}'"),
    ],
)
def test_a_wrong_template_is_refused_when_it_is_compiled(template: str, said: str) -> None:
    with pytest.raises(TemplateInvalid) as refused:
        compile_template(template)

    assert said in str(refused.value)


@pytest.mark.parametrize("path", ["missing", "customer", "list", "customer.name.deeper"])
def test_a_payload_path_without_a_text_form_costs_the_message(path: str) -> None:
    with pytest.raises(MessageUndecodable, match="the payload"):
        compile_template(f"{{payload.{path}}}")(MESSAGE)


def test_a_payload_that_is_not_json_costs_the_message() -> None:
    with pytest.raises(MessageUndecodable):
        payload_field(b"\xff\xfe", ("a",))


def test_routing_looks_at_the_event_type_then_at_the_op() -> None:
    route = compile_routing("default", {"update": "by-op", "paid": "by-type.{key}"})
    paid = RelayMessage(
        dedup_key="d", payload=b"{}", key="9", op="update", headers={"event_type": "paid"}
    )
    inserted = RelayMessage(dedup_key="d", payload=b"{}", op="insert")

    assert route(MESSAGE) == "by-op"
    assert route(paid) == "by-type.9"
    assert route(inserted) == "default"
