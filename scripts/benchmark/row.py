"""What one row of the benchmarks reports: its figures, its runs, and how they meet the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One figure and the bound that it has to keep."""

    figure: str
    value: float
    bound: Literal["at least", "below"]
    limit: float
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """True when the figure keeps the bound."""
        return self.value >= self.limit if self.bound == "at least" else self.value < self.limit


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one row.

    ``runs``: what each run measured, by name. ``counted``: how many events were sent, and how many
    different ones were found at the destination.
    """

    name: str
    title: str
    targets: Sequence[Target]
    figures: Mapping[str, float]
    runs: Sequence[Mapping[str, float]]
    counted: Mapping[str, int]

    @property
    def is_met(self) -> bool:
        """True when every target is met and nothing was lost."""
        return all(target.is_met for target in self.targets) and self.is_complete

    @property
    def is_complete(self) -> bool:
        """True when the destination has exactly what was sent."""
        return self.counted["sent"] == self.counted["received"]
