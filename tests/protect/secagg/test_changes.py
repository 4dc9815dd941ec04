"""Federations that change: rosters that grow, shrink and are regrouped, plans of another kind on one base."""

import pytest
from protect.secagg.adversary import Adversary
from protect.secagg.world import NOW, World, identity, names, secagg_plan, signed_roster

from fedlora.core.errors import ConfigError
from fedlora.core.plan import parse_plan
from fedlora.formats.epochs import next_epoch
from fedlora.formats.signed_roster import SignedRoster
from fedlora.protect.ledger import ContributionStore, Ledger
from fedlora.protect.secagg.protocol.cohort import Cohort, SessionRequirements

pytestmark = pytest.mark.slow


def publics(sites):
    return [identity(s).public for s in sites]


def refused(answers):
    return {site for site, answer in answers.items() if isinstance(answer, str)}


def session(world, round, sites, *, n):
    """A whole session as a server holds it that takes part in nothing. Who refused, and whether the sum opened."""
    world.globals[round] = world.globals[1]
    server = Adversary(n, world=world)
    server.begin(world.task(round=round))
    offered = {site: server.say(site, "advertise", server.offer()) for site in sites}
    server.adverts = {site: server.advert(answer) for site, answer in offered.items() if isinstance(answer, bytes)}
    out = refused(offered)
    if len(server.adverts) < 3:
        return out, False
    out |= refused(server.share(cohort=Cohort.of(list(server.adverts.values()), SessionRequirements(1, 3))))
    if out:
        return out, False
    out |= refused(server.mask())
    delivered = server.delivered()
    said = {s: server.commit(s, delivered) for s in sites}
    votes = server.votes(said)
    shown = {s: server.unmask(s, votes, delivered) for s in sites}
    return out | refused(said) | refused(shown), len(refused(shown)) == 0


def turned(world, **changes):
    """The next epoch, signed, in force at the server."""
    world.signed = SignedRoster(next_epoch(world.signed.roster, now=NOW, **changes)).sign(identity("coordinator"))


@pytest.mark.attack(
    "C3e",
    "the roster grows; sums of before and after it differ by one new site",
    stops="new sites wait until they are a group of their own",
)
def test_a_new_site_gives_to_no_sum_before_there_is_a_group_of_new_sites():
    world = World(8, plan=secagg_plan(rounds=5), signed=signed_roster(5))  # three of them come later
    assert session(world, 1, names(5), n=5) == (set(), True)
    turned(world, add=publics(["site-6"]))
    world.restart("site-6")
    refusing, opened = session(world, 2, [*names(5), "site-6"], n=6)
    assert (refusing, opened) == ({"site-6"}, False)
    turned(world, add=publics(["site-7", "site-8"]))
    world.restart("site-7", "site-8")
    assert session(world, 3, names(8), n=8) == (set(), True)
    assert session(world, 4, ["site-6", "site-7", "site-8"], n=8) == (set(), True)


@pytest.mark.attack(
    "C3g",
    "sites are revoked, or the roster is regrouped, after a sum: the next one differs by few",
    stops="a group with a revoked site is whole no more, and sites give with no other group than before on one base model",
)
@pytest.mark.parametrize(
    "change", [{"revoke": ["site-4"]}, {"revoke": ["site-4"], "regroup": True}, {"regroup": True, "group_size": 8}]
)
def test_a_group_that_changes_gives_no_more_on_the_same_base(change):
    world = World(9)
    assert session(world, 1, names(9), n=9) == (set(), True)
    turned(world, **change)
    left = [s for s in names(9) if s in world.signed.roster.active()]
    whole = set().union(*world.signed.roster.groups())
    refusing, opened = session(world, 2, left, n=9)
    assert not opened
    assert {"site-1", "site-7"} <= refusing  # of the group of site-4
    if not change.get("regroup"):
        assert refusing == {"site-1", "site-7"}
        assert session(world, 3, sorted(whole), n=9) == (set(), True)


@pytest.mark.attack(
    "C3f",
    "a plan in which some sites have few slots of the adapter, so that in the sum another site's slots stand alone",
    stops="under secure aggregation no plan has lora.ranks: every site refuses it when it reads it",
)
def test_a_plan_of_different_ranks_is_refused_by_every_site_before_it_trains():
    plan = secagg_plan()
    plan = plan.model_copy(update={"lora": plan.lora.model_copy(update={"ranks": {"site-1": 1}})})  # not checked here
    server = Adversary(5, world=World(5, plan=plan))
    worked = []
    server.world.work = lambda *task: worked.append(task)
    server.begin(server.world.task())
    assert {server.say(site, "advertise", server.offer()) for site in names(5)} == {"config"}
    assert worked == []
    with pytest.raises(ConfigError, match=r"lora\.ranks under protect\.mode = 'secagg'.*leave lora\.ranks out"):
        parse_plan(plan.canonical())


@pytest.mark.attack(
    "C3h",
    "sums that differ by one site under a plan that allows it, and one over all under a plan that does not: a site knows of one",
    stops="all plans on one base allow lone changes, or none does: who has given to the other kind gives nothing",
)
@pytest.mark.parametrize("order", [("allow", "refuse"), ("refuse", "allow")])
def test_sums_that_may_differ_by_one_site_are_not_taken_from_one_that_may_not(order):
    sums = {"allow": [names(3), names(5)[2:]], "refuse": [names(6)]}  # S - S1 - S2 + what site-3 has is site-6's update
    plans = {kind: secagg_plan(profile="int24", rounds=5, lone_change=kind) for kind in sums}
    earlier, later = order
    world, colluder = World(6, plan=plans[earlier]), "site-3"
    for k, sites in enumerate(sums[earlier], start=1):
        assert session(world, k, sites, n=6) == (set(), True)
        # It remembers nothing that is to its friends' harm.
        ContributionStore(world.memory[colluder], identity(colluder), bytes).save(Ledger())
    world.plan, knowing = plans[later], set().union(*sums[earlier]) - {colluder}
    for k, sites in enumerate(sums[later], start=3):
        world.globals[k] = world.globals[1]
        server = Adversary(6, world=world)
        server.begin(world.task(round=k))
        answers = {site: server.say(site, "advertise", server.offer()) for site in sites}
        assert {site for site, answer in answers.items() if answer == "lone-change"} == knowing & set(sites)
