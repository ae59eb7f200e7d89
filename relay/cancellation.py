"""A cancellation that got lost inside a driver."""

from __future__ import annotations

import asyncio


def reraise_cancellation(error: Exception | None = None) -> None:
    """Raise `CancelledError` where this task was cancelled and a driver swallowed it.

    A driver whose clean-up fails while it is cancelled raises that failure instead, as does a
    task group until Python 3.13; and until 3.12 `asyncio.wait_for`, which drivers use, drops a
    cancellation that comes together with the result.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from error
