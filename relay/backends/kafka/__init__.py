"""Apache Kafka, as a sink and as a source.

**Sink.** A message is accepted when its partition's leader has answered for its batch: with
``acks`` ``all``, the default, every in-sync replica has it then (how many there must be is the
topic's ``min.insync.replicas``), with ``1`` the leader alone. Order is kept within a partition,
and a record key's partition is that of Kafka's own clients; by default the key is the dedup key,
which spreads the events of an entity: ``key_template: "{key}"`` keeps them together, in order. The
producer is idempotent (`relay.backends.kafka.producer`): up to five requests are under way on a
connection, none of them overtakes another, and what is sent again after a lost connection is
stored once, as long as the relay lives. A relay that is killed sends again what it can't know was
stored; consumers deduplicate by the header ``pgtrickle-dedup-key``. ``ordering`` makes a
difference with ``acks: 1`` only: ``strict``, the default, has one request under way then, at the
cost of a round trip each; with ``pipelined`` there are five, and an event may be stored before an
earlier one that failed. A topic is never made; an event that is larger than ``max_request_size``
or the topic's ``max.message.bytes`` is refused before it is sent.

**Source.** A member of a consumer group. For every partition of a batch the offset behind it is
committed when the batch is acknowledged, and nothing else is. Order is the partition's. Group and
member are by default named after the pipeline, and the member is static: whichever relay runs the
pipeline next takes its place at once, with its partitions, also after a kill, and shuts out the
one before. When the group shares its partitions anew, nothing more is handed out, and what is out
has until ``rebalance_timeout_ms`` (a fifth is kept for joining again) to be settled before the
partitions are let go. Signs of life are given for as long as the process lives, however slow a
batch is. A position that retention or a new topic took away is an error that names the range,
unless ``on_position_lost`` says where to go on, which is then logged as a warning. The dedup key
is ours where the message is ours, else its header ``pgtrickle-dedup-key``, else
``kafka:{topic}:{partition}:{offset}``; a topic that is deleted and made again has the same offsets
again.

Needs Kafka 2.3. A change in the number of partitions moves keys to other partitions, and their
order is not kept across it: that is so with every client.
"""

from __future__ import annotations

from relay.backends.kafka.sink import KafkaSink
from relay.backends.kafka.source import KafkaSource

__all__ = ["KafkaSink", "KafkaSource"]
