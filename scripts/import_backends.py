"""Imports every backend, makes the clients of Amazon and compiles a condition, where it runs.

For a place from which something was left out: an image, a directory of `scripts/bundle.py`.
"""

from __future__ import annotations

import asyncio
import importlib

import aioboto3

from relay.condition import Condition
from relay.registry import SINKS, SOURCES

REGION = "eu-central-1"


async def make_clients() -> None:
    """A queue's, and that of the roles by which a pipeline reaches it."""
    session = aioboto3.Session(region_name=REGION)
    for service in ("sqs", "sts"):
        async with session.client(service) as client:
            print(client.meta.endpoint_url)


def main() -> None:
    for target in sorted({*SINKS.values(), *SOURCES.values()}):
        print(importlib.import_module(target.partition(":")[0]).__name__)
    asyncio.run(make_clients())
    print(Condition("op == 'insert'").names_subject)


if __name__ == "__main__":
    main()
