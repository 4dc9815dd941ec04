"""What a server that may do anything can compute from all that it has heard: seeds, masks, sums. Never an error code.

A session's masked updates are nodes of a graph, and a pair mask that the server cannot compute is an edge between two of them: it
cancels only if both are added up. A sum is opened if all its sites' own masks are known and no such edge leaves it, so that the
parts that hang together are the finest sums that can be opened. Each is opened in fact, bit for bit, and must say of itself how
many sites are in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from protect.secagg.world import identity

from fedlora.core.errors import FedLoRAError
from fedlora.core.messages import Task
from fedlora.core.plan import Plan
from fedlora.core.reader import Reader
from fedlora.formats.derive import derive
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.protocol.cohort import Advert, Cohort, SessionRequirements, leads, read_session
from fedlora.protect.secagg.protocol.dealing import (
    BUNDLE_BYTES,
    MaskKeys,
    Opened,
    Secrets,
    open_ingredient,
    promise,
    receive,
    self_keys,
)
from fedlora.protect.secagg.protocol.masks import add_masks
from fedlora.protect.secagg.protocol.opening import Deal, relay
from fedlora.protect.secagg.protocol.rings import packed_bytes, unpack
from fedlora.protect.secagg.protocol.shamir import SHARE_BYTES, join, weights
from fedlora.protect.secagg.protocol.votes import Delivered
from fedlora.protect.secagg.terms import Terms


def known(name: str) -> PublicIdentity:
    """Everybody's public keys."""
    return identity(name).public


HEAD = 96  # the session's name and a signature stand before the body of a masked update


class NoBound(SessionRequirements):
    """The adversary's own reading of a relay: however little there is."""

    def fewest_inputs(self, n: int) -> int:
        return 0


@dataclass(eq=False)
class Talk:
    """An offer that was made to some sites, and what they have advertised.

    Attributes:
        roots: of the advertisements that the adversary has made itself, for colluders or in a site's name.
    """

    task: Task
    plan: Plan
    terms: Terms
    adverts: dict[str, Advert] = field(default_factory=dict)
    roots: dict[str, bytes] = field(default_factory=dict)


@dataclass(eq=False)
class Body:
    """One masked update, and what its site was shown before: dealer -> (sealed shares, sealed ingredient or none)."""

    site: str
    digest: bytes
    numbers: np.ndarray
    vector: np.ndarray
    view: Mapping[int, tuple[bytes, bytes]]


@dataclass(frozen=True, eq=False)
class Sum:
    """What was opened: the sum over just these honest sites."""

    sites: frozenset[str]
    talk: Talk
    numbers: np.ndarray
    levels: np.ndarray

    @property
    def bits(self) -> int:
        return self.talk.terms.profile.bits

    def signed(self) -> np.ndarray:
        """The levels as signed whole numbers, (n,) int64."""
        half = 1 << (self.bits - 1)
        return (self.levels.astype(np.int64) + half) % (1 << self.bits) - half


