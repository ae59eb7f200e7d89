"""RabbitMQ, as a sink and as a source, on aio-pika and the channel of aiormq below it.

**Sink.** A message is accepted when the broker has confirmed it: every queue that takes it has it,
on disk where the queue is durable. With ``mandatory``, the default, one that no queue takes comes
back and is an error. Up to ``max_in_flight`` are in flight on one channel, in order. But a broker
can refuse a single message (a full queue, a routing key without a queue) and take those behind it:
so with ``ordering`` ``strict``, the default, a message waits for the confirmation of the one before
it *of its own key*, which costs nothing while keys vary; with ``pipelined`` nothing waits. A broken
connection makes the loop send again, and consumers deduplicate by ``message-id``, the dedup key. A
body above the broker's ``max_message_size`` fails alone and before it is sent; where the limit is
not known yet, the first such message teaches it, and its neighbours are sent again.

**Source.** One consumer, whose acknowledgements have been taken in when `acknowledge` returns.
Order is the queue's, also across a lost connection: a classic queue's consumer is by default
``exclusive``, so that a new one begins only when the broker has requeued what the old one held
(which takes up to 20 s, two heartbeats, where it does not notice that its peer is gone); declare a
quorum queue with ``x-single-active-consumer``. A stream is refused. The dedup key is ours where the
message is ours, else its ``message-id``, else a new UUID. A broker takes back what is not
acknowledged within its ``consumer_timeout``, and a quorum queue drops or dead-letters what came
back more often than its ``delivery-limit``: raise both where writing may stand still for long. An
answer that does not come within ``timeout_ms`` costs the connection, and what it held is delivered
again; the next one waits twice as long, until an acknowledgement has been answered, so that a
broker that is behind is not sent the same messages back for ever.

For RabbitMQ 3.8 and newer, 4.x included. Neither reconnects by itself, binds queues, or changes an
exchange or a queue that exists.
"""

from __future__ import annotations

from relay.backends.rabbitmq.sink import RabbitSink
from relay.backends.rabbitmq.source import RabbitSource

__all__ = ["RabbitSink", "RabbitSource"]
