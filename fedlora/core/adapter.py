"""An adapter is a point in R^n: one float32 vector and a layout that names its parts.

Clipping, noise, quantization and averaging are one-line vector operations; :meth:`Adapter.tensors` gives named views
when B @ A matters.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.canonical import canonical, parse_canonical
from fedlora.core.errors import NonFiniteUpdate, UpdateRejected, WrongContext
from fedlora.core.metrics import bad_counters

F32: TypeAlias = NDArray[np.float32]
Factors: TypeAlias = Literal["A", "B", "AB"]
"""Which factors of the LoRA pairs."""

MAX_ENTRIES = 65_536
"""Most tensors that a layout may name."""
MAX_PARAMETERS = 1 << 31
"""Most values that an adapter may hold: 8 GiB as float32."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


@dataclass(frozen=True, slots=True)
class Pair:
    """Where one LoRA pair lies in the vector.

    Attributes:
        module: the adapted module, without ``.lora_A.weight``.
        a: elements of A, shape (rank, d_in), row-major.
        b: elements of B, shape (d_out, rank), row-major.
    """

    module: str
    a: slice
    b: slice
    rank: int
    d_in: int
    d_out: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Sorted tensor names with their shapes; the vector holds the tensors in this order, row-major.

    Args:
        entries: ((name, shape), ...) in strictly rising order of name.

    Raises:
        WrongContext (wrong-layout): a name is malformed, repeated or out of order, a shape is not of 1 to 4 positive sizes, or a
            limit (MAX_ENTRIES, MAX_PARAMETERS) is exceeded.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]
    _digest: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # none or one: computed once

    def __post_init__(self) -> None:
        if not 0 < len(self.entries) <= MAX_ENTRIES:
            raise WrongContext(f"a layout has 1 to {MAX_ENTRIES} tensors, this one {len(self.entries)}", code="wrong-layout")
        last = ""
        for name, shape in self.entries:
            if not _NAME.fullmatch(name) or name <= last:
                raise WrongContext(f"tensor names must be plain, unique and sorted: {name[:80]!r}", code="wrong-layout")
            if not 1 <= len(shape) <= 4 or any(type(n) is not int or n < 1 for n in shape):
                raise WrongContext(f"{name}: not a shape: {shape}", code="wrong-layout")
            last = name
        if self.size > MAX_PARAMETERS:
            raise WrongContext(f"{self.size} values are more than {MAX_PARAMETERS}", code="wrong-layout")

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[int, ...]]) -> Layout:
        """The layout of these names and shapes, sorted."""
        return cls(tuple(sorted((n, tuple(int(x) for x in s)) for n, s in tensors.items())))

    @classmethod
    def parse(cls, text: bytes) -> Layout:
        """Inverse of :meth:`dump`.

        Raises:
            WrongContext (wrong-layout): not canonical.
        """
        try:
            rows = [(name, tuple(shape)) for name, shape in parse_canonical(text)]
        except (ValueError, TypeError):
            raise WrongContext("the layout is not a canonical list of [name, shape]", code="wrong-layout") from None
        if not all(isinstance(name, str) for name, _ in rows):
            raise WrongContext("a tensor is named by a string", code="wrong-layout")
        return cls(tuple(rows))

    def dump(self) -> bytes:
        """Canonical JSON: ``[["name",[r,c]],...]`` without spaces."""
        return canonical([[n, list(s)] for n, s in self.entries])

    @property
    def size(self) -> int:
        """Number of values n."""
        return sum(math.prod(s) for _, s in self.entries)

    def digest(self) -> str:
        """SHA-256 of :meth:`dump`, hex."""
        if not self._digest:
            self._digest.append(hashlib.sha256(self.dump()).hexdigest())
        return self._digest[0]

    def slices(self) -> Iterator[tuple[str, slice, tuple[int, ...]]]:
        """(name, where in the vector, shape) of each tensor, in order."""
        at = 0
        for name, shape in self.entries:
            n = math.prod(shape)
            yield name, slice(at, at + n), shape
            at += n

    def rows(self) -> int:
        """Number of rows over all tensors: the product of all sizes but the last, summed."""
        return sum(math.prod(s[:-1]) for _, s in self.entries)

    def pairs(self) -> list[Pair]:
        """The LoRA pairs, sorted by module.

        Raises:
            WrongContext (wrong-layout): a tensor belongs to no pair, or the ranks of a pair differ.
        """
        where = {name: (at, shape) for name, at, shape in self.slices()}
        pairs = []
        for name, (at, shape) in where.items():
            module, _, factor = name.rpartition(".lora_")
            if factor == "B.weight" and f"{module}.lora_A.weight" in where:
                continue
            b = where.get(f"{module}.lora_B.weight")
            if factor != "A.weight" or b is None or len(shape) != 2 or len(b[1]) != 2 or shape[0] != b[1][1]:
                raise WrongContext(f"{name} is not part of a LoRA pair", code="wrong-layout")
            pairs.append(Pair(module, at, b[0], rank=shape[0], d_in=shape[1], d_out=b[1][0]))
        return pairs

    def only(self, factors: Factors) -> Layout:
        """The tensors of these factors.

        Raises:
            WrongContext (wrong-layout): there is none.
        """
        suffixes = tuple(f".lora_{f}.weight" for f in factors)
        return self if factors == "AB" else Layout(tuple((n, s) for n, s in self.entries if n.endswith(suffixes)))

    @property
    def rank(self) -> int:
        """The one rank of all pairs.

        Raises:
            WrongContext (wrong-layout): pairs of different ranks, or tensors that are no pair.
        """
        ranks = {p.rank for p in self.pairs()}
        if len(ranks) != 1:
            raise WrongContext(f"pairs have different ranks: {sorted(ranks)}", code="wrong-layout")
        return ranks.pop()

    def at_rank(self, rank: int) -> Layout:
        """The same modules with pairs of this rank."""
        shapes: dict[str, tuple[int, ...]] = {}
        for p in self.pairs():
            shapes[f"{p.module}.lora_A.weight"] = (rank, p.d_in)
            shapes[f"{p.module}.lora_B.weight"] = (p.d_out, rank)
        return Layout.of(shapes)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A vector with its layout.

    Args:
        vector: (layout.size,) float32. Made read-only: an adapter never changes under its reader.

    Raises:
        ValueError: wrong dtype or length.
    """

    vector: F32
    layout: Layout
    _digest: list[str] = field(default_factory=list, init=False, repr=False)  # none or one: computed once

    def __post_init__(self) -> None:
        if self.vector.dtype != np.float32 or self.vector.shape != (self.layout.size,):
            raise ValueError(f"expected ({self.layout.size},) float32, got {self.vector.shape} {self.vector.dtype}")
        self.vector.flags.writeable = False

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[np.floating]]) -> Adapter:
        """Copies named tensors into one vector, as float32."""
        layout = Layout.of({n: t.shape for n, t in tensors.items()})
        vector = np.empty(layout.size, np.float32)
        for name, at, _ in layout.slices():
            vector[at] = tensors[name].reshape(-1)
        return cls(vector, layout)

    def tensors(self) -> dict[str, F32]:
        """Read-only views by name."""
        vector = self.vector
        return {name: vector[at].reshape(shape) for name, at, shape in self.layout.slices()}

    def part(self, layout: Layout) -> Adapter:
        """The tensors that ``layout`` names, copied.

        Raises:
            WrongContext (wrong-layout): one is missing here or has another shape.
        """
        if layout == self.layout:
            return self
        mine, out = {n: (at, s) for n, at, s in self.layout.slices()}, np.empty(layout.size, np.float32)
        vector = self.vector
        for name, at, shape in layout.slices():
            if name not in mine or mine[name][1] != shape:
                raise WrongContext(f"{name} is not here, or has another shape", code="wrong-layout")
            out[at] = vector[mine[name][0]]
        return Adapter(out, layout)

    def replaced(self, part: Adapter) -> Adapter:
        """This adapter with the tensors of ``part`` in the place of its own.

        Raises:
            WrongContext (wrong-layout): one is not here or has another shape.
        """
        if part.layout == self.layout:
            return part
        mine, out = {n: (at, s) for n, at, s in self.layout.slices()}, self.vector.copy()
        new = part.vector
        for name, at, shape in part.layout.slices():
            if name not in mine or mine[name][1] != shape:
                raise WrongContext(f"{name} is not here, or has another shape", code="wrong-layout")
            out[mine[name][0]] = new[at]
        return Adapter(out, self.layout)

    def at_rank(self, rank: int) -> Adapter:
        """The first ``rank`` components (rows of A, columns of B); those beyond its own rank are zero."""
        target, own = self.layout.at_rank(rank), self.tensors()
        if target == self.layout:
            return self
        out = np.zeros(target.size, np.float32)
        for name, at, shape in target.slices():
            kept = tuple(slice(0, min(a, b)) for a, b in zip(shape, own[name].shape, strict=True))
            out[at].reshape(shape)[kept] = own[name][kept]
        return Adapter(out, target)

    def digest(self) -> str:
        """SHA-256 over layout digest and the little-endian float32 values, hex."""
        if not self._digest:
            h = hashlib.sha256(bytes.fromhex(self.layout.digest()))
            h.update(np.ascontiguousarray(self.vector, dtype="<f4").data)
            self._digest.append(h.hexdigest())
        return self._digest[0]


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one site learned in one round.

    Attributes:
        delta: local minus global, (n,) float32, possibly encoded by the aggregator.
        weight: supervised tokens, examples, or 1; an integer >= 0, as the plan's ``aggregate.weighting`` says.
        counters: what the metrics that the plan lists are made of (:mod:`fedlora.core.metrics`), integers from 0.
    """

    delta: F32
    weight: int
    counters: Mapping[str, int]

    def check(self, size: int) -> None:
        """Refuses what must not be added up.

        Raises:
            WrongContext (wrong-layout): not ``size`` values.
            NonFiniteUpdate: NaN or infinity in the delta.
            UpdateRejected: a counter is no integer from 0 to 2^53 - 1.
        """
        if self.delta.shape != (size,):
            raise WrongContext(f"expected {size} values, got {self.delta.shape}", code="wrong-layout")
        # NaN is the largest and the smallest of anything: no n-sized mask.
        if not (math.isfinite(self.delta.max()) and math.isfinite(self.delta.min())):
            raise NonFiniteUpdate("the delta holds NaN or infinity", hint="lower learning_rate, or look at the site's rows")
        if bad := bad_counters(self.counters):
            raise UpdateRejected(f"not an integer from 0 to 2^53 - 1: {', '.join(bad)}")
