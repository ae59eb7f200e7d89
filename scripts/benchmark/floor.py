"""The floor under `forward`: the same bytes to the same server, with nothing around them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from scripts.benchmark.bare_nats import StoredMessage, connected
from scripts.benchmark.surroundings import STREAM, Surroundings

# As many as the relay's sink keeps under way by default.
WINDOW: Final = 4096


async def floor_rate(around: Surroundings, messages: Sequence[StoredMessage]) -> float:
    """Messages a second of a bare client that publishes these and counts every acknowledgement.

    Nothing is read from PostgreSQL and no message waits for another. Raises `RuntimeError` where
    the stream does not hold all of them in the end.
    """
    await around.fresh_stream()
    async with connected(around.servers.nats_url, around.servers.nats_token) as nats:
        started = time.perf_counter()
        await nats.publish_all(messages, WINDOW)
        elapsed_s = time.perf_counter() - started
    stored = (await around.nats.state_of(STREAM)).messages
    if stored != len(messages):
        raise RuntimeError(f"{len(messages)} messages were acknowledged and {stored} stored")
    return len(messages) / elapsed_s