@dataclass(eq=False)
class Session:
    """All that was heard in one session, and what it gives.

    Attributes:
        deals: dealer's number -> the last that it dealt; of colluders what the adversary has dealt for them.
        genuine: sealed parts that their honest dealers have made: (dealer, holder) -> shares and ingredients.
        own: ingredients that the adversary has sealed itself -> what is in them.
        bodies: by number; more than one of a site is a find of its own.
        revealed: dealer -> holder -> shares of either kind.
        shown: (dealer, holder) -> the ingredient that the dealer has shown after a complaint.
        points: X25519 halves of mask keys, for an adversary that can break that curve.
        stolen: roots of honest sites, read from a stolen disk with a stolen key.
    """

    talk: Talk
    cohort: Cohort
    deals: dict[int, Deal] = field(default_factory=dict)
    genuine: dict[tuple[int, int], tuple[set[bytes], set[bytes]]] = field(default_factory=dict)
    own: dict[bytes, bytes] = field(default_factory=dict)
    bodies: dict[int, list[Body]] = field(default_factory=dict)
    delivered: dict[int, Delivered] = field(default_factory=dict)
    votes: dict[bytes, dict[int, bytes]] = field(default_factory=dict)
    revealed: dict[int, dict[int, set[bytes]]] = field(default_factory=dict)
    shown: dict[tuple[int, int], bytes] = field(default_factory=dict)
    points: dict[int, X25519PrivateKey] = field(default_factory=dict)
    stolen: dict[int, bytes] = field(default_factory=dict)
    _commitments: dict[int, Mapping[int, tuple[bytes, bytes]]] = field(default_factory=dict)
    _known: dict[tuple[str, int], Any] = field(default_factory=dict)  # of what follows from all that was heard so far
    _sums: list[Sum] | None = None

    # --- what is heard ------------------------------------------------------------------------------------------

    def changed(self) -> None:
        self._known.clear()
        self._sums = None

    def honest(self, number: int) -> bool:
        return self.cohort.advert(number).name not in self.talk.roots

    def hear_deal(self, number: int, raw: bytes) -> None:
        deal = Deal.parse(self.cohort, number, raw)
        self.deals[number] = deal
        self._commitments.setdefault(number, deal.commitments)
        for holder, dealt in deal.dealt.items():
            shares, ingredients = self.genuine.setdefault((number, holder), (set(), set()))
            shares.add(dealt.sealed[:BUNDLE_BYTES])
            ingredients.add(dealt.sealed[BUNDLE_BYTES:])
        self.changed()

    def hear_body(self, number: int, raw: bytes, deals: Mapping[int, Deal]) -> None:
        layout, terms = self.talk.task.reply_layout, self.talk.terms
        body = raw[HEAD:]
        m = (len(body) - packed_bytes(layout.size, terms.profile.bits)) // 8  # numbers: as many as it has, not as it should
        vector = unpack(body[8 * m :], layout.size, terms.profile.bits)
        assert vector is not None
        digest = hashlib.sha256(body).digest()
        sealed = {d: one.dealt[number].sealed for d, one in deals.items() if d != number}
        view = {d: (both[:BUNDLE_BYTES], both[BUNDLE_BYTES:]) for d, both in sealed.items()}
        have = self.bodies.setdefault(number, [])
        if all(b.digest != digest for b in have):
            numbers = np.frombuffer(body[: 8 * m], "<u8").astype(np.uint64)
            have.append(Body(self.cohort.advert(number).name, digest, numbers, vector, view))
        self.delivered[number] = Delivered(number, digest, raw[32:HEAD])
        self.changed()

    def hear_reveal(self, holder: int, raw: bytes) -> None:
        reader = Reader(raw, "reveal")
        read_session(reader, self.cohort.t1)
        for _ in range(reader.number()):
            dealer = reader.number()
            self.revealed.setdefault(dealer, {}).setdefault(holder, set()).add(reader.take(SHARE_BYTES))
        self.changed()

    def hear_opened(self, dealer: int, raw: bytes) -> None:
        """What a dealer has shown to settle complaints: shares of both kinds, and ingredients."""
        reader = Reader(raw, "opened")
        read_session(reader, self.cohort.t1)
        for _ in range(reader.number()):
            holder = reader.number()
            one = Opened.read(reader, leads=leads(dealer, holder))
            self.revealed.setdefault(dealer, {}).setdefault(holder, set()).update((one.mask, one.own))
            if one.ingredient:
                self.shown[dealer, holder] = one.ingredient
        self.changed()

    # --- seeds --------------------------------------------------------------------------------------------------

    def shares(self, kind: str, dealer: int) -> dict[int, bytes]:
        """Holder -> its share of this dealer's seed, as far as the adversary has them: a dealer's commitments tell the kinds."""
        held: dict[int, bytes] = {}
        at = ("mask", "self").index(kind)
        for holder, promised in self._commitments.get(dealer, {}).items():
            for share in (*self.revealed.get(dealer, {}).get(holder, ()), *self._dealt_to(holder).get(dealer, ())):
                if self.cohort.commitment(kind, dealer=dealer, holder=holder, share=share) == promised[at]:
                    held[holder] = share
        return held

    def _dealt_to(self, holder: int) -> Mapping[int, tuple[bytes, bytes]]:
        """What a colluder, or whoever the adversary speaks for, was dealt."""
        if ("dealt", holder) not in self._known:
            self._known["dealt", holder] = self._received(holder)
        found: Mapping[int, tuple[bytes, bytes]] = self._known["dealt", holder]
        return found

    def _received(self, holder: int) -> Mapping[int, tuple[bytes, bytes]]:
        root = self.talk.roots.get(self.cohort.advert(holder).name) or self.stolen.get(holder)
        if root is None or not self.deals:
            return {}
        reader = Reader(relay(self.cohort, self.deals, holder), "relay")
        try:
            return receive(self.cohort, holder, Secrets(root), reader, requirements=NoBound(0, 1), known=known).inbox.shares
        except FedLoRAError:
            return {}

    def seed(self, kind: str, dealer: int) -> bytes | None:
        """``mask`` or ``self``; None if too little is known."""
        if (kind, dealer) not in self._known:
            self._known[kind, dealer] = self._seed(kind, dealer)
        found: bytes | None = self._known[kind, dealer]
        return found

    def _seed(self, kind: str, dealer: int) -> bytes | None:
        advert = self.cohort.advert(dealer)
        root = self.talk.roots.get(advert.name) or self.stolen.get(dealer)
        if root is not None:
            secrets = Secrets(root)
            return secrets.mask_keys.seed if kind == "mask" else secrets.self_seed
        held = self.shares(kind, dealer)
        if len(held) < self.cohort.threshold:
            return None
        chosen = sorted(held)[: self.cohort.threshold]
        found = join({h: held[h] for h in chosen}, weights(chosen))
        right = promise(found) == advert.promise if kind == "self" else MaskKeys(found).public == advert.mask
        return found if right else None

    # --- masks --------------------------------------------------------------------------------------------------

    def _ingredient(self, own: int, peer: int) -> bytes | None:
        """What ``own`` has put into its pair's key."""
        if leads(own, peer):
            if (seed := self.seed("mask", own)) is not None:
                return MaskKeys(seed).ingredient(self.cohort, dealer=own, holder=peer)
            if (own, peer) in self.shown:
                return self.shown[own, peer]
            sealed = self.deals[own].dealt[peer].sealed[BUNDLE_BYTES:] if own in self.deals else b""
            return self._opened(self.seed("mask", peer), sealed, dealer=own, holder=peer)
        sealed = self.bodies[own][0].view[peer][1]
        if sealed in self.own:
            return self.own[sealed]
        if sealed in self.genuine.get((peer, own), (set(), set()))[1]:
            if (peer, own) in self.shown:
                return self.shown[peer, own]
            if (seed := self.seed("mask", peer)) is not None:
                return MaskKeys(seed).ingredient(self.cohort, dealer=peer, holder=own)
        return self._opened(self.seed("mask", own), sealed, dealer=peer, holder=own)

    def _opened(self, seed: bytes | None, sealed: bytes, *, dealer: int, holder: int) -> bytes | None:
        if seed is None:
            return None
        try:
            return open_ingredient(self.cohort, MaskKeys(seed), sealed, dealer=dealer, holder=holder)
        except FedLoRAError:
            return None

    def _genuine(self, own: int, peer: int) -> bool:
        """Whether ``own`` has put in what the leader of the pair has put in."""
        return leads(own, peer) or self.bodies[own][0].view[peer][1] in self.genuine.get((peer, own), (set(), set()))[1]

    def pair(self, own: int, peer: int) -> tuple[bytes, bytes] | None:
        """The keys of the mask that ``own`` has shared with ``peer``."""
        ingredient = self._ingredient(own, peer)
        for one, other in ((own, peer), (peer, own)):
            seed, point = self.seed("mask", one), self.points.get(one)
            if ingredient is not None and (seed is not None or point is not None):
                private = MaskKeys(seed).point if seed is not None else point
                agreed = private.exchange(self.cohort.advert(other).mask_point())
                low, high = sorted((own, peer))
                context = low.to_bytes(2, "big") + high.to_bytes(2, "big")
                both = derive(agreed + ingredient, "pair", salt=self.cohort.t1, context=context, length=64)
                return both[:32], both[32:]
        return None

    # --- sums ---------------------------------------------------------------------------------------------------

    def sums(self) -> list[Sum]:
        """The finest sums over honest sites that can be opened."""
        if self._sums is None:
            self._sums = [self._open(part) for part in self._parts()]
        return self._sums

    def _parts(self) -> list[frozenset[int]]:
        nodes = [i for i in self.bodies if self.honest(i)]
        edges = {i: {j for j in self.bodies[i][0].view if self.pair(i, j) is None} for i in nodes}
        parts, seen = [], set()
        for start in nodes:
            if start in seen:
                continue
            part, more = set(), {start}
            while more:
                i = more.pop()
                part.add(i)
                more |= (edges.get(i, set()) | {j for j in nodes if i in edges[j]}) - part
            seen |= part
            if all(self._closed(i, part, edges) for i in part):
                parts.append(frozenset(part))
        return parts

    def _closed(self, i: int, part: set[int], edges: Mapping[int, set[int]]) -> bool:
        """Whether all masks of this site come off or cancel within the part."""
        if i not in edges or self.seed("self", i) is None:
            return False
        return all(j in edges and i in edges[j] and self._genuine(i, j) and self._genuine(j, i) for j in edges[i])

    def _open(self, part: frozenset[int]) -> Sum:
        vector = np.zeros_like(self.bodies[min(part)][0].vector)
        m = min(self.bodies[i][0].numbers.size for i in part)
        numbers = np.zeros(m, np.uint64)
        for i in part:
            body, seed = self.bodies[i][0], self.seed("self", i)
            assert seed is not None
            own: list[tuple[tuple[bytes, bytes], Any]] = [(self_keys(seed, self.cohort), -1)]
            own += [(key, -1 if i < j else 1) for j in body.view if (key := self.pair(i, j)) is not None]
            for total, mine, at in ((vector, body.vector.copy(), 0), (numbers, body.numbers[:m].copy(), 1)):
                add_masks(mine, [(keys[at], sign) for keys, sign in own])
                total += mine
        assert int(numbers[1]) == len(part), "the adversary believes to have opened what it has not"
        return Sum(frozenset(self.cohort.advert(i).name for i in part), self.talk, numbers, vector)


