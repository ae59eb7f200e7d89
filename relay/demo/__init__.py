"""`pgtrickle-relay demo`: everything at once, on servers of its own, with a count at the end.

`embedded` runs PostgreSQL and NATS, `orders` is the application that writes, `tally` counts what
arrived, `run` puts them around the real relay.
"""

from __future__ import annotations

from relay.demo.run import run_demo

__all__ = ["run_demo"]
