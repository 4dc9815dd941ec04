"""The lines of a privacy ledger: what a site's population has spent of its privacy budget. FORMAT.md, section 15."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from fedlora.core.canonical import canonical
from fedlora.core.plan import Digest
from fedlora.core.records import Count, Record
from fedlora.core.tables.privacy import Mechanism, Unit
from fedlora.formats.files import Damaged


class Event(Record):
    """``count`` releases of one kind: Poisson-sampled Gaussian mechanisms, add or remove one unit."""

    mechanism: Mechanism
    unit: Unit
    noise_multiplier: Annotated[float, Field(gt=0)]
    """standard deviation of the noise over the clip norm, in what others see"""
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    """probability that a unit is drawn"""
    honest_sites: Annotated[int, Field(ge=1)]
    """sites whose noise is counted on; this site alone adds noise_multiplier / sqrt(honest_sites)"""
    failure: Annotated[float, Field(ge=0, le=1)]
    """part of delta that one release uses up because it is computed and not ideal"""
    count: Annotated[int, Field(ge=1)]


class Begun(Record):
    """The first line."""

    op: Literal["begin"] = "begin"
    format: Literal[1] = 1
    at: Count
    """seconds since 1970, as in every line"""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """of every epsilon of this ledger"""
    units: Annotated[int, Field(ge=1)]
    """units of the population, as its operator said"""


class Reserved(Record):
    """A run may release this in all; what it has not released is set aside until the run is closed."""

    op: Literal["reserve"] = "reserve"
    at: Count
    run: Digest
    events: tuple[Event, ...]


class Charged(Record):
    """A release that may have been computed. It is on the disk before the first unit is drawn."""

    op: Literal["charge"] = "charge"
    at: Count
    run: Digest
    exchange: Count
    """number of the exchange in its run"""
    adapter: Digest
    """from which the work began"""
    event: Event


class Closed(Record):
    """What a run had set aside and not released is free again."""

    op: Literal["close"] = "close"
    at: Count
    run: Digest


class Lost(Record):
    """Lines are gone, and a person has accepted that what they can have held counts as spent. Nothing is set aside after it."""

    op: Literal["loss"] = "loss"
    at: Count
    head: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    """digest of the line that was known elsewhere and is not in this ledger; empty if none was named"""
    events: tuple[Event, ...]


Line: TypeAlias = Begun | Reserved | Charged | Closed | Lost
_LINE: Final[TypeAdapter[Line]] = TypeAdapter(Annotated[Line, Field(discriminator="op")])


def facts_of(line: Line) -> dict[str, Any]:
    """A line for :meth:`fedlora.formats.state.chain.Chain.add`."""
    return line.model_dump(mode="json")


def parse_line(facts: Mapping[str, Any], where: str) -> Line:
    """Inverse of :func:`facts_of`.

    Raises:
        Damaged: it is no line of this version; names ``where``.
    """
    try:
        return _LINE.validate_json(canonical(dict(facts)))
    except ValidationError:
        raise Damaged(f"{where} is no line of a privacy ledger of this version") from None