# --- promises: what must not follow from all that was opened -----------------------------------------------------------


def uncovered(sums: Iterable[Iterable[str]], *, coalition: int) -> set[str]:
    """Sites whose own update is a combination of these sums, if any ``coalition`` of the others know their own updates."""
    rows = [frozenset(s) for s in {frozenset(s) for s in sums}]
    names = sorted(frozenset().union(*rows)) if rows else []
    found: set[str] = set()
    for known in combinations(names, min(coalition, max(len(names) - 1, 0))):
        rest = [n for n in names if n not in known]
        matrix = np.array([[float(n in row) for n in rest] for row in rows])
        rank = np.linalg.matrix_rank(matrix)
        for i, name in enumerate(rest):
            unit = np.zeros((1, len(rest)))
            unit[0, i] = 1.0
            if np.linalg.matrix_rank(np.vstack([matrix, unit])) == rank:
                found.add(name)
    return found


def twice_given(sessions: Sequence[Session]) -> list[str]:
    """Two masked updates of one site in one session, whose difference lies open; or two opened ones of one round of a run."""
    found, opened = [], set()
    for session in sessions:
        found += [b[0].site for i, b in session.bodies.items() if session.honest(i) and len(b) > 1]
        task = session.talk.task
        for one in session.sums():
            for site in one.sites:
                key = (site, task.run, task.round, task.kind)
                found += [site] if key in opened else []
                opened.add(key)
    return found


