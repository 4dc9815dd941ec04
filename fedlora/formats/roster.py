"""The roster: which keys take part, signed by the coordinators, one epoch after the other. FORMAT.md, section 9.

A site trusts the roster that its operator approved by digest, and from there each next epoch that enough of the coordinators
of the one before have signed. Nothing is trusted because it was seen first, and no older epoch comes back.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from fedlora.core.canonical import canonical, is_digest, parse_object
from fedlora.core.errors import (
    ConfigError,
    EnvelopeError,
    KeyFileError,
    Oversized,
    RevokedSite,
    RosterExpired,
    RosterInvalid,
    WireError,
)
from fedlora.core.limits import MAX_SITES
from fedlora.core.messages import SERVER, check_site_name
from fedlora.formats.envelope import NONE
from fedlora.formats.keys import PublicIdentity

Status = Literal["active", "revoked"]

VERSIONS = (1, 2)
"""2: sites are in groups."""
MAX_BYTES = 4 << 20
MAX_COORDINATORS = 16
MAX_SUITES = 16
SKEW_S = 900
"""How far a clock may be behind where a roster begins, seconds. Where it ends nothing is allowed: a revocation that a server
keeps back would hold that much later."""

_LAST_S = 253_402_300_799  # the end of the year 9999: later times cannot be shown
_LINE = 2048  # a public key is 1 line of at most 1747 characters
_RELEASE = re.compile(r"(0|[1-9][0-9]{0,4})(\.(0|[1-9][0-9]{0,4})){2}")


_SCALARS = ("fed", "epoch", "previous", "not_before", "not_after", "min_version", "max_colluding", "min_cohort", "needed")


def federation(server: PublicIdentity) -> str:
    """Names the federation: the digest of the server's signing key, hex. FORMAT.md, section 1.4."""
    return hashlib.sha256(b"fedlora/v1/genesis\0" + server.signing).hexdigest()


@dataclass(frozen=True, slots=True)
class Member:
    """A site on the roster. A revoked one stays there, so that neither its name nor its keys can come back.

    Attributes:
        group: number of its group, from 1; 0: it is in none yet. See :meth:`Roster.groups`.
    """

    identity: PublicIdentity
    status: Status
    group: int = 0


