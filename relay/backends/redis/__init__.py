"""Redis Streams, as a sink and as a source.

**Sink.** A message is accepted when Redis has answered its ``XADD``. That answer is not an fsync:
with ``appendfsync always`` the entry is on disk by then, with ``everysec`` a crash of the server
can lose the last second, and a failover can lose what the replica had not received. Whoever needs
more sets ``wait_replicas``, or ``min-replicas-to-write`` on the server; what the server offers is
in the description of the connection. Commands are pipelined on one connection, a thousand at a
time. With ``ordering`` ``strict``, the default, a pipeline in which a key comes more than once is a
transaction (``MULTI``): a server that refuses one of its entries (out of memory, read-only) has
stored none; and the next pipeline is sent before that is known only where it has no event of the
same key. So no event overtakes another of its key; it costs a short second answer for each event of
such a pipeline. With ``pipelined`` each entry stands for itself, and an event behind a refused one
of the same key may be stored before it; for proxies without transactions. Redis stores what it is
sent: a connection that breaks before the answer makes the loop send everything again, so an entry
can be there twice, and a consumer deduplicates by the field ``pgt_dedup_key``. First occurrences of
a key's events are in order. The body is the field ``payload``, our metadata the fields ``pgt_…``,
the publisher's headers ``header:…`` (`relay.backends.redis.entry`). Without ``maxlen`` a stream
grows until somebody trims it.

**Source.** A consumer group, acknowledged (``XACK``) when told to. Order is the stream's, also
across a lost connection and a killed process: what is pending for this consumer comes before
anything new. Group and consumer are by default named after the pipeline, so that whichever relay
runs it finds what another one left. Entries of other consumers of the group that showed no sign
of life for ``claim_idle_ms`` are claimed, in no particular order to the rest. A pending entry that
was trimmed or deleted meanwhile is refused as one message, so that it shows among the dead letters;
what is trimmed before anybody read it leaves no trace in Redis, and none here. The dedup key is
ours where the message is ours, else its field ``pgt_dedup_key``, else ``redis:{stream}:{id}``. Ids
are times of the server's clock: a stream that is deleted and made again has other ids, unless the
clock went back or its writer chooses them.

Needs Redis 6.2. Neither reconnects by itself, follows redirections of a Redis Cluster (name the
node that owns the stream) or asks a Sentinel.
"""

from __future__ import annotations

from relay.backends.redis.sink import RedisSink
from relay.backends.redis.source import RedisSource

__all__ = ["RedisSink", "RedisSource"]
