"""A site's commitment to its audit canaries: where each end keeps it, and how it travels in an envelope. FORMAT.md, 16.2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fedlora.core.canonical import is_digest
from fedlora.core.errors import EnvelopeError
from fedlora.formats.state.memory import Memory, get_record, put_record

_MARK: Final = ";audit="
_LOST: Final = "let this site sit out the run (`fedlora site repair`): which of its rows are canaries is not known any more"


@dataclass(frozen=True, slots=True)
class Planted:
    """What a site has decided about the audit of a run, before it trained anything.

    Attributes:
        seed: 32 bytes from which its canaries follow; empty: it takes no part.
        nonce: 32 bytes that keep the commitment from being guessed; empty in the same case.
        why: why it takes no part, in a sentence that stays here; empty if it does.
    """

    seed: bytes = field(default=b"", repr=False)
    nonce: bytes = field(default=b"", repr=False)
    commitment: str = ""
    why: str = ""


def load_planted(memory: Memory, run: str) -> Planted | None:
    """What was decided; None: nothing yet.

    Raises:
        StoreError: the record is damaged.
    """
    found = get_record(memory, _site_key(run), "audit", hint=_LOST)
    if found is None:
        return None
    return Planted(bytes.fromhex(found["seed"]), bytes.fromhex(found["nonce"]), str(found["commitment"]), str(found["why"]))


def save_planted(memory: Memory, run: str, planted: Planted) -> None:
    """Stores it; it is on the disk when this returns."""
    facts = {"seed": planted.seed.hex(), "nonce": planted.nonce.hex(), "commitment": planted.commitment, "why": planted.why}
    put_record(memory, _site_key(run), "audit", facts)


def with_commitment(codec: str, memory: Memory, run: str) -> str:
    """The ``codec`` of a reply: with the site's commitment, once it has made one in this run."""
    planted = load_planted(memory, run)
    return f"{codec}{_MARK}{planted.commitment}" if planted is not None and planted.commitment else codec


def split_codec(codec: str) -> tuple[str, str]:
    """A received ``codec`` without the commitment, and the commitment; empty if there is none.

    Raises:
        EnvelopeError (malformed-header): what stands behind the mark is no digest.
    """
    plain, mark, said = codec.partition(_MARK)
    if mark and not is_digest(said):
        raise EnvelopeError("the commitment in field 'codec' is no digest", code="malformed-header")
    return plain, said


def note_commitment(memory: Memory, run: str, site: str, said: str, *, round: int) -> None:
    """At the server: keeps a site's first commitment, with the round in which it came.

    Raises:
        EnvelopeError (equivocation): it is another one than the site's first.
    """
    known = known_commitment(memory, run, site)
    if known is None:
        put_record(memory, _server_key(run, site), "commitment", {"commitment": said, "round": round})
    elif known[0] != said:
        raise EnvelopeError(f"{site} has committed to other canaries before", code="equivocation")


def known_commitment(memory: Memory, run: str, site: str) -> tuple[str, int] | None:
    """At the server: a site's commitment and the round in which it came first; None if it has made none."""
    found = get_record(memory, _server_key(run, site), "commitment")
    return None if found is None else (str(found["commitment"]), int(found["round"]))


def _site_key(run: str) -> str:
    return f"{run}/audit"


def _server_key(run: str, site: str) -> str:
    return f"{run}/audit/{site}"
