"""How often somebody may do something: a token bucket, and one for each name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

_MOST_NAMES = 4096


@dataclass(slots=True)
class Bucket:
    """``burst`` at once, ``rate`` a second in the long run.

    Args:
        longest_s: longest wait; a debt beyond it is forgiven.
        clock: seconds, rising.
    """

    rate: float
    burst: float
    longest_s: float
    clock: Callable[[], float]
    _level: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._level, self._at = self.burst, self.clock()

    def wait_s(self) -> float:
        """Takes one, and says after how many seconds it is due: 0 within the burst. Who does not wait goes further into debt."""
        now = self.clock()
        level = min(self._level + (now - self._at) * self.rate, self.burst) - 1
        self._level, self._at = max(level, -self.rate * self.longest_s), now
        return max(-self._level / self.rate, 0.0)

    def put_back(self) -> None:
        """The one that was taken last was not used."""
        self._level = min(self._level + 1, self.burst)


@dataclass(slots=True)
class Buckets:
    """A bucket for each name: of a site, or an address. Of more than 4096 names the one that was quiet longest is forgotten."""

    rate: float
    burst: float
    longest_s: float
    clock: Callable[[], float]
    _of: dict[str, Bucket] = field(default_factory=dict)

    def of(self, name: str) -> Bucket:
        """The bucket of this name."""
        found = self._of.pop(name, None) or Bucket(self.rate, self.burst, self.longest_s, self.clock)
        if len(self._of) >= _MOST_NAMES:
            del self._of[next(iter(self._of))]
        self._of[name] = found
        return found