def evaluated(one: Sum) -> frozenset[str]:
    """The honest sites whose evaluations are in this sum, from :class:`protect.secagg.liar.Liar`'s counters."""
    numbers = one.talk.terms.numbers(one.talk.task.reply_layout)
    if "eval/tokens" not in numbers.counters or one.numbers.size != numbers.size:
        return frozenset()
    bits = int(one.numbers[3 + 2 * numbers.tensors + numbers.counters.index("eval/tokens")])
    found = frozenset(s for s in one.sites if bits >> int(s.removeprefix("site-")) & 1)
    assert bits == sum(1 << int(s.removeprefix("site-")) for s in found), "a counter that no site has"
    return found


def unannounced(sessions: Sequence[Session]) -> list[str]:
    """Honest sites that have sent other numbers than the plan of the session lists."""
    due = [(s, s.talk.terms.numbers(s.talk.task.reply_layout).size) for s in sessions]
    return [b.site for s, m in due for i, bodies in s.bodies.items() for b in bodies if s.honest(i) and b.numbers.size != m]


def both_kinds(sessions: Sequence[Session]) -> list[str]:
    """Honest sites of whose two seeds so many shares are known that both can be rebuilt."""
    return [
        s.cohort.advert(i).name
        for s in sessions
        for i in range(1, len(s.cohort.adverts) + 1)
        if s.honest(i) and all(s.seed(kind, i) is not None for kind in ("mask", "self"))
    ]


def false_parts(sessions: Sequence[Session]) -> list[str]:
    """Honest sites that have masked an update with what an honest dealer has not made."""
    return [
        body.site
        for s in sessions
        for i, bodies in s.bodies.items()
        for body in bodies
        for dealer, (shares, ingredient) in body.view.items()
        if s.honest(i) and s.honest(dealer)
        and not (shares in s.genuine.get((dealer, i), (set(), set()))[0] and ingredient in s.genuine[dealer, i][1])
    ]  # fmt: skip
