"""Tables of what goes wrong: a change of an example, and the one line that the relay says then.

```
<!-- troubles of orders-to-nats -->
| what is wrong | what the relay says |
| --- | --- |
| another port: `"url": "nats://localhost:4223"` | `connecting to NATS at localhost:4223: …` |
```

The code in the first cell are keys that replace those of the pipeline's sink, or of its source
where it is a reverse pipeline; null takes a key away. The code in the second is the error that the
log shows, once and on one line. What stands outside of the code is for people.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.docs.conftest import WRONG_SECRET
from tests.docs.expectation import is_as_said
from tests.docs.page import read
from tests.docs.stage import Stage
from tests.servers.process import RelayProcess

_PART = re.compile(
    r"^## (?P<section>.*)$|^<!-- troubles of (?P<pipeline>[\w-]+) -->$", re.MULTILINE
)
_CODE = re.compile(r"`([^`]*)`")
_TROUBLES = ("warning", "error")


@dataclass(frozen=True)
class Trouble:
    """One row: the keys that are wrong, and what the relay says of them."""

    keys: Mapping[str, object]
    said: str


@dataclass(frozen=True)
class TroubleTable:
    """What can go wrong with one pipeline of the page."""

    section: str
    pipeline: str
    troubles: Sequence[Trouble]


def trouble_tables(page: str) -> list[TroubleTable]:
    """The tables of a page."""
    return list(_tables(read(page)))


async def show_troubles(stage: Stage, tables: Sequence[TroubleTable]) -> None:
    """Run a pipeline with each row's keys. Raises `AssertionError` where it says otherwise."""
    expected = await asyncio.to_thread(_set_pipelines, stage, tables)
    relay = await stage.start_relay(
        "--log-format",
        "json",
        dsn=stage.database.dsn,
        environment=await stage.shell.exported(),
        directory=stage.shell.directory,
    )
    stage.relays.append(relay)
    for name in expected:
        await relay.wait_for_log(f'"level":"({"|".join(_TROUBLES)})".*"pipeline":"{name}"')
    await stage.end_relays()
    said = list(_said(relay, expected))
    assert Counter(name for name, _ in said) == Counter(expected.keys()), relay.output
    others = [f"{name}: {line}" for name, line in said if not is_as_said(expected[name], line)]
    assert not others, "\n".join(others)
    for _, line in said:
        assert line.endswith(")"), f"no remedy: {line}"
    assert WRONG_SECRET not in relay.output, relay.output


def _tables(text: str) -> Iterator[TroubleTable]:
    section = ""
    for part in _PART.finditer(text):
        section = part["section"] or section
        if part["pipeline"] is None:
            continue
        rows = text[part.end() :].strip().partition("\n\n")[0].splitlines()[2:]
        assert rows, part[0]
        yield TroubleTable(section, part["pipeline"], [_trouble(row) for row in rows])


def _trouble(row: str) -> Trouble:
    wrong, said = row.strip("| ").split(" | ")
    (line,) = _CODE.findall(said)
    return Trouble(json.loads(f"{{{', '.join(_CODE.findall(wrong))}}}"), line)


def _set_pipelines(stage: Stage, tables: Sequence[TroubleTable]) -> dict[str, str]:
    """A pipeline for each row, and no other; gives what each is to say."""
    connection = stage.connection
    rows = connection.execute("select name, direction, config from pgtrickle.list_relay_configs()")
    found = {str(name): (str(direction), config) for name, direction, config in rows}
    for name in found:
        connection.execute("select pgtrickle.disable_relay(%s)", (name,))
    return {
        name: said
        for table in tables
        for name, said in _set_rows(stage, table, *found[table.pipeline])
    }


def _set_rows(
    stage: Stage, table: TroubleTable, direction: str, config: object
) -> Iterator[tuple[str, str]]:
    assert isinstance(config, dict)
    side, setter = (
        ("sink", "set_relay_outbox") if direction == "forward" else ("source", "set_relay_inbox")
    )
    for number, trouble in enumerate(table.troubles, start=1):
        keys = json.loads(stage.here(json.dumps(trouble.keys)))
        end = {key: value for key, value in {**config[side], **keys}.items() if value is not None}
        name = f"{table.pipeline}-{number}"
        stage.connection.execute(
            f"select pgtrickle.{setter}(%s, %s::text::jsonb)".encode(),
            (name, json.dumps({**config, side: end})),
        )
        yield name, stage.here(trouble.said)


def _said(relay: RelayProcess, names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pipeline and error of each line that tells of trouble; summaries of repeats are none."""
    for line in relay.stderr:
        entry = json.loads(line)
        is_trouble = entry["level"] in _TROUBLES and "repeated" not in entry
        if is_trouble and entry.get("pipeline") in names:
            yield entry["pipeline"], entry["error"]