@dataclass(frozen=True, slots=True)
class Roster:
    """Who takes part, and on which terms, for one epoch.

    Args:
        fed: :func:`federation` of ``server``.
        epoch: 1, 2, ...
        previous: digest of the roster of the epoch before; 64 zeros at epoch 1.
        not_before, not_after: seconds since 1970, both inclusive.
        min_version: the oldest release that may take part, as ``0.1.0``.
        suites: the cipher suites that envelopes may use, rising.
        max_colluding: up to this many sites may collude without learning another site's update; at least 1.
        min_cohort: fewest sites whose sum may be shown, at least ``max(3, 3 * max_colluding)``.
        server: the aggregator.
        coordinators: who may sign, sorted by name, 1 to 16.
        needed: how many of them have to.
        sites: sorted by name, 1 to 256.

    Raises:
        RosterInvalid: any of this does not hold, or a key stands in two places.
    """

    fed: str
    epoch: int
    previous: str
    not_before: int
    not_after: int
    min_version: str
    suites: tuple[int, ...]
    max_colluding: int
    min_cohort: int
    server: PublicIdentity
    coordinators: tuple[PublicIdentity, ...]
    needed: int
    sites: tuple[Member, ...]

    def __post_init__(self) -> None:
        _check_terms(self)
        _check_members(self)

    def dump(self) -> bytes:
        """Canonical JSON; law: ``parse(r.dump()) == r``."""
        return canonical(self.fields())

    @classmethod
    def parse(cls, raw: bytes) -> Roster:
        """Inverse of :meth:`dump`.

        Raises:
            Oversized, RosterInvalid, WireError (version-unsupported): too long; malformed; of another version.
            BadSignature: it holds a key for which anybody can sign.
        """
        return roster_of(roster_json(raw))

    def digest(self) -> str:
        """Names this roster, hex: what an operator approves and an envelope's header states."""
        return hashlib.sha256(b"fedlora/v1/roster\0" + self.dump()).hexdigest()

    def active(self) -> dict[str, PublicIdentity]:
        """The sites that take part, by name, in order of name."""
        return {m.identity.name: m.identity for m in self.sites if m.status == "active"}

    def groups(self) -> tuple[frozenset[str], ...]:
        """Names of the sites of each group that is whole, in order of its number: nobody of it was revoked.

        Under secure aggregation a sum is over whole groups. A roster without groups is one group of all its active sites.
        """
        if not self.grouped:
            return (frozenset(self.active()),)
        numbers = {m.group for m in self.sites if m.group} - {m.group for m in self.sites if m.status == "revoked"}
        return tuple(frozenset(m.identity.name for m in self.sites if m.group == n) for n in sorted(numbers))

    @property
    def grouped(self) -> bool:
        """Whether it says which sites are a group."""
        return any(m.group for m in self.sites)

    def index(self, name: str) -> int:
        """The place of a site, from 1, among all members in order of name: the same for everybody who has this roster.
        Another epoch may count otherwise.

        Raises:
            EnvelopeError (unknown-site): not on the roster.
        """
        for place, member in enumerate(self.sites, 1):
            if member.identity.name == name:
                return place
        raise EnvelopeError("the site is not on the roster", code="unknown-site")

    def site(self, name: str) -> PublicIdentity:
        """The keys of a site that takes part.

        Raises:
            EnvelopeError (unknown-site), RevokedSite: it is not on the roster, or no longer.
        """
        member = self.sites[self.index(name) - 1]
        if member.status == "revoked":
            raise RevokedSite(f"{name} has been revoked", hint="give a site that comes back new keys and a new name")
        return member.identity

    def check_time(self, now: int) -> None:
        """Refuses a roster after its end, or more than :data:`SKEW_S` before its beginning.

        Args:
            now: seconds since 1970.

        Raises:
            RosterExpired: it is not in force.
        """
        if self.not_before - SKEW_S <= now <= self.not_after:
            return
        state = "has expired" if now > self.not_after else "is not in force yet"
        times = [datetime.fromtimestamp(s, UTC).strftime("%Y-%m-%d %H:%M") for s in (self.not_before, self.not_after)]
        raise RosterExpired(
            f"the roster of epoch {self.epoch} {state}: it is valid from {times[0]} to {times[1]} UTC",
            hint="check this machine's clock (`date -u`); if it is right, ask the coordinators for the next epoch",
        )

    def fields(self) -> dict[str, Any]:
        """As FORMAT.md, 9.1 has them."""
        return {
            **{name: getattr(self, name) for name in _SCALARS},
            "v": 2 if self.grouped else 1,
            "suites": list(self.suites),
            "server": self.server.line(),
            "coordinators": [c.line() for c in self.coordinators],
            "sites": [
                {"public": m.identity.line(), "status": m.status} | ({"group": m.group} if self.grouped else {})
                for m in self.sites
            ],
        }


# --- what may stand in a roster ----------------------------------------------------------------------------------------

_RANGES = {
    "epoch": (1, (1 << 53) - 1),
    "not_before": (0, _LAST_S),
    "not_after": (0, _LAST_S),
    "max_colluding": (1, MAX_SITES),
    "min_cohort": (3, MAX_SITES),
    "needed": (1, MAX_COORDINATORS),
}


def _check_terms(r: Roster) -> None:
    """Numbers, the chain, version and suites."""
    for name, (least, most) in _RANGES.items():
        found = getattr(r, name)
        if type(found) is not int or not least <= found <= most:
            raise RosterInvalid(f"{name} is a number from {least} to {most}")
    suites = list(r.suites)
    rules = {
        "not_before is before not_after": r.not_before < r.not_after,
        f"min_cohort is at least {3 * r.max_colluding}, three times max_colluding": r.min_cohort >= 3 * r.max_colluding,
        "previous is 64 hex digits": isinstance(r.previous, str) and is_digest(r.previous),
        "epoch 1, and no other, follows none": (r.previous == NONE) == (r.epoch == 1),
        "min_version is three numbers with dots, as 0.1.0": _matches(_RELEASE, r.min_version),
        "suites are numbers from 1 to 255": all(type(s) is int and 1 <= s <= 255 for s in suites),
    }
    for rule in (rule for rule, holds in rules.items() if not holds):
        raise RosterInvalid(f"this roster breaks a rule: {rule}")
    _check_count("suites", suites, most=MAX_SUITES)
    if suites != sorted(set(suites)):
        raise RosterInvalid("suites are in strictly rising order")


