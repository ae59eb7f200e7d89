"""RabbitMQ, as a sink and as a source.

**Sink.** A message is accepted when the broker has confirmed it: every queue that takes it has it,
on disk where the queue is durable, and on a majority of nodes where it is a quorum queue. Publishes
are pipelined: up to ``max_in_flight`` are under way on one channel, and no message waits for the
confirmation of the one before. With ``mandatory``, the default, a message that no queue takes comes
back and is an error, not a success. What ends a channel or a connection leaves everything behind it
unsent, so that order stays. But a broker can also refuse a single message (a full queue with
``overflow: reject-publish``, a queue that failed, a routing key without a queue) and take those
behind it. So with ``ordering`` ``strict``, the default, a message waits for the confirmation of the
one before it *of its own key*; that costs nothing while keys vary, and a round trip to the disk per
event where one key has them all. With ``pipelined`` nothing waits, and an event whose predecessor
of the same key was refused may be stored before it. RabbitMQ keeps what it is sent: a connection
that breaks before the confirmation makes the loop send again, and a consumer deduplicates by the
property ``message-id``, which is the dedup key. Messages are persistent. Values never add words or
wildcards to a routing key (`relay.backends.rabbitmq.routing_key`), and any header travels as text
(`relay.backends.rabbitmq.content`). A body above the broker's ``max_message_size`` fails alone and
before it is sent; where the limit is not known yet, the first such message teaches it, at the price
that its neighbours are sent again.

**Source.** One consumer with manual acknowledgements, given and taken in before `acknowledge`
returns. Order is the queue's, also across a lost connection and a killed process: the consumer is
by default ``exclusive``, so that a new one begins only when the broker has put back what the old
one held (a broker that does not notice that its peer is gone takes up to 20 s, two heartbeats).
Quorum queues and streams know no exclusive consumers: declare them with
``x-single-active-consumer``. The dedup key is ours where the message is ours, else its
``message-id``, else its header ``Pgtrickle-Dedup-Key``, else a new UUID: without an id a redelivery
can't be told from a new message, and ``dedup_key_from: body_digest`` is for those whose bodies are
never equal. A broker takes back what is not acknowledged within its ``consumer_timeout``, by
default 30 minutes, and a quorum queue drops or dead-letters what came back more often than its
``delivery-limit``, since 4.0 by default 20 times: raise both where writing may stand still for
long.

For RabbitMQ 3.8 and newer, 4.x included. Neither reconnects by itself, binds queues, or changes an
exchange or a queue that exists.
"""

from __future__ import annotations

from relay.backends.rabbitmq.sink import RabbitSink
from relay.backends.rabbitmq.source import RabbitSource

__all__ = ["RabbitSink", "RabbitSource"]
