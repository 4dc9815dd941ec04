"""A server that lies: it has the server's keys, the relay, and what colluding sites know. The other sites are real.

It keeps all that it gets, and :meth:`Adversary.opens` is the most that can be made of that: every seed that enough shares
rebuild, every pair mask that follows from one, taken off a site's masked update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from protect.secagg.world import World, identity, names

from fedlora.core.errors import CannotOpen, RemoteError
from fedlora.core.messages import Request, Task
from fedlora.core.reader import Reader
from fedlora.formats import update as wire
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.link import Context
from fedlora.protect.secagg.protocol.cohort import Advert, Cohort, leads, read_session
from fedlora.protect.secagg.protocol.complaints import dump_opened
from fedlora.protect.secagg.protocol.dealing import BUNDLE_BYTES, MaskKeys, Secrets, open_ingredient, promise, receive, self_keys
from fedlora.protect.secagg.protocol.masks import add_masks
from fedlora.protect.secagg.protocol.opening import Deal, relay
from fedlora.protect.secagg.protocol.rings import PROFILES, packed_bytes, unpack
from fedlora.protect.secagg.protocol.shamir import SHARE_BYTES, join, weights
from fedlora.protect.secagg.protocol.votes import ABORT, COMMIT, Delivered, certificate, sign_vote, vote_text
from fedlora.protect.secagg.records import Records, Session
from fedlora.protect.secagg.settings import settings_of
from fedlora.protect.secagg.terms import Offer, Terms, codec


def known(name: str) -> PublicIdentity:
    return identity(name).public


class Adversary:
    """``colluders`` are sites whose secrets it has, for the session in which they take part."""

    def __init__(self, n: int = 5, *, colluders: Sequence[str] = (), world: World | None = None) -> None:
        self.world = world or World(n)
        self.n, self.colluders = self.world.n, list(colluders)
        self.link = self.world.link()
        self.begin(self.world.task())

    def begin(self, task: Task) -> None:
        """Another session: nothing of the old one is forgotten but what is in the fields below."""
        self.task = task
        self.terms = Terms.of(self.world.plan, self.world.signed.roster)
        self.profile = PROFILES[settings_of(self.world.plan).profile]
        self.adverts: dict[str, Advert] = {}
        self.deals: dict[int, Deal] = {}
        self.masked: dict[str, tuple[Delivered, np.ndarray]] = {}
        self.shares: dict[tuple[str, int], dict[int, bytes]] = {}  # (kind, dealer) -> holder -> share
        self.cohort: Cohort | None = None
        self._secrets: dict[str, Secrets] = {}

    # --- talking --------------------------------------------------------------------------------------------------

    def say(self, site: str, phase: str, payload: bytes, *, task: Task | None = None) -> bytes | str:
        """One genuine message to one site. What it answers, or its code."""
        context = Context.of(task or self.task)
        body = self.link.seal(context, payload, phase=phase, codec=codec(phase), to=[site])
        self.last = Request(site, phase, body)
        return self.receive(self.last, context)

    def receive(self, request: Request, context: Context) -> bytes | str:
        reply = self.world.answer(request)
        try:
            return self.link.open(context, reply, phase=request.phase, codec=codec(request.phase), max_payload=1 << 22)
        except RemoteError as e:
            return e.remote_code

    def offer(self, *, task: Task | None = None, roster: bytes | None = None) -> bytes:
        inner = wire.dump_task(task or self.task, reply_key=self.link.reply_key.public.kem)
        return Offer(roster or self.world.signed.dump(), inner).dump()

    # --- the honest steps, one by one -----------------------------------------------------------------------------

    def advertise(self, sites: Iterable[str] = ()) -> None:
        for site in sites or names(self.n):
            self.adverts[site] = self.advert(self.say(site, "advertise", self.offer()))

    def advert(self, answer: bytes | str) -> Advert:
        assert isinstance(answer, bytes), answer
        return Advert.read(Reader(answer, "advert"))

    def share(self, sites: Iterable[str] = (), *, cohort: Cohort | None = None) -> dict[str, bytes | str]:
        self.cohort = cohort or Cohort.of(list(self.adverts.values()), self.terms.requirements)
        answers = {s: self.say(s, "share", self.cohort.dump()) for s in sites or self.cohort.names}
        for site, answer in answers.items():
            if isinstance(answer, bytes):
                number = self.cohort.number(site)
                self.deals[number] = Deal.parse(self.cohort, number, answer)
        return answers

    def relayed(self, site: str, *, ended: Sequence[tuple[bytes, bytes]] = (), deals: dict[int, Deal] | None = None) -> bytes:
        head = bytes([len(ended)]) + b"".join(t1 + proof for t1, proof in ended)
        return head + dump_opened(self.cohort, {}) + relay(self.cohort, deals or self.deals, self.cohort.number(site))

    def mask(self, sites: Iterable[str] = (), *, ended: Sequence[tuple[bytes, bytes]] = ()) -> dict[str, bytes | str]:
        answers = {}
        for site in sites or self.cohort.names:
            answers[site] = answer = self.say(site, "mask", self.relayed(site, ended=ended))
            if isinstance(answer, bytes):
                self.masked[site] = self.parse_masked(site, answer)
        return answers

    def parse_masked(self, site: str, answer: bytes) -> tuple[Delivered, np.ndarray]:
        n = self.task.reply_layout.size
        size = packed_bytes(n, self.profile.bits)
        signature, body = answer[32:96], answer[96:]
        one = Delivered(self.cohort.number(site), hashlib.sha256(body).digest(), signature)
        return one, unpack(body[-size:], n, self.profile.bits)

    def delivered(self, sites: Iterable[str] = ()) -> list[Delivered]:
        return sorted((self.masked[s][0] for s in sites or self.masked), key=lambda d: d.number)

    def commit(self, site: str, listed: Sequence[Delivered]) -> bytes | str:
        return self.say(site, "vote", self.cohort.t1 + bytes([COMMIT]) + Delivered.dump_all(listed))

    def abort(self, site: str) -> bytes | str:
        return self.say(site, "vote", self.cohort.t1 + bytes([ABORT]))

    def votes(self, answers: dict[str, bytes | str]) -> dict[int, bytes]:
        """Signatures, by number, of those that have given one."""
        return {self.cohort.number(s): a[33:] for s, a in answers.items() if isinstance(a, bytes)}

    def forge(self, listed: Sequence[Delivered]) -> dict[int, bytes]:
        """What colluders sign, whatever they have signed before."""
        text = vote_text(self.cohort.t1, COMMIT, Delivered.digest_of(listed))
        return {self.cohort.number(s): sign_vote(text, key=identity(s).signing) for s in self.colluders}

    def unmask(self, site: str, votes: dict[int, bytes], listed: Sequence[Delivered]) -> bytes | str:
        """Keeps the shares: of the self seed of those listed, of the mask seed of the others."""
        answer = self.say(site, "unmask", self.cohort.t1 + certificate(votes))
        if isinstance(answer, bytes):
            counted, reader = {d.number for d in listed}, Reader(answer, "reveal")
            read_session(reader, self.cohort.t1)
            for _ in range(reader.number()):
                dealer = reader.number()
                kind = "self" if dealer in counted else "mask"
                self.shares.setdefault((kind, dealer), {})[self.cohort.number(site)] = reader.take(SHARE_BYTES)
        return answer

    def until_masked(self) -> Adversary:
        """All of the honest way up to the masked updates of all."""
        self.advertise()
        self.share()
        self.mask()
        assert set(self.masked) == set(self.cohort.names)
        return self

    def session(self, site: str) -> Session:
        """A site's own record of its session, read with its key: what it would have after a restart."""
        found = self.records(site).session()
        assert found is not None
        return found

    def records(self, site: str) -> Records:
        return Records(self.world.memory[site], self.task.run, identity(site), bytes)

    # --- what it can compute ----------------------------------------------------------------------------------------

    def collude(self) -> None:
        """Adds what the colluders know: every share that they were dealt, and with their roots their own seeds."""
        for site in self.colluders:
            number, secrets = self.cohort.number(site), self.secrets(site)
            reader = Reader(relay(self.cohort, self.deals, number), "relay")
            inbox = receive(self.cohort, number, secrets, reader, requirements=self.terms.requirements, known=known).inbox
            for dealer, (mask_share, self_share) in inbox.shares.items():
                self.shares.setdefault(("mask", dealer), {})[number] = mask_share
                self.shares.setdefault(("self", dealer), {})[number] = self_share

    def secrets(self, site: str) -> Secrets:
        """Of a colluder; taken while its session is open."""
        assert site in self.colluders
        if site not in self._secrets:
            self._secrets[site] = Secrets(self.session(site).root)
        return self._secrets[site]

    def seed(self, kind: str, dealer: int) -> bytes | None:
        """A seed, if the shares at hand are enough or its owner colludes."""
        name = self.cohort.advert(dealer).name
        if name in self.colluders:
            secrets = self.secrets(name)
            return secrets.mask_keys.seed if kind == "mask" else secrets.self_seed
        held = self.shares.get((kind, dealer), {})
        if len(held) < self.cohort.threshold:
            return None
        chosen = sorted(held)[: self.cohort.threshold]
        found = join({h: held[h] for h in chosen}, weights(chosen))
        advert = self.cohort.advert(dealer)
        right = promise(found) == advert.promise if kind == "self" else MaskKeys(found).public == advert.mask
        return found if right else None

    def stripped(self, site: str) -> tuple[np.ndarray, int]:
        """A masked update with every mask taken off that can be, and how many are left."""
        own, vector, left = self.cohort.number(site), self.masked[site][1].copy(), 0
        seed = self.seed("self", own)
        if seed is not None:
            add_masks(vector, [(self_keys(seed, self.cohort)[0], -1)])
        left += seed is None
        for peer in self.deals:
            if peer != own:
                key = self.pair(own, peer)
                if key is not None:
                    add_masks(vector, [(key, -1 if own < peer else 1)])
                left += key is None
        return vector, left

    def pair(self, own: int, peer: int) -> bytes | None:
        for one, other in ((own, peer), (peer, own)):
            seed = self.seed("mask", one)
            if seed is not None:
                keys = MaskKeys(seed)
                try:
                    ingredient = (
                        keys.ingredient(self.cohort, dealer=one, holder=other)
                        if leads(one, other)
                        else open_ingredient(
                            self.cohort, keys, self.deals[other].dealt[one].sealed[BUNDLE_BYTES:], dealer=other, holder=one
                        )
                    )
                except CannotOpen:
                    continue
                return keys.pair(self.cohort, own=one, peer=other, ingredient=ingredient)[0]
        return None

    def truth(self, site: str) -> np.ndarray:
        """What a site has put in, as the test knows it."""
        encoded = self.records(site).encoded()
        assert encoded is not None
        return encoded.levels & ((1 << self.profile.bits) - 1)

    def opens(self, site: str) -> bool:
        """Whether it can read this site's update."""
        vector, _ = self.stripped(site)
        return bool(np.array_equal(vector & ((1 << self.profile.bits) - 1), self.truth(site)))

    def reads_any(self) -> list[str]:
        """The honest sites whose update it can read."""
        return [s for s in self.masked if s not in self.colluders and self.opens(s)]

    def adds_up(self, sites: Sequence[str]) -> bool:
        """Whether it gets the sum over these sites' updates from what it has."""
        total = np.zeros(self.task.reply_layout.size, self.profile.word)
        numbers = {self.cohort.number(s) for s in sites}
        for site in sites:
            own, vector = self.cohort.number(site), self.masked[site][1].copy()
            seed = self.seed("self", own)
            if seed is None:
                return False
            add_masks(vector, [(self_keys(seed, self.cohort)[0], -1)])
            for peer in self.deals:
                if peer not in numbers:
                    key = self.pair(own, peer)
                    if key is None:
                        return False
                    add_masks(vector, [(key, -1 if own < peer else 1)])
            total += vector
        bits = (1 << self.profile.bits) - 1
        truth = sum(self.truth(s).astype(np.int64) for s in sites) & bits
        return bool(np.array_equal(total.astype(np.int64) & bits, truth))