def _check_members(r: Roster) -> None:
    """Counts, names and keys. A key in two places would let one count for two, or the server sign for a coordinator."""
    for what, people, most in (
        ("coordinators", r.coordinators, MAX_COORDINATORS),
        ("sites", tuple(m.identity for m in r.sites), MAX_SITES),
    ):
        _check_count(what, people, most=most)
        names = [check_name(p.name) for p in people]
        if names != sorted(set(names)):
            raise RosterInvalid(f"{what} are sorted by name, each name once")
    if r.needed > len(r.coordinators):
        raise RosterInvalid(f"{r.needed} signatures are needed and there are {len(r.coordinators)} coordinators")
    if any(m.status not in ("active", "revoked") for m in r.sites):
        raise RosterInvalid("a site is active or revoked")
    if any(type(m.group) is not int or not 0 <= m.group <= MAX_SITES for m in r.sites):
        raise RosterInvalid(f"the group of a site is a number from 0 to {MAX_SITES}")
    if r.server.name != SERVER or r.fed != federation(r.server):
        raise RosterInvalid(f"the server is named {SERVER!r}, and fed is the digest of its key")
    everybody = [r.server, *r.coordinators, *(m.identity for m in r.sites)]
    if len({p.signing for p in everybody}) < len(everybody) or len({p.kem for p in everybody}) < len(everybody):
        raise RosterInvalid("one key occurs twice", hint="give every site, every coordinator and the server keys of their own")


def check_name(name: str) -> str:
    """Refuses what is no name of a site, server or coordinator.

    Raises:
        RosterInvalid.
    """
    try:
        return check_site_name(name)
    except ConfigError as e:
        raise RosterInvalid(str(e), hint=e.hint) from None


def _check_count(what: str, found: Sequence[object], *, most: int) -> None:
    if not 1 <= len(found) <= most:
        raise RosterInvalid(f"{len(found)} {what}; 1 to {most} are possible")


def _matches(pattern: re.Pattern[str], text: object) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


# --- bytes ---------------------------------------------------------------------------------------------------------


def roster_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in a roster file.

    Raises:
        Oversized, RosterInvalid.
    """
    if len(raw) > MAX_BYTES:
        raise Oversized(
            f"longer than a roster may be: {MAX_BYTES} bytes", hint="this is another file; look at it with `fedlora inspect`"
        )
    try:
        return parse_object(raw)
    except ValueError:
        raise RosterInvalid("not a roster: not canonical JSON", hint="copy the file whole and do not edit it") from None


def roster_of(value: object) -> Roster:
    """The roster that a JSON value describes.

    Raises:
        RosterInvalid, WireError (version-unsupported).
    """
    if not isinstance(value, dict):
        raise RosterInvalid("a roster is a JSON object")
    version = value.get("v")
    if type(version) is int and version not in VERSIONS:
        raise WireError(
            f"a roster of version {version}, this release reads {max(VERSIONS)}",
            hint="update FedLoRA",
            code="version-unsupported",
        )
    if set(value) != {*_SCALARS, "v", "suites", "server", "coordinators", "sites"} or type(version) is not int:
        raise RosterInvalid(f"a roster has exactly the fields of version {max(VERSIONS)}")
    coordinators = _list(value["coordinators"], "coordinators", most=MAX_COORDINATORS)
    sites = _list(value["sites"], "sites", most=MAX_SITES)
    found = Roster(
        **{name: value[name] for name in _SCALARS},
        suites=tuple(_list(value["suites"], "suites", most=MAX_SUITES)),
        server=_public(value["server"]),
        coordinators=tuple(_public(c) for c in coordinators),
        sites=tuple(_member(s, grouped=version > 1) for s in sites),
    )
    if found.grouped != (version > 1):
        raise RosterInvalid("a roster of version 2 has groups, one of version 1 has none")
    return found


def _list(value: object, what: str, *, most: int) -> list[Any]:
    """Counted before a single key in it is looked at: checking one costs two operations on curves."""
    if not isinstance(value, list):
        raise RosterInvalid(f"{what} is a list")
    _check_count(what, value, most=most)
    return value


def _member(value: object, *, grouped: bool) -> Member:
    fields = {"public", "status", "group"} if grouped else {"public", "status"}
    if not isinstance(value, dict) or set(value) != fields:
        raise RosterInvalid(f"a site has exactly the fields {', '.join(sorted(fields))}")
    return Member(_public(value["public"]), value["status"], value.get("group", 0))


def _public(line: object) -> PublicIdentity:
    try:
        if not isinstance(line, str) or len(line) > _LINE:
            raise KeyFileError("not a line")
        found = PublicIdentity.parse(line)
    except KeyFileError as e:
        raise RosterInvalid(f"a key on the roster is malformed: {e}") from None
    if found.line() != line:
        raise RosterInvalid(f"the key of {found.name} is not written in its canonical form")
    return found


def parse_signature(text: object) -> bytes:
    """The bytes of a signature in base64.

    Raises:
        RosterInvalid.
    """
    try:
        return base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except (ValueError, binascii.Error):
        raise RosterInvalid("a signature is not base64") from None
