"""The status view: relays and their pipelines on a terminal, live, driven by keys.

`fleet` is what can be watched and done, `watched` the relay of this process or the whole fleet,
`screen` turns a scene into lines with `table`, `detail` and `text`, `keys` and `terminal` are the
two ends of the terminal, `view` holds them together.
"""

from __future__ import annotations

from relay.status.fleet import Fleet
from relay.status.screen import Key
from relay.status.terminal import can_show
from relay.status.view import StatusView
from relay.status.watched import OneRelay, OwnRelay, WholeFleet

__all__ = ["Fleet", "Key", "OneRelay", "OwnRelay", "StatusView", "WholeFleet", "can_show"]
