"""Amazon SQS, and servers that speak its protocol, as a sink and as a source.

**Sink.** A message is accepted when the queue has named it among the successful ones: it is then
stored redundantly. A FIFO queue keeps the order of a message group, by default the event's key, and
drops repeats of five minutes; a standard queue does neither.

**Source.** A message is deleted when its batch is acknowledged, and until then hidden from others.
Order is the group's on a FIFO queue; a standard queue has none and may repeat a message.

Both ask for the queue's attributes when they connect; where that is not permitted, the limits are
those of SQS itself. Credentials are those of the options, or what the AWS chain finds (environment,
shared files, container, instance). Neither makes a queue.
"""

from __future__ import annotations

from relay.backends.sqs.sink import SqsSink
from relay.backends.sqs.source import SqsSource

__all__ = ["SqsSink", "SqsSource"]
