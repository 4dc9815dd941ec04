"""Sites that deal what does not open: named by their own signature and left out, while everybody else has a sum."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from protect.secagg.adversary import Adversary, known
from protect.secagg.world import World, at_phase, identity, names, secagg_plan

from fedlora.core.errors import BadShare, FedLoRAError, WireError
from fedlora.core.reader import Reader
from fedlora.protect.secagg import SecAggSite
from fedlora.protect.secagg.protocol.cohort import leads, sign
from fedlora.protect.secagg.protocol.complaints import Complaint, dump_complaints, dump_opened, read_complaints, read_opened
from fedlora.protect.secagg.protocol.dealing import BUNDLE_BYTES, Dealt, Secrets, opened
from fedlora.protect.secagg.protocol.opening import Deal, relay

pytestmark = pytest.mark.slow


class Liar(SecAggSite):
    """Deals to its victims what does not open, and signs that. ``shows`` says what it does when it is asked about it."""

    victims: tuple = ()
    how: str = "garbage"
    shows: str = "nothing"

    def _share(self, payload, records, session):
        blob = super()._share(payload, records, session)
        cohort, key = self._cohort, self.link.identity.signing
        own, found = cohort.number(self._name), Deal.parse(self._cohort, self._cohort.number(self._name), blob)
        self.clear = opened(cohort, own, Secrets(records.session().root), range(1, len(cohort.adverts) + 1))
        dealt = dict(found.dealt)
        for victim in self.victims:
            if victim in cohort.names and (number := cohort.number(victim)) != own:
                dealt[number] = self.false(cohort, own, number, dealt[number], key)
        commitments = {j: d.commitments[:2] for j, d in dealt.items()} | {own: found.commitments[own]}
        parts = [dealt[j].dump()[64:] for j in sorted(dealt)]
        return cohort.t1 + b"".join(b"".join(commitments[j]) for j in sorted(commitments)) + b"".join(parts)

    def false(self, cohort, own, number, dealt, key):
        if self.how == "garbage":
            dealt = replace(dealt, sealed=bytes(len(dealt.sealed)))
        elif self.how == "another commitment":
            dealt = replace(dealt, commitments=(b"?" * 32, *dealt.commitments[1:]))
        elif self.how == "a false ingredient" and leads(own, number):
            dealt = replace(dealt, sealed=dealt.sealed[:BUNDLE_BYTES] + bytes(1168))
        elif self.how == "a false ingredient":
            dealt = replace(dealt, sealed=bytes(len(dealt.sealed)))
        text = cohort.t1 + bytes([0, own, 0, number]) + b"".join(dealt.commitments) + hashlib.sha256(dealt.sealed).digest()
        signature = sign(key, "deal", text)
        return replace(dealt, signature=b"!" * 64 if self.how == "without a signature" else signature)

    def _open(self, payload, records, session):
        if self.shows == "an error":
            raise WireError("no")
        out = bytearray(super()._open(payload, records, session))
        if self.shows == "something else":
            out[-1] ^= 1
        elif self.shows == "nobody":
            return bytes(out[:32]) + b"\0\0"
        return bytes(out)


def with_liar(n, victims, **more):
    world = World(n, plan=secagg_plan(lone_change="allow"))  # who was left out may come back
    honest = world.site("site-2")
    liar = type("Made", (Liar,), {"victims": tuple(victims), **more})
    world.__dict__["sites"]["site-2"] = liar(honest.link, honest.roster, honest.entropy)
    return world


def attempts(world, most=4):
    """As the loop of rounds does it: one session after the other until there is a sum; who was named in any."""
    named = {}
    for attempt in range(most):
        heard = world.collect(world.task(attempt=attempt))
        named |= {
            s: c for s, c in heard.codes().items() if c in ("bad-dealer", "bad-share", "cannot-open", "complaint-unanswered")
        }
        if heard.sums or heard.voids:
            return heard, named, attempt + 1
    return heard, named, most


def check_sum(world, heard):
    ((sites, update, *_),) = heard.sums
    assert np.array_equal(update.delta, world.expected(sites))
    return list(sites)


@pytest.mark.attack(
    "C16",
    "a site deals shares that do not open to one, two or three others, in every round",
    stops="it cannot show what it has signed for: it is named, left out, and the honest sites end the same round",
)
@pytest.mark.parametrize(("n", "victims"), [(4, 1), (5, 2), (7, 6)])
@pytest.mark.parametrize("how", ["garbage", "another commitment", "a false ingredient", "without a signature"])
@pytest.mark.parametrize("shows", ["something else", "nobody"])
def test_a_liar_is_named_and_the_round_ends_without_it(n, victims, how, shows):
    others = [s for s in names(n) if s != "site-2"]
    world = with_liar(n, others[:victims], how=how, shows=shows)
    heard, named, tries = attempts(world)
    assert named == {"site-2": "bad-dealer"}
    assert check_sum(world, heard) == others
    assert tries <= 2
    world.globals[2] = world.globals[1]
    again = world.collect(world.task(round=2))  # left out of the next one, too
    assert again.codes() == {"site-2": "bad-dealer"}
    assert [list(s) for s, *_ in again.sums] == [others]


@pytest.mark.parametrize("shows", ["something else", "nobody"])
def test_of_three_sites_one_liar_is_named_though_two_cannot_have_a_sum(shows):
    heard, named, _ = attempts(with_liar(3, ["site-1"], shows=shows))
    assert heard.sums == []
    assert named == {"site-2": "bad-dealer"}


@pytest.mark.parametrize("n", [3, 5, 7])
@pytest.mark.parametrize("how", ["garbage", "a false ingredient"])
def test_a_dealer_that_shows_what_it_has_committed_to_costs_a_question_and_no_round(n, how):
    others = [s for s in names(n) if s != "site-2"]
    world = with_liar(n, others[:1], how=how, shows="the truth")
    heard, named, tries = attempts(world)
    assert (named, tries) == ({}, 1)
    assert check_sum(world, heard) == names(n)
    assert ("complaint", {"about": "site-2", "sites": ["site-1"]}) in world.events
    phases = [r.phase for r in world.asked]
    assert phases.count("complain") == phases.count("open") == 1


def test_a_dealer_that_says_nothing_is_left_out_of_the_rest_of_the_round_and_not_of_the_next():
    world = with_liar(5, ["site-1"], shows="an error")
    heard, _, tries = attempts(world)
    assert tries == 2
    assert check_sum(world, heard) == ["site-1", "site-3", "site-4", "site-5"]
    assert heard.codes() == {"site-2": "complaint-unanswered"}
    world.globals[2] = world.globals[1]
    world.restart("site-2")
    assert [list(s) for s, *_ in world.collect(world.task(round=2)).sums] == [names(5)]


@pytest.mark.parametrize("killed", ["complain", "open", "server"])
def test_a_complaint_survives_a_restart_of_anybody(killed):
    world = with_liar(5, ["site-1"], shows="the truth")
    liar, real, seen = world.__dict__["sites"]["site-2"], world.answer, []

    def answer(request):
        if request.phase == killed and not seen:
            seen.append(request)
            world.restart(request.site)
            if request.site == "site-2":
                world.__dict__["sites"]["site-2"] = type(liar)(liar.link, liar.roster, liar.entropy)
        return real(request)

    world.answer = answer
    lost = at_phase(**{"site-1": "complain"}) if killed == "server" else at_phase()
    world.collect(world.task(), lost=lost)
    heard = world.collect(world.task(attempt=1)) if killed == "server" else None
    if heard is not None:
        assert check_sum(world, heard) in (names(5), [s for s in names(5) if s != "site-1"])


class Complainer(SecAggSite):
    """Says of what it was dealt rightly that it does not open."""

    def _mask(self, payload, records, session):
        if not hasattr(self, "said"):
            object.__setattr__(self, "said", True)
            raise BadShare("so it says")
        return super()._mask(payload, records, session)

    def _complain(self, payload, records, session):
        cohort = self._open_cohort(records, session)
        own, reader, lies = cohort.number(self._name), Reader(payload, "relay"), {}
        for _ in range(reader.number()):
            dealer = reader.number()
            lies[dealer] = Dealt.read(reader, (reader.take(32), reader.take(32)), leads=leads(dealer, own)).statement
        return Complaint.make(cohort, own, lies, key=self.link.identity.signing).dump()


@pytest.mark.attack(
    "C8",
    "a site complains falsely of everybody (up to c such sites)",
    stops="the dealers show it what it had, which opens nobody's update; nobody honest is named, and the round ends",
)
def test_who_complains_falsely_gains_nothing_and_names_nobody():
    world = World(5)
    honest = world.site("site-4")
    made = type("Made", (Complainer,), {"__slots__": ("said",)})
    world.__dict__["sites"]["site-4"] = made(honest.link, honest.roster, honest.entropy)
    heard = world.collect(world.task())
    assert heard.codes() == {}
    assert check_sum(world, heard) == names(5)


def test_an_honest_dealer_shows_shares_to_no_more_sites_than_may_collude():
    """With the key of every holder that complains, the server has their shares anyway; a threshold of them it must not get."""
    a = Adversary(colluders=["site-3", "site-4", "site-5"])
    a.advertise()
    a.share()
    cohort = a.cohort

    def complain(holder):
        lies = {1: a.deals[1].dealt[cohort.number(holder)].statement}
        one = Complaint.make(cohort, cohort.number(holder), lies, key=identity(holder).signing)
        return a.say("site-1", "open", dump_complaints(cohort, [one]))

    assert isinstance(complain("site-3"), bytes)
    assert isinstance(complain("site-3"), bytes)  # the same again
    assert complain("site-4") == "session-spent"
    a.world.restart("site-1")
    assert complain("site-5") == "session-spent"


FORGERIES = {
    "signed by another": lambda a, c: replace(c, signature=sign(identity("site-4").signing, "complaint", b"")),
    "of what was never signed": lambda a, c: Complaint.make(
        a.cohort, 3, {1: replace(c.lies[1], sealed_digest=bytes(32))}, key=identity("site-3").signing
    ),
    "about what was dealt to another": lambda a, c: Complaint.make(
        a.cohort, 3, {1: a.deals[1].dealt[5].statement}, key=identity("site-3").signing
    ),
}


@pytest.mark.attack(
    "C8", "the server makes up complaints to have shares opened", stops="a dealer answers to its holders' signatures only"
)
@pytest.mark.parametrize("how", FORGERIES)
def test_a_dealer_opens_nothing_on_a_forged_complaint(how):
    a = Adversary()
    a.advertise()
    a.share()
    right = Complaint.make(a.cohort, 3, {1: a.deals[1].dealt[3].statement}, key=identity("site-3").signing)
    forged = FORGERIES[how](a, right)
    assert a.say("site-1", "open", dump_complaints(a.cohort, [forged])) in ("bad-signature", "wire")
    assert a.session("site-1").opened in ((), [])


def test_nothing_is_opened_after_the_vote():
    a = Adversary(colluders=["site-3"]).until_masked()
    one = Complaint.make(a.cohort, 3, {1: a.deals[1].dealt[3].statement}, key=identity("site-3").signing)
    a.commit("site-1", a.delivered())
    assert a.say("site-1", "open", dump_complaints(a.cohort, [one])) == "secrets-gone"


def test_what_a_server_says_was_shown_is_believed_only_where_it_was_committed_to():
    a = Adversary()
    a.advertise()
    a.share()
    mine, garbage = a.deals[2].dealt[1], bytes(BUNDLE_BYTES)
    text = a.cohort.t1 + bytes([0, 2, 0, 1]) + b"".join(mine.commitments) + hashlib.sha256(garbage).digest()
    lie = replace(mine, sealed=garbage, signature=sign(identity("site-2").signing, "deal", text))
    deals = {**a.deals, 2: replace(a.deals[2], dealt={**a.deals[2].dealt, 1: lie})}
    false = opened(a.cohort, 2, Secrets(b"?" * 32), [1])[1]
    relayed = relay(a.cohort, deals, 1)
    for shown in ({}, {2: false}):
        assert a.say("site-1", "mask", b"\0" + dump_opened(a.cohort, shown) + relayed) == "bad-share"
    right = opened(a.cohort, 2, Secrets(a.session("site-2").root), [1])[1]
    assert a.say("site-1", "mask", b"\0" + dump_opened(a.cohort, {2: right}) + relayed)[:32] == a.cohort.t1


def test_what_is_read_is_what_was_written():
    a = Adversary()
    a.advertise()
    a.share()
    one = Complaint.make(a.cohort, 3, {1: a.deals[1].dealt[3].statement}, key=identity("site-3").signing)
    assert read_complaints(a.cohort, 1, dump_complaints(a.cohort, [one]), known) == [3]
    with pytest.raises(WireError):
        read_complaints(a.cohort, 2, dump_complaints(a.cohort, [one]), known)
    secrets = Secrets(a.session("site-1").root)
    shown = opened(a.cohort, 1, secrets, [3, 4])
    due = {j: a.deals[1].dealt[j].commitments for j in (3, 4)}
    assert read_opened(a.cohort, 1, dump_opened(a.cohort, shown), due) == shown
    with pytest.raises(FedLoRAError):
        read_opened(a.cohort, 1, dump_opened(a.cohort, {3: shown[3]}), due)


@pytest.mark.attack(
    "C16",
    "a site deals shares that do not open to more sites than may collude, and shows the truth to those it is asked about",
    stops="so many complaints cannot all be lies: it is named, and left out of the rest of the run",
)
@pytest.mark.parametrize(("n", "victims"), [(5, 2), (7, 6)])
@pytest.mark.parametrize("shows", ["the truth", "an error"])
def test_a_dealer_of_whom_more_complain_than_can_be_in_league_is_left_out_of_the_run(n, victims, shows):
    others = [s for s in names(n) if s != "site-2"]
    world = with_liar(n, others[:victims], shows=shows)
    heard, named, tries = attempts(world)
    assert tries == 2
    assert named == {"site-2": "bad-dealer"}
    assert check_sum(world, heard) == others
    for number in (2, 3):
        world.globals[number] = world.globals[1]
        again = world.collect(world.task(round=number))
        assert again.codes() == {"site-2": "bad-dealer"}
        assert [list(s) for s, *_ in again.sums] == [others]
