"""A server that lies at every step: each lie is refused by name, and what it then has opens nobody's update.

That the harness can win is tested, too: with one colluding site more than the bound it reads an update.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from protect.secagg.adversary import Adversary
from protect.secagg.world import NOW, Heard, World, at_phase, identity, names, secagg_plan, signed_roster

from fedlora.core.adapter import Adapter
from fedlora.core.errors import SessionError, WrongContext
from fedlora.core.messages import Request
from fedlora.formats.envelope import HPKE
from fedlora.formats.epochs import next_epoch
from fedlora.formats.keys import Identity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import DictMemory
from fedlora.protect.link import Context, pinned
from fedlora.protect.modes import SiteModes
from fedlora.protect.sealed import SealedServer, SealedSite
from fedlora.protect.secagg import SecAggSite
from fedlora.protect.secagg.protocol.cohort import Advert, Cohort, SessionRequirements
from fedlora.protect.secagg.protocol.dealing import BUNDLE_BYTES, Inbox, MaskKeys, Secrets, advertise, deal, promise
from fedlora.protect.secagg.protocol.opening import Deal
from fedlora.protect.secagg.protocol.shamir import join, weights
from fedlora.protect.secagg.protocol.votes import ABORT, COMMIT, Delivered, certificate, check_certificate, sign_vote, vote_text
from fedlora.protect.secagg.terms import Terms

pytestmark = pytest.mark.slow

ALL = names(5)
LAX = SessionRequirements(0, 1)  # what the liar makes its own cohorts with
ALLOW = secagg_plan(lone_change="allow")


def loose(*, colluders=()):
    """Against a plan for which any sites may be added up: each other guard has to hold without the one on groups."""
    return Adversary(colluders=colluders, world=World(5, plan=ALLOW))


def signing(name):
    return identity(name).signing


def end_honestly(a):
    """The rest of the protocol, as it should be: the sum of all, and no site's update."""
    listed = a.delivered()
    votes = a.votes({s: a.commit(s, listed) for s in a.masked})
    for site in a.masked:
        assert isinstance(a.unmask(site, votes, listed), bytes)
    assert a.adds_up(sorted(a.masked))
    assert a.reads_any() == []


# --- the harness ------------------------------------------------------------------------------------------------------


def test_an_honest_session_gives_the_sum_and_nothing_else():
    a = loose().until_masked()
    assert a.reads_any() == []
    assert not a.adds_up(ALL)
    end_honestly(a)
    assert not any(a.adds_up([s for s in ALL if s != gone]) for gone in ALL)


def coalition(n, colluders, *, max_colluding):
    # Without the veto that each site of a sum has otherwise: two thirds of the votes have to be enough by themselves.
    plan = secagg_plan(lone_change="allow")
    world = World(n, plan=plan, signed=signed_roster(n, max_colluding, max(3, 3 * max_colluding)))
    a = Adversary(colluders=names(n)[n - colluders :], world=world).until_masked()
    a.collude()
    return a


