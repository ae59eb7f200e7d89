"""NATS JetStream, as a sink and as a source.

**Sink.** A message is accepted when the stream has acknowledged it, which on file storage means
that it survives the server. Up to ``max_in_flight`` messages are in flight; with ``ordering``
``strict``, the default, one of each key, so that a stream of one key costs a round trip per event.
With ``pipelined`` an event whose predecessor of the same key failed may be stored before it.
``Nats-Msg-Id`` is the dedup key: within the stream's duplicate window a repeated event is stored
once. A publisher's value or header is never an order to the server (`.subject`, `.headers`).

**Source.** A durable pull consumer with explicit acknowledgement, each confirmed by the server.
Order is the stream's, also across a lost connection and a killed process: on connecting, whatever
is unacknowledged is nacked, and comes before anything new; where that lies 200,000 messages of the
stream apart, nothing new is asked for until ``ack_wait_seconds`` have run out. What the server
delivers again while we hold it is not handed out twice. The dedup key is ours where the message is
ours, else its ``Nats-Msg-Id``, else ``nats:{stream}:{stream's creation, µs}:{sequence}``. One
process at a time may use a durable: a second one would take away what the first has in its hands.

Neither reconnects by itself, changes a stream or consumer that exists, or reads core NATS
subjects that no stream stores.
"""

from __future__ import annotations

from relay.backends.nats.sink import NatsSink
from relay.backends.nats.source import NatsSource

__all__ = ["NatsSink", "NatsSource"]
