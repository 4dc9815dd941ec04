"""The state of a run after a round, in memory or at rest in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from fedlora.core.adapter import F32, Adapter, Layout
from fedlora.core.records import RoundRecord


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The state after a round: the global adapter, its record, and the state of the rule and the server optimizer.

    Round 0 is the first adapter.
    """

    round: int
    adapter: Adapter
    record: RoundRecord | None = None
    state: Mapping[str, Adapter] = field(default_factory=dict)


class _Stored(Adapter):
    """A vector of a checkpoint, read again each time it is asked for: a server that waits for its sites for hours holds none."""

    __slots__ = ("_read",)
    _read: Callable[[], Adapter]

    def __init__(self, kept: Adapter, read: Callable[[], Adapter]) -> None:
        object.__setattr__(self, "layout", kept.layout)
        object.__setattr__(self, "_digest", [kept.digest()])
        object.__setattr__(self, "_read", read)

    @property
    def vector(self) -> F32:
        return self._read().vector


def at_rest(checkpoint: Checkpoint, read: Callable[[str, Layout, str], Adapter]) -> Checkpoint:
    """The same without its vectors.

    Args:
        read: reads one again by its name in the file ("" is the adapter), its layout and its digest.
    """

    def stored(name: str, vector: Adapter) -> Adapter:
        layout, digest = vector.layout, vector.digest()
        return _Stored(vector, lambda: read(name, layout, digest))

    state = {name: stored(name, vector) for name, vector in checkpoint.state.items()}
    return replace(checkpoint, adapter=stored("", checkpoint.adapter), state=state)