def split_view(a, victim):
    """Half of the honest sites are shown a set with the victim, the other half one without; colluders sign both."""
    honest = [s for s in names(a.n) if s not in a.colluders]
    with_victim, without = a.delivered(), a.delivered([s for s in a.masked if s != victim])
    half = [victim, *[s for s in honest if s != victim]]
    first, second = half[: len(half) // 2], half[len(half) // 2 :]
    for sites, listed in ((first, with_victim), (second, without)):
        votes = {**a.votes({s: a.commit(s, listed) for s in sites}), **a.forge(listed)}
        for site in sites:
            a.unmask(site, votes, listed)


def test_with_more_colluders_than_the_bound_the_harness_wins():
    """n = 7, t = 5: the bound is 2 t - n = 3 colluders. Three of them see a site's update; this test must not pass with two."""
    a = coalition(7, 3, max_colluding=2)
    split_view(a, "site-1")
    assert a.reads_any() == ["site-1"]


@pytest.mark.parametrize(("n", "colluders"), [(4, 1), (5, 1), (6, 2), (7, 2), (9, 3), (10, 3)])
def test_as_many_colluders_as_the_roster_bears_learn_nothing_from_a_split_view(n, colluders):
    a = coalition(n, colluders, max_colluding=colluders)
    for victim in names(n)[: n - colluders]:
        assert not a.opens(victim)
    split_view(a, "site-1")
    assert a.reads_any() == []


@pytest.mark.parametrize(("n", "colluders"), [(3, 1), (4, 1), (5, 1), (7, 2), (10, 3)])
def test_as_many_colluders_as_the_roster_bears_learn_only_the_sum_of_the_others(n, colluders):
    a = coalition(n, colluders, max_colluding=colluders)
    end_honestly(a)
    honest = [s for s in names(n) if s not in a.colluders]
    for gone in honest:
        assert not a.adds_up([s for s in names(n) if s != gone])
        assert not a.opens(gone)


# --- advertisements and cohorts ----------------------------------------------------------------------------------------


def spoiled(a, number, **changes):
    order = sorted(a.adverts.values(), key=lambda x: x.name)
    order[number - 1] = replace(order[number - 1], **changes)
    return order


def own_keys(a, name, signer):
    """An advertisement in a site's name with keys of the liar's own."""
    return advertise(name, a.adverts["site-1"].context, Secrets(b"liar" * 8), key=signer, measured=True)


def stale(a, name):
    """An advertisement of the same site for other work, genuinely signed."""
    return a.advert(a.say(name, "advertise", a.offer(task=a.world.task(attempt=1)), task=a.world.task(attempt=1)))


COHORTS = {
    "mask key swapped": ("bad-signature", lambda a: spoiled(a, 3, mask=own_keys(a, "x", signing("x")).mask)),
    "share key swapped": ("bad-signature", lambda a: spoiled(a, 3, seal=own_keys(a, "x", signing("x")).seal)),
    "measured swapped": ("bad-signature", lambda a: spoiled(a, 3, measured=not a.adverts["site-3"].measured)),
    "promise swapped": ("bad-signature", lambda a: spoiled(a, 3, promise=promise(b"liar" * 8))),
    "signature of the server": ("bad-signature", lambda a: [*spoiled(a, 3)[:4], own_keys(a, "site-5", signing("server"))]),
    "moved to another name": ("bad-signature", lambda a: [*spoiled(a, 3)[:4], replace(a.adverts["site-4"], name="site-5")]),
    "a stranger": ("unknown-site", lambda a: [*spoiled(a, 3), own_keys(a, "site-9", signing("site-9"))]),
    "the coordinator as a site": ("unknown-site", lambda a: [*spoiled(a, 3), own_keys(a, "coordinator", signing("coordinator"))]),
    "a key of small order from a colluder": ("key-file", lambda a: [
        *spoiled(a, 3)[:4],
        Advert(
            "site-5", a.adverts["site-1"].context, a.adverts["site-5"].seal, a.adverts["site-5"].mask[:-32] + bytes(32),
            bytes(32), measured=True,
        ).signed(signing("site-5")),
    ]),
    "a site that has seen another task": ("wrong-context", lambda a: [*spoiled(a, 3)[:4], stale(a, "site-5")]),
    "one site twice": ("wire", lambda a: [*spoiled(a, 3), a.adverts["site-5"]]),
    "two sites": ("cohort-too-small", lambda a: spoiled(a, 3)[:2]),
}  # fmt: skip


@pytest.mark.parametrize("lie", COHORTS)
def test_a_cohort_with_a_lie_in_it_gets_no_share_and_costs_nothing(lie):
    code, forge = COHORTS[lie]
    a = loose()
    a.advertise()
    listed = forge(a)
    forged = Cohort(tuple(sorted(listed, key=lambda x: x.name)), 4, b"?" * 32)
    told = [s for s in ALL if s in {x.name for x in listed} and s != "site-5"]
    assert {a.say(s, "share", forged.dump()) for s in told} == {code}
    a.share()  # the true one
    a.mask()
    end_honestly(a)


def test_a_site_that_is_left_out_of_the_cohort_has_nothing_to_do_with_it():
    a = loose()
    a.advertise()
    assert a.say("site-5", "share", Cohort.of([a.adverts[s] for s in ALL[:4]], LAX).dump()) == "unknown-site"


def test_a_sites_own_advertisement_must_be_the_one_that_it_made():
    a = loose(colluders=["site-5"])
    a.advertise()
    other = advertise("site-5", a.adverts["site-5"].context, Secrets(b"liar" * 8), key=signing("site-5"), measured=True)
    cohort = Cohort.of([*(a.adverts[s] for s in ALL[:4]), other], LAX)
    assert a.say("site-5", "share", cohort.dump()) == "wrong-context"


def test_keys_serve_one_set_of_sites():
    a = loose()
    a.advertise()
    a.share()
    smaller = Cohort.of([a.adverts[s] for s in ALL[:4]], LAX)
    assert {a.say(s, "share", smaller.dump()) for s in ALL[:4]} == {"session-spent"}
    first = {s: a.adverts[s] for s in ALL}
    a.advertise()  # asked again after that, each makes new keys
    assert all(a.adverts[s].mask != first[s].mask and a.adverts[s].promise != first[s].promise for s in ALL)
    mixed = Cohort.of([a.adverts["site-1"], *(first[s] for s in ALL[1:])], LAX)
    assert {a.say(s, "share", mixed.dump()) for s in ALL[1:]} == {"wrong-context"}


def test_the_floor_of_the_roster_holds_whatever_the_server_would_have():
    a = Adversary(world=World(5, signed=signed_roster(5, 1, 5)))
    a.advertise()
    small = Cohort.of([a.adverts[s] for s in ALL[:4]], LAX)
    assert {a.say(s, "share", small.dump()) for s in ALL[:4]} == {"cohort-too-small"}


def test_a_lower_threshold_cannot_be_asked_for():
    """It is in no message: a site computes it. What the liar would have it be makes another session's name, and shares of one
    session fewer than the site's threshold say nothing."""
    a = loose()
    a.advertise()
    honest = Cohort.of(list(a.adverts.values()), a.terms.requirements)
    low = replace(honest, threshold=2, t1=b"?" * 32)
    assert low.dump() == honest.dump()
    a.share(cohort=honest)
    a.mask()
    listed = a.delivered()
    votes = a.votes({s: a.commit(s, listed) for s in ALL})
    for site in ALL[:3]:
        a.unmask(site, votes, listed)
    held = a.shares[("self", 5)]
    assert len(held) == 3
    assert promise(join(held, weights(sorted(held)))) != a.adverts["site-5"].promise
    assert not a.adds_up(ALL)
    assert a.reads_any() == []


# --- rosters ------------------------------------------------------------------------------------------------------------


def epoch_two(first, **changes):
    return SignedRoster(next_epoch(first.roster, now=NOW, **changes)).sign(identity("coordinator"))


def never(task):
    raise AssertionError("a site was made to work")


def test_a_revoked_site_is_in_no_session_even_if_it_colludes():
    world = World(5, plan=ALLOW)
    first = world.signed
    a = Adversary(world=world)
    a.advertise()
    world.signed = epoch_two(first, revoke=["site-5"])
    a.begin(world.task())
    a.link = world.link()
    a.advertise(ALL[:4])
    mine = own_keys(a, "site-5", signing("site-5"))
    cohort = Cohort.of([*a.adverts.values(), mine], LAX)
    assert {a.say(s, "share", cohort.dump()) for s in ALL[:4]} == {"revoked-site"}
    # one that still has the first epoch is told, and works for nobody any more
    world.work = never
    a.link = replace(a.link, sites=first.roster.active())
    assert a.say("site-5", "advertise", a.offer()) == "revoked-site"


def test_an_older_roster_or_one_that_nobody_signed_is_refused_before_any_work():
    world = World(5, plan=ALLOW)
    first = world.signed
    a = Adversary(world=world)
    a.advertise()
    world.signed = epoch_two(first)
    a.link = world.link()
    a.advertise()
    world.work = never
    third = SignedRoster(next_epoch(world.signed.roster, now=NOW))
    mine = SignedRoster(next_epoch(world.signed.roster, now=NOW)).sign(Identity.generate("coordinator"))
    for signed, code in ((first, "roster-rollback"), (third, "roster-invalid"), (mine, "roster-invalid")):
        a.link = replace(a.link, roster=signed.roster.digest())
        assert {a.say(s, "advertise", a.offer(roster=signed.dump())) for s in ALL} == {code}


def test_a_header_that_names_another_roster_than_the_offer_is_refused():
    a = loose()
    a.link = replace(a.link, roster="00" * 32)
    a.world.work = never
    assert {a.say(s, "advertise", a.offer()) for s in ALL} == {"wrong-context"}


# --- one task for all ----------------------------------------------------------------------------------------------------


def other_model(a):
    return replace(a.task, adapter=replace(a.task.adapter, vector=a.task.adapter.vector + np.float32(1e-6)))


def other_plan(a):
    return replace(a.task, plan=secagg_plan(rounds=4).canonical())


@pytest.mark.parametrize("lie", [other_model, other_plan])
def test_sites_that_are_shown_different_work_do_not_end_up_in_one_session(lie):
    a = loose()
    a.advertise(ALL[:4])
    task = lie(a)
    a.adverts["site-5"] = a.advert(a.say("site-5", "advertise", a.offer(task=task), task=task))
    assert a.adverts["site-5"].context != a.adverts["site-1"].context
    forged = Cohort(tuple(a.adverts[s] for s in ALL), 4, b"?" * 32)
    assert {a.say(s, "share", forged.dump()) for s in ALL[:4]} == {"wrong-context"}


def test_a_plan_that_says_sealed_is_not_worked_on_here():
    a = loose()
    plan = a.world.plan
    task = replace(a.task, plan=plan.model_copy(update={"protect": type(plan.protect)()}).canonical())
    a.world.work = never
    assert {a.say(s, "advertise", a.offer(task=task), task=task) for s in ALL} == {"wrong-context"}


@pytest.mark.attack(
    "C6", "the server has one site code its update at another scale", stops="scales follow from plan and round alone"
)
@pytest.mark.parametrize("round_", [1, 2, 3])
def test_no_server_chooses_a_scale_in_any_round_and_after_none_that_was_missed(round_):
    """Neither what is published nor which rounds a site has seen has a say."""
    for missed in (False, True):
        a = loose()
        if not missed:
            a.until_masked()
        for vector in (np.zeros(14), np.full(14, 1e4), np.linspace(-1, 1, 14)):
            a.world.globals[round_] = Adapter(vector.astype(np.float32), a.task.adapter.layout)
            scales = Terms.of(a.world.plan, a.world.signed.roster).scales(a.world.task(round=round_))
            assert np.allclose(scales, 1.25 / 127, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("plan", [secagg_plan(first_range=2.0), secagg_plan(profile="int12")])
def test_a_server_that_says_one_thing_of_scales_to_one_site_has_no_session(plan):
    """Another range or profile is another plan, hence another context."""
    a = loose()
    a.advertise(ALL[:4])
    task = replace(a.task, plan=plan.canonical())
    other = a.advert(a.say("site-5", "advertise", a.offer(task=task), task=task))
    forged = Cohort((*(a.adverts[s] for s in ALL[:4]), other), 4, b"?" * 32)
    assert {a.say(s, "share", forged.dump()) for s in ALL[:4]} == {"wrong-context"}


# --- what is relayed ------------------------------------------------------------------------------------------------------


def tampered(a, how):
    """What site-1 would be relayed."""
    deals = dict(a.deals)

    def put(dealer, dealt):
        deals[dealer] = replace(deals[dealer], dealt={**deals[dealer].dealt, 1: dealt})

    mine = deals[2].dealt[1]
    if how == "shares of another dealer":
        put(2, replace(mine, sealed=deals[4].dealt[1].sealed))
    elif how == "shares for another site":
        put(2, replace(mine, sealed=deals[2].dealt[4].sealed))
    elif how == "all that was dealt to another site":
        put(2, deals[2].dealt[4])
    elif how == "the server's own ingredient":  # C4: with X25519 broken later, the pair's mask would be known
        three = deals[3].dealt[1]
        info = b"fedlora/v1/sa/ingredient\0" + a.cohort.t1 + bytes([0, 3, 0, 1])
        pair = HPKE.encrypt(b"known" + bytes(27), a.cohort.advert(1).mask_key(), info=info)
        put(3, replace(three, sealed=three.sealed[:BUNDLE_BYTES] + pair))
    elif how == "dealt by the server in a site's name":  # C4
        false = deal(a.cohort, 2, Secrets(bytes(32)), key=identity("server").signing)
        deals[2] = Deal.parse(a.cohort, 2, false)
    elif how == "one flipped bit":
        put(2, replace(mine, sealed=mine.sealed[:700] + bytes([mine.sealed[700] ^ 1]) + mine.sealed[701:]))
    elif how == "another commitment":
        put(2, replace(mine, commitments=(bytes(32), *mine.commitments[1:])))
    elif how == "another commitment to an ingredient":
        put(3, replace(deals[3].dealt[1], commitments=(*deals[3].dealt[1].commitments[:2], bytes(32))))
    elif how == "of another session":
        first, a.deals = a.cohort, {}
        a.begin(a.world.task(attempt=1))
        a.advertise()
        a.share()
        assert a.cohort.t1 != first.t1
        put(2, mine)
        deals = {**a.deals, 2: replace(a.deals[2], dealt={**a.deals[2].dealt, 1: mine})}
    elif how == "too few":
        deals = {n: deals[n] for n in (1, 2, 3)}
    return a.relayed("site-1", deals=deals)


RELAYS = {
    "shares of another dealer": "bad-signature",
    "shares for another site": "bad-signature",
    "all that was dealt to another site": "bad-signature",
    "the server's own ingredient": "bad-signature",
    "dealt by the server in a site's name": "bad-signature",
    "one flipped bit": "bad-signature",
    "another commitment": "bad-signature",
    "another commitment to an ingredient": "bad-signature",
    "of another session": "bad-signature",
    "too few": "cohort-too-small",
}


@pytest.mark.attack(
    "C4",
    "the server changes or makes up what a site deals, or gives its own ingredient",
    stops="each deal is signed for its holder",
)
@pytest.mark.parametrize("how", RELAYS)
def test_a_relay_that_was_tampered_with_gets_no_masked_update_and_costs_nothing(how):
    a = loose()
    a.advertise()
    a.share()
    assert a.say("site-1", "mask", tampered(a, how)) == RELAYS[how]
    assert a.session("site-1").digest == b""
    a.mask()
    end_honestly(a)


def test_a_site_masks_once_and_says_the_same_bytes_again():
    a = loose()
    a.advertise()
    a.share()
    four = {n: a.deals[n] for n in (1, 2, 3, 4)}
    first = a.say("site-1", "mask", a.relayed("site-1", deals=four))
    assert a.say("site-1", "mask", a.relayed("site-1", deals=four)) == first
    assert a.say("site-1", "mask", a.relayed("site-1")) == "session-spent"
    a.world.restart()
    assert a.say("site-1", "mask", a.relayed("site-1", deals=four)) == first
    assert a.say("site-1", "mask", a.relayed("site-1")) == "session-spent"


def test_a_site_that_was_not_shown_all_dealers_agrees_to_no_update_of_the_others():
    a = loose()
    a.advertise()
    a.share()
    four = {n: a.deals[n] for n in (1, 2, 3, 4)}
    a.masked["site-1"] = a.parse_masked("site-1", a.say("site-1", "mask", a.relayed("site-1", deals=four)))
    a.mask(ALL[1:])
    assert a.commit("site-1", a.delivered()) == "wire"
    assert a.reads_any() == []


# --- votes ----------------------------------------------------------------------------------------------------------------


def forged_delivery(a, site):
    one = a.masked[site][0]
    return replace(one, signature=Delivered.make(a.cohort, one.number, one.digest, key=signing("server")).signature)


def other_digest(a, site, *, signer):
    number = a.cohort.number(site)
    return Delivered.make(a.cohort, number, b"d" * 32, key=signing(signer))


LISTS = {
    "without the site itself": ("wire", lambda a: a.delivered(ALL[1:])),
    "too few": ("cohort-too-small", lambda a: a.delivered(ALL[:3])),
    "the site alone": ("cohort-too-small", lambda a: a.delivered(ALL[:1])),
    "another update in its name": ("wire", lambda a: [other_digest(a, "site-1", signer="server"), *a.delivered(ALL[1:])]),
    "a delivery nobody signed": ("bad-signature", lambda a: [*a.delivered(ALL[:4]), forged_delivery(a, "site-5")]),
    "a delivery of another": ("bad-signature", lambda a: [*a.delivered(ALL[:4]), other_digest(a, "site-5", signer="site-4")]),
    "a site that is not there": ("wire", lambda a: [*a.delivered(ALL[:4]), replace(a.masked["site-5"][0], number=6)]),
    "one twice": ("wire", lambda a: [*a.delivered(), a.delivered()[-1]]),
}  # fmt: skip


@pytest.mark.parametrize("lie", LISTS)
def test_a_site_agrees_to_no_set_of_updates_with_a_lie_in_it(lie):
    code, forge = LISTS[lie]
    a = loose().until_masked()
    assert a.commit("site-1", forge(a)) == code
    assert a.session("site-1").verdict == 0
    end_honestly(a)


@pytest.mark.parametrize("restart", [False, True])
def test_a_second_set_of_updates_burns_the_session_for_good(restart):
    """Both kinds of share of one site are asked for in this way: of site-5, from site-1."""
    a = loose().until_masked()
    full, less = a.delivered(), a.delivered(ALL[:4])
    assert isinstance(a.commit("site-1", full), bytes)
    if restart:
        a.world.restart()
    assert a.commit("site-1", less) == "both-secrets"
    assert a.session("site-1").root == b""
    if restart:
        a.world.restart()
    votes = a.votes({s: a.commit(s, full) for s in ALL[1:]})
    assert len(votes) == 4
    assert a.unmask("site-1", votes, full) == "votes-missing"
    assert {a.commit("site-1", full), a.commit("site-1", less), a.abort("site-1")} == {"session-spent"}
    assert a.reads_any() == []
    for site in ALL[1:]:  # the others' sum is as it should be
        a.unmask(site, votes, full)
    assert a.adds_up(ALL)
    assert a.reads_any() == []


def test_after_the_shares_of_one_set_were_given_those_of_another_are_not():
    a = loose().until_masked()
    full, less = a.delivered(), a.delivered(ALL[:4])
    votes = a.votes({s: a.commit(s, full) for s in ALL})
    for site in ALL:
        a.unmask(site, votes, full)
        assert a.session(site).root == b""
    assert {a.commit(s, less) for s in ALL[:4]} == {"both-secrets"}
    a.world.restart()
    assert {a.unmask(s, votes, full) for s in ALL[:4]} == {"votes-missing"}
    assert a.reads_any() == []
    assert not a.adds_up(ALL[:4])


@pytest.mark.parametrize(("n", "colluders", "bear"), [(5, 0, 1), (5, 1, 1), (8, 2, 2)])
def test_half_and_half_of_two_sets_reaches_no_threshold(n, colluders, bear):
    a = coalition(n, colluders, max_colluding=bear)
    honest = [s for s in names(n) if s not in a.colluders]
    full, less = a.delivered(), a.delivered([s for s in a.masked if s != honest[0]])
    half = len(honest) // 2
    one = {**a.votes({s: a.commit(s, full) for s in honest[:half]}), **a.forge(full)}
    other = {**a.votes({s: a.commit(s, less) for s in honest[half:]}), **a.forge(less)}
    assert {a.unmask(s, one, full) for s in honest[:half]} == {"votes-missing"}
    assert {a.unmask(s, other, less) for s in honest[half:]} == {"votes-missing"}
    assert {a.unmask(s, {**other, **one}, full) for s in honest} == {"bad-signature"}
    assert a.reads_any() == []
    assert not a.adds_up(names(n))


def sign_all(a, text):
    return {n: sign_vote(text, key=signing(s)) for n, s in enumerate(ALL, 1)}


VOTES = {
    "none": ("votes-missing", lambda a, votes, listed: {}),
    "one too few": ("votes-missing", lambda a, votes, listed: {n: votes[n] for n in (1, 2, 3)}),
    "one forged": ("bad-signature", lambda a, votes, listed: {**votes, 5: votes[4]}),
    "the servers own": ("bad-signature", lambda a, votes, listed: {**votes, 5: sign_vote(b"x", key=signing("server"))}),
    "of a site that is not there": ("votes-missing", lambda a, votes, listed: {**votes, 6: votes[1]}),
    "ABORT for COMMIT": ("bad-signature", lambda a, votes, listed: sign_all(a, vote_text(a.cohort.t1, ABORT))),
    "of another session": ("bad-signature", lambda a, votes, listed: sign_all(
        a, vote_text(b"?" * 32, COMMIT, Delivered.digest_of(listed))
    )),
    "on another set": ("bad-signature", lambda a, votes, listed: sign_all(
        a, vote_text(a.cohort.t1, COMMIT, Delivered.digest_of(listed[:4]))
    )),
}  # fmt: skip


@pytest.mark.parametrize("lie", VOTES)
def test_no_share_is_given_on_votes_with_a_lie_in_them(lie):
    code, forge = VOTES[lie]
    a = loose().until_masked()
    listed = a.delivered()
    votes = a.votes({s: a.commit(s, listed) for s in ALL})
    assert {a.unmask(s, forge(a, votes, listed), listed) for s in ALL} == {code}
    assert a.shares == {}
    assert a.reads_any() == []
    end_honestly(a)


def test_a_certificate_is_at_least_as_many_votes_as_its_threshold():
    """Every subset of five sites' votes, for every threshold."""
    text = vote_text(b"t" * 32, COMMIT, b"d" * 32)
    votes = {n: sign_vote(text, key=signing(s)) for n, s in enumerate(ALL, 1)}

    def holds(chosen, threshold):
        try:
            given = {n: votes[n] for n in chosen}
            check_certificate(given, text, names=ALL, threshold=threshold, known=lambda s: identity(s).public)
        except SessionError as e:
            if e.code != "votes-missing":
                raise
            return False
        return True

    for size in range(6):
        for chosen in itertools.combinations(votes, size):
            assert [holds(chosen, t) for t in range(1, 6)] == [size >= t for t in range(1, 6)]


def test_no_share_is_given_by_a_site_that_has_not_voted():
    a = loose().until_masked()
    listed = a.delivered()
    votes = a.votes({s: a.commit(s, listed) for s in ALL[:4]})
    assert a.unmask("site-5", votes, listed) == "votes-missing"


def test_votes_come_once_and_of_one_kind():
    a = loose().until_masked()
    listed = a.delivered()
    first = a.commit("site-1", listed)
    assert a.commit("site-1", listed) == first
    assert a.abort("site-1") == "session-spent"
    assert isinstance(a.abort("site-2"), bytes)
    assert a.abort("site-2") == a.abort("site-2")
    assert a.commit("site-2", listed) == "session-spent"
    assert a.session("site-2").root == b""
    a.world.restart()
    assert a.abort("site-1") == "session-spent"
    assert a.commit("site-2", listed) == "session-spent"
    assert a.say("site-3", "vote", a.cohort.t1 + b"\x03") == "wire"
    assert a.say("site-3", "vote", a.cohort.t1 + bytes([ABORT]) + Delivered.dump_all(listed)) == "wire"
    assert a.say("site-3", "vote", b"?" * 32 + bytes([ABORT])) == "wrong-context"


def test_a_site_that_has_voted_masks_nothing_more():
    a = loose()
    a.advertise()
    a.share()
    a.mask(ALL[:4])
    a.abort("site-5")
    assert a.mask(["site-5"])["site-5"] in ("session-spent", "secrets-gone")
    listed = a.delivered()
    assert isinstance(a.commit("site-1", listed), bytes)
    assert a.mask(["site-1"])["site-1"] == "session-spent"


# --- a second session in one round ------------------------------------------------------------------------------------------


def again(a, sites, **offer):
    """The next attempt at the same round, among these sites, as far as their shares."""
    a.begin(a.world.task(attempt=a.task.attempt + 1))
    a.advertise(sites)
    a.share(sites)


def first_over(*, unmasked):
    a = loose().until_masked()
    listed = a.delivered()
    votes = a.votes({s: a.commit(s, listed) for s in ALL}) if unmasked else {}
    for site in ALL if unmasked else ():
        a.unmask(site, votes, listed)
    return a, votes


@pytest.mark.parametrize("unmasked", [False, True])
def test_the_cohort_minus_one_is_a_second_sum_of_the_same_updates_and_refused(unmasked):
    a, votes = first_over(unmasked=unmasked)
    t1 = a.cohort.t1
    again(a, ALL[:4])
    forged = {n: sign_vote(vote_text(t1, ABORT), key=signing("server")) for n in range(1, 6)}
    proofs = {
        "nothing": ([], "session-spent"),
        "of another session": ([(b"?" * 32, certificate(forged))], "session-spent"),
        "forged": ([(t1, certificate(forged))], "bad-signature"),
        "COMMIT for ABORT": ([(t1, certificate(votes))], "bad-signature" if unmasked else "votes-missing"),
        "empty": ([(t1, certificate({}))], "votes-missing"),
        "one colluder's": ([(t1, certificate({5: sign_vote(vote_text(t1, ABORT), key=signing("site-5"))}))], "votes-missing"),
    }
    for what, (proof, code) in proofs.items():
        assert set(a.mask(ALL[:4], ended=proof).values()) == {code}, what
    a.world.restart()
    assert set(a.mask(ALL[:4]).values()) == {"session-spent"}
    assert a.masked == {}


def test_a_session_that_is_proved_to_be_over_may_be_followed_by_another():
    a = loose().until_masked()
    first = (a.cohort, dict(a.masked), dict(a.deals))
    aborts = a.votes({s: a.abort(s) for s in ALL[:4]})
    listed = a.delivered()
    late = a.commit("site-5", listed)  # the one that has not said ABORT may say COMMIT: one vote, of four that are needed
    assert a.unmask("site-5", a.votes({"site-5": late}), listed) == "votes-missing"
    again(a, ALL[:4])
    a.mask(ALL[:4], ended=[(first[0].t1, certificate(aborts))])
    end_honestly(a)
    a.cohort, a.masked, a.deals = first  # all that it has from the second session opens nothing of the first
    a.shares.clear()
    assert a.reads_any() == []
    assert {a.say(s, "unmask", a.cohort.t1 + certificate({}), task=a.world.task(attempt=0)) for s in ALL[:4]} <= {
        "secrets-gone", "replayed", "wrong-context",
    }  # fmt: skip


def test_commit_and_abort_cannot_both_be_proved_even_by_as_many_colluders_as_are_borne():
    for n, c in ((4, 1), (5, 1), (7, 2), (10, 3)):
        a = coalition(n, c, max_colluding=c)
        honest = [s for s in names(n) if s not in a.colluders]
        listed, t = a.delivered(), a.cohort.threshold
        for split in range(len(honest) + 1):
            assert not (split + c >= t and len(honest) - split + c >= t)
        text = vote_text(a.cohort.t1, ABORT)
        need = t - c  # honest sites for a COMMIT
        votes = {**a.votes({s: a.commit(s, listed) for s in honest[:need]}), **a.forge(listed)}
        aborts = a.votes({s: a.abort(s) for s in honest})
        aborts |= {a.cohort.number(s): sign_vote(text, key=signing(s)) for s in a.colluders}
        assert len(votes) >= t > len(aborts)


# --- what is old, or meant for somebody else -----------------------------------------------------------------------------------


def test_an_old_request_is_refused_and_the_same_one_gets_the_same_answer():
    a = loose()
    a.advertise()
    a.share()
    context = Context.of(a.task)
    kept = {}
    for site in ALL:
        answer = a.say(site, "mask", a.relayed(site))
        kept[site] = a.last
        a.masked[site] = a.parse_masked(site, answer)
        assert a.receive(a.last, context) == answer
    assert a.commit("site-1", a.delivered())
    assert a.receive(kept["site-1"], context) == "replayed"
    end_honestly(a)


def test_a_request_is_for_one_phase_one_site_and_one_run():
    a = loose().until_masked()
    context = Context.of(a.task)
    a.commit("site-1", a.delivered())
    vote = a.last
    assert a.receive(Request("site-1", "unmask", vote.body), context) == "wrong-direction"
    assert a.receive(Request("site-2", "vote", vote.body), context) == "wrong-recipient"
    other = replace(a.task, run="cd" * 32)
    assert a.say("site-1", "unmask", a.cohort.t1 + certificate({}), task=other) == "secrets-gone"
    assert a.say("site-1", "fork", b"", task=a.task) == "wrong-direction"
    for attempt, round_ in ((1, 1), (0, 2)):
        task = replace(a.task, attempt=attempt, round=round_)
        assert a.say("site-1", "unmask", a.cohort.t1 + certificate({}), task=task) == "secrets-gone"


def test_a_round_that_is_over_is_not_worked_on_again():
    a = loose().until_masked()
    end_honestly(a)
    a.world.next_round(a.world.expected(ALL))
    a.begin(a.world.task(round=2))
    a.advertise()
    a.share()
    a.mask()
    a.world.work = never
    a.begin(a.world.task(round=1, attempt=9))
    assert {a.say(s, "advertise", a.offer()) for s in ALL} == {"wrong-round"}


def test_a_server_cannot_step_down_to_single_updates():
    a = loose()
    site = a.world.__dict__["sites"]["site-1"]
    modes = SiteModes({"sealed": SealedSite(site.link), "secagg": site})
    for roster in (pinned(identity("server").public), a.link.roster):
        talk = SealedServer(replace(a.link, roster=roster), "float32").collect(a.task, ["site-1"], Heard())
        (request,) = next(talk)
        with pytest.raises(WrongContext):
            modes.answer(request, never)


# --- sites that lie -----------------------------------------------------------------------------------------------------------


class FalseDealer(SecAggSite):
    """Deals shares of secrets that are not those which it has advertised."""

    def _share(self, payload, records, session):
        super()._share(payload, records, session)
        other = Lying(session.root)
        return deal(self._cohort, self._cohort.number(self._name), other, key=self.link.identity.signing)


class Lying(Secrets):
    @property
    def self_seed(self):
        return b"not it.." * 4


class FalseDealerOfMaskKeys(FalseDealer):
    def _share(self, payload, records, session):
        SecAggSite._share(self, payload, records, session)
        return deal(self._cohort, self._cohort.number(self._name), LyingAboutKeys(session.root), key=self.link.identity.signing)


class LyingAboutKeys(Secrets):
    @property
    def mask_keys(self):
        return MaskKeys(b"not it.." * 4)


def with_liar(kind, n=5):
    world = World(n, plan=secagg_plan(lone_change="allow"))  # without it, no round goes on without one of five
    honest = world.site("site-2")
    world.__dict__["sites"]["site-2"] = kind(honest.link, honest.roster, honest.entropy)
    return world


def test_a_dealer_of_false_shares_is_named_the_round_is_void_and_the_next_one_goes_on_without_it():
    world = with_liar(FalseDealer)
    heard = world.collect(world.task())
    assert heard.sums == []
    assert [v.code for v in heard.voids] == ["bad-dealer"]
    assert heard.codes()["site-2"] == "bad-dealer"
    world.globals[2] = world.globals[1]
    heard = world.collect(world.task(round=2))
    assert heard.codes() == {"site-2": "bad-dealer"}
    assert [list(s) for s, *_ in heard.sums] == [["site-1", "site-3", "site-4", "site-5"]]
    world.restart()  # it may have been repaired: in this run nobody finds out
    world.globals[3] = world.globals[1]
    heard = world.collect(world.task(round=3))
    assert heard.codes() == {"site-2": "bad-dealer"}
    assert [list(s) for s, *_ in heard.sums] == [["site-1", "site-3", "site-4", "site-5"]]


def test_a_dealer_of_a_false_mask_seed_who_then_drops_out_is_named():
    world = with_liar(FalseDealerOfMaskKeys)
    heard = world.collect(world.task(), lost=at_phase(**{"site-2": "mask"}))
    assert heard.sums == []
    assert heard.codes()["site-2"] in ("bad-dealer", "late")
    assert [v.code for v in heard.voids] == ["bad-dealer"]
    world.globals[2] = world.globals[1]
    heard = world.collect(world.task(round=2))
    assert heard.codes() == {"site-2": "bad-dealer"}


class FalseHolder(SecAggSite):
    def _unmask(self, payload, records, session):
        out = bytearray(super()._unmask(payload, records, session))
        out[-1] ^= 1
        return bytes(out)


def test_a_holder_that_gives_a_false_share_is_named_and_the_sum_is_right():
    world = with_liar(FalseHolder)
    heard = world.collect(world.task())
    ((sites, update, *_),) = heard.sums
    assert list(sites) == ALL
    assert np.array_equal(update.delta, world.expected(ALL))
    assert heard.rejected == {}  # its update counts; the report says so
    assert ("unheard", {"site": "site-2", "code": "bad-share"}) in world.events


class ShortUpdate(SecAggSite):
    def _mask(self, payload, records, session):
        return super()._mask(payload, records, session)[: self.cut]

    cut = -1


class LongUpdate(SecAggSite):
    def _mask(self, payload, records, session):
        return bytes(super()._mask(payload, records, session)) + b"\0"


class OtherUpdate(SecAggSite):
    """Another update than the one whose digest it has signed."""

    def _mask(self, payload, records, session):
        out = bytearray(super()._mask(payload, records, session))
        out[-3] ^= 1
        return bytes(out)


@pytest.mark.parametrize(("kind", "code"), [(ShortUpdate, "wire"), (LongUpdate, "wire"), (OtherUpdate, "bad-signature")])
def test_a_masked_update_that_is_not_well_formed_is_out_before_the_vote(kind, code):
    world = with_liar(kind)
    heard = world.collect(world.task())
    rest = [s for s in ALL if s != "site-2"]
    ((sites, update, *_),) = heard.sums
    assert list(sites) == rest
    assert np.array_equal(update.delta, world.expected(rest))
    assert heard.codes() == {"site-2": code}


# --- secrets stay where they are ----------------------------------------------------------------------------------------------


def test_secrets_are_in_no_repr_and_on_the_disk_only_encrypted():
    a = loose(colluders=["site-1"]).until_masked()
    session = a.session("site-1")
    secrets = a.secrets("site-1")
    canaries = [session.root, secrets.self_seed, secrets.mask_keys.seed]
    inbox = Inbox({1: (b"s" * 33, b"t" * 33)}, {2: b"i" * 32})
    site = a.world.__dict__["sites"]["site-1"]
    for shown in (repr(session), repr(secrets), repr(secrets.mask_keys), repr(inbox), repr(site), repr(site._encoded)):
        for canary in [*canaries, b"s" * 33, b"i" * 32]:
            assert canary.hex() not in shown
            assert repr(canary)[2:-1] not in shown
    assert len(session.root) == 32
    files = a.world.memory["site-1"]
    assert isinstance(files, DictMemory)
    for blob in stored(files):
        for canary in canaries:
            assert canary not in blob
            assert canary.hex().encode() not in blob


def stored(memory):
    (values,) = [v for v in vars_of(memory).values() if isinstance(v, dict)]
    return list(values.values())


def vars_of(thing):
    return {n: getattr(thing, n) for n in getattr(thing, "__slots__", ())} or vars(thing)


def test_secrets_are_deleted_at_the_end_and_what_was_said_can_be_said_again():
    a = loose().until_masked()
    listed = a.delivered()
    votes = a.votes({s: a.commit(s, listed) for s in ALL})
    first = a.unmask("site-1", votes, listed)
    assert a.session("site-1").root == b""
    assert a.session("site-1").final == first
    a.world.restart()
    assert a.unmask("site-1", votes, listed) == first


def test_a_damaged_session_file_makes_a_site_drop_out_and_a_damaged_record_of_what_it_gave_stops_it():
    a = loose().until_masked()
    memory = a.world.memory["site-1"]
    memory.put(f"{a.task.run}/secagg/session", b"damaged")
    a.world.restart()
    assert a.commit("site-1", a.delivered()) == "secrets-gone"
    a.world.work = never
    for damaged in (b"damaged", b""):
        memory.put(f"{a.task.run}/secagg/used", damaged)
        assert a.say("site-1", "advertise", a.offer()) == "store"
