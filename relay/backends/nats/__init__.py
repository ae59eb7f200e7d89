"""NATS JetStream, as a sink and as a source.

**Sink.** A message is accepted when the stream has acknowledged it, which on file storage means
that it survives the server. Publishes are pipelined: up to ``max_in_flight`` are under way on one
connection, and what is sent together is acknowledged on one reply subject. Where one of those is
rejected each is sent again by itself, which the stream recognises. With ``ordering`` ``strict``,
the default, a message waits for the acknowledgement of the one before it *of its own key*; that
costs nothing while keys vary, and a round trip per event where one key has them all. With
``pipelined`` nothing waits, and an event whose predecessor of the same key failed may be stored
before it.
``Nats-Msg-Id`` is the dedup key: within the stream's duplicate window a repeated event is stored
once. Values never add tokens or wildcards to a subject (`relay.backends.nats.subject`), and any
header travels (`relay.backends.nats.headers`). An order to the server that a publisher hides in
its headers (``Nats-Rollup`` and the like) is not passed on as one.

**Source.** A durable pull consumer with explicit acknowledgement, each confirmed by the server.
Order is the stream's, also across a lost connection and a killed process: on connecting, whatever
is unacknowledged is asked back before anything new; where that lies 200,000 messages of the stream
apart, nothing new is asked for until ``ack_wait_seconds`` have run out. A message that the server
delivers again because ``ack_wait_seconds`` ran out while we still hold it is not handed out twice;
what we hold then is acknowledged under its newest delivery. The dedup key is ours where the message
is ours, else its ``Nats-Msg-Id``, else ``nats:{stream}:{stream's creation, µs}:{sequence}``. One
process at a time may use a durable: a second one would take away what the first has in its hands.

Neither reconnects by itself, changes a stream or consumer that exists, or reads core NATS
subjects that no stream stores.
"""

from __future__ import annotations

from relay.backends.nats.sink import NatsSink
from relay.backends.nats.source import NatsSource

__all__ = ["NatsSink", "NatsSource"]
