"""Apache Kafka, as a sink and as a source, on the public interface of aiokafka.

**Sink.** A message is accepted when its partition's leader has answered for its batch: with
``acks`` ``all``, the default, every in-sync replica has it then, with ``1`` the leader alone. The
order of a partition is kept, also when batches are sent again; a record key's partition is that of
Kafka's own clients. The producer is idempotent: while the relay lives, what is sent again after a
lost connection is stored once. One batch of a partition is in flight at a time, and after the
first failure nothing more is sent, so that both values of ``ordering`` keep the order. A topic is
never made; an event that is larger than ``max_request_size`` or the topic's ``max.message.bytes``
is refused before it is sent.

**Source.** A member of a consumer group, by default a static one that is named after the pipeline:
whichever relay runs it next takes its place, with its partitions, and shuts out the one before.
The offset behind each partition of a batch is committed when the batch is acknowledged. In a
rebalance nothing more is handed out, and what is in flight has until ``rebalance_timeout_ms`` to
be settled. A position that is not in the log is an error that names the range, unless
``on_position_lost`` says where to go on. A record that the client can't read becomes a dead letter
that names its offset. The dedup key is ours, or the header ``pgtrickle-dedup-key``, else
``kafka:{topic}:{partition}:{offset}:{timestamp}``: a topic that is deleted and created again has
the same offsets again, at other times.

Needs Kafka 2.3. A change in the number of partitions moves keys to other partitions, and their
order is not kept across it: that is so with every client.
"""

from __future__ import annotations

from relay.backends.kafka.sink import KafkaSink
from relay.backends.kafka.source import KafkaSource

__all__ = ["KafkaSink", "KafkaSource"]
