"""The scale of a plot of scores. Shares near 1 are spaced by their odds, so that 0.991 and 0.996 are told apart.

On a scale from 0.3 to 1 these two lie on one another, though the second makes half as many mistakes. By the logarithm
of the odds, log(x / (1 - x)), 0.9, 0.99 and 0.999 are equally far apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_STOPS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)
_NEAR = 0.9  # from which on mistakes are few enough for their odds to count
_TICKS = 5  # at most


@dataclass(frozen=True)
class Scale:
    """From `low` to `high`; `odds`: spaced by the logarithm of the odds, otherwise evenly."""

    low: float
    high: float
    odds: bool = False

    @classmethod
    def of(cls, values: Iterable[float]) -> Scale | None:
        """One that holds all values, its ends rounded outwards; None of no values."""
        ends = list(values)
        if not ends:
            return None
        least, most = min(ends), max(ends)
        if least < 0 or not _NEAR < most <= 1:
            low, high = math.floor(10 * least) / 10, math.ceil(10 * most) / 10
            return cls(low, high if high > low else low + 0.1)
        low = max((stop for stop in _STOPS if stop <= least), default=_STOPS[0])
        high = min((stop for stop in _STOPS if stop >= most and stop > low), default=_STOPS[-1])
        return cls(min(low, _STOPS[-2]), high, odds=True)

    def spaced(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Values (N,) in units of this scale: those beyond the outermost stop of odds lie on it."""
        if not self.odds:
            return np.asarray(values, dtype=np.float64)
        shares = np.clip(np.asarray(values, dtype=np.float64), _STOPS[0], _STOPS[-1])
        return np.log(shares / (1 - shares))

    def percent(self, value: float) -> str:
        """Where a value lies, as CSS has it."""
        place, low, high = self.spaced([value, self.low, self.high])
        return f"{100 * min(1.0, max(0.0, (place - low) / (high - low))):.2f}%"

    @property
    def ticks(self) -> list[float]:
        """Values to name on the scale, both ends among them."""
        if not self.odds:
            return [self.low, self.high]
        stops = [stop for stop in _STOPS if self.low <= stop <= self.high]
        low, high = map(float, self.spaced([self.low, self.high]))
        wanted = np.linspace(low, high, min(_TICKS, len(stops)))
        return sorted({stops[int(np.abs(self.spaced(stops) - place).argmin())] for place in wanted})

    @property
    def told(self) -> str:
        """From where to where, in words."""
        return f"from {self.low:g} to {self.high:g}{', spaced by their odds' if self.odds else ''}"
