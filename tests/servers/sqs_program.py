"""Runs moto's server as the SQS of the tests: `python -m tests.servers.sqs_program -p 5000`.

moto counts a queue's messages several times over for every message that is sent, and asks a slow
clock about each of them: a thousand messages take a minute. Here the approximate counts are made
again every 50 ms, and the clock is the ordinary one. A receive that waits looks only once a second,
and without a pause where all there is belongs to groups that are blocked; here it looks every 50
ms. A deletion makes the list of messages again, without the lock under which one is added, and so
loses what was sent meanwhile; here it takes that lock. A message that is shown again is not visible
in the same tick of the clock, and so goes on blocking its group; here it is visible at once. With
``PGTRICKLE_TEST_SQS_KEY`` a user's key is made of that text, id and secret alike. All else is
moto's.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

from moto import server
from moto.iam import models as iam
from moto.sqs import models

_COUNTS = (
    "approximate_number_of_messages",
    "approximate_number_of_messages_delayed",
    "approximate_number_of_messages_not_visible",
)
_COUNT_EVERY_S = 0.05
_LOOK_EVERY_S = 0.05


def main() -> None:
    """Serve until killed; the arguments are those of moto's own server."""
    models.unix_time_millis = lambda: time.time() * 1000
    models.camelcase_to_underscores = functools.cache(models.camelcase_to_underscores)
    for name in _COUNTS:
        setattr(models.Queue, name, property(_counted(name, getattr(models.Queue, name).fget)))
    models.Queue.wait_for_messages = _wait_for_messages
    models.Queue.delete_message = _deleting_alone(models.Queue.delete_message)
    models.Message.visible = property(lambda message: time.time() * 1000 >= message.visible_at)
    key = os.environ.get("PGTRICKLE_TEST_SQS_KEY")
    if key is not None:
        iam.generate_access_key_id_from_account_id = lambda *_, **__: key
        iam.random_alphanumeric = lambda _: key
    server.main()


def _wait_for_messages(queue: models.Queue, timeout: float) -> None:
    """Return when a message came, or it is time to look again."""
    with queue._messages_lock:
        queue._messages_lock.wait(min(timeout, _LOOK_EVERY_S))


def _deleting_alone(
    delete: Callable[[models.Queue, str], None],
) -> Callable[[models.Queue, str], None]:
    def delete_alone(queue: models.Queue, receipt_handle: str) -> None:
        with queue._messages_lock:
            delete(queue, receipt_handle)

    return delete_alone


def _counted(name: str, count: Callable[[object], int]) -> Callable[[object], int]:
    def recent(queue: object) -> int:
        kept: tuple[float, int] = vars(queue).get(f"_{name}_kept", (0.0, 0))
        if time.monotonic() - kept[0] > _COUNT_EVERY_S:
            kept = vars(queue)[f"_{name}_kept"] = (time.monotonic(), count(queue))
        return kept[1]

    return recent


if __name__ == "__main__":
    main()
