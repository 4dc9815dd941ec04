"""A roster with its coordinators' signatures: bytes, files, and who has signed. FORMAT.md, 9.2."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature

from fedlora.core.canonical import canonical
from fedlora.core.errors import (
    FedLoRAError,
    RosterInvalid,
    StoreError,
)
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.roster import MAX_BYTES, MAX_COORDINATORS, Roster, check_name, parse_signature, roster_json, roster_of


@dataclass(frozen=True, slots=True)
class SignedRoster:
    """A roster and its signatures. Nothing in it may be used before :func:`fedlora.formats.trust.accept` has checked it.

    Args:
        signatures: Ed25519, 64 bytes, by the coordinator's name.

    Raises:
        RosterInvalid: a signature of another length, a name that is none, or too many of them.
    """

    roster: Roster
    signatures: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.signatures) > 2 * MAX_COORDINATORS:  # those of this epoch and of the one before
            raise RosterInvalid(f"{len(self.signatures)} signatures, at most {2 * MAX_COORDINATORS}")
        for name, signature in self.signatures.items():
            check_name(name)
            if len(signature) != 64:
                raise RosterInvalid(f"the signature of {name} has {len(signature)} bytes, not 64")

    def dump(self) -> bytes:
        """Canonical JSON; law: ``parse(s.dump()) == s``."""
        signatures = {name: base64.b64encode(s).decode() for name, s in self.signatures.items()}
        return canonical({"roster": self.roster.fields(), "signatures": signatures})

    @classmethod
    def parse(cls, raw: bytes) -> SignedRoster:
        """Inverse of :meth:`dump`. Checks no signature.

        Raises:
            Oversized, RosterInvalid, WireError (version-unsupported), BadSignature: as :meth:`Roster.parse`.
        """
        value = roster_json(raw)
        if set(value) != {"roster", "signatures"} or not isinstance(value["signatures"], dict):
            raise RosterInvalid("a signed roster has the fields roster and signatures", hint="make one with `fedlora roster new`")
        found = cls(roster_of(value["roster"]), {n: parse_signature(s) for n, s in value["signatures"].items()})
        if found.dump() != raw:
            raise RosterInvalid("a signature is not canonical base64")
        return found

    def sign(self, identity: Identity) -> SignedRoster:
        """With this coordinator's signature added (RFC 8032: the same one each time)."""
        return replace(self, signatures={**self.signatures, identity.name: identity.signing.sign(self._signed())})

    def signers(self, coordinators: Sequence[PublicIdentity]) -> tuple[str, ...]:
        """Those of ``coordinators`` whose signature is here and valid."""
        return tuple(c.name for c in coordinators if self._has(c))

    def verify(self, coordinators: Sequence[PublicIdentity], needed: int, *, others: Sequence[PublicIdentity] = ()) -> None:
        """Checks every signature.

        Args:
            coordinators: whose signatures count, all keys distinct.
            needed: how many of them there have to be.
            others: who may sign as well, without counting: the other side of a change of epoch.

        Raises:
            RosterInvalid: a signature is not valid or a stranger's, or fewer than ``needed`` count.
        """
        known = {c.name: c for c in (*coordinators, *others)}
        if any(known[c.name].signing != c.signing for c in coordinators):
            raise RosterInvalid("a coordinator has another key than before", hint="list a new key under a new name")
        for name in sorted(self.signatures):
            if name not in known:
                raise RosterInvalid(f"{name} has signed and is no coordinator of this roster")
            if not self._has(known[name]):
                raise RosterInvalid(f"the signature of {name} is not valid", hint="get the file again from a coordinator")
        count = len(self.signers(coordinators))
        if count < needed:
            raise RosterInvalid(
                f"{count} of {needed} signatures that epoch {self.roster.epoch} needs",
                hint=f"run `fedlora roster sign` with the keys of {', '.join(c.name for c in coordinators if not self._has(c))}",
            )

    def _signed(self) -> bytes:
        return b"fedlora/v1/roster-signature\0" + bytes.fromhex(self.roster.digest())

    def _has(self, coordinator: PublicIdentity) -> bool:
        try:
            coordinator.verify_key().verify(self.signatures.get(coordinator.name, b""), self._signed())
        except InvalidSignature:
            return False
        return True


def load_roster(path: Path) -> SignedRoster:
    """Reads a roster file. Checks no signature.

    Raises:
        StoreError: it cannot be read.
        Oversized, RosterInvalid, WireError (version-unsupported), BadSignature: as :meth:`SignedRoster.parse`.
    """
    try:
        with path.open("rb") as file:
            return SignedRoster.parse(file.read(MAX_BYTES + 1))
    except OSError as e:
        what = "`fedlora roster new` makes the first roster" if isinstance(e, FileNotFoundError) else NEWEST
        raise StoreError(f"cannot read {path}: {e.strerror}", hint=what) from None
    except FedLoRAError as e:
        raise type(e)(f"{path}: {e}", hint=f"{NEWEST}; {e.hint}".rstrip("; ")) from None


NEWEST = "restore it from a backup, or get the newest signed roster from a coordinator"
"""The way on where a roster file is damaged."""
