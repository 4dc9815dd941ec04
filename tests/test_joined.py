"""What each site gains by joining, against numbers that one can check by hand."""

import pytest
from test_report import arm, run, typed

from fedlora.lab.personal.joined import cells, heads, joined, lines, note


def results(seed=0, *, personal=True, better=0.0):
    """North: alone 2 on its own and 4 on south's; federated 2.5 and 3; its own adapter 1.5 and 3.25."""
    arms = {
        "local:north": arm((2.0, 0.5), (4.0, 0.0)),
        "local:south": arm((4.0, 0.0), (2.0, 0.5)),
        "federated": arm((2.5 - better, 0.25), (3.0, 0.25)),
    }
    if personal:
        arms |= {"personal:north": arm((1.5, 0.75), (3.25, 0.2)), "personal:south": arm((2.75, 0.1), (1.9, 0.6))}
    return typed(run(seed) | {"arms": arms})


def test_gains_are_on_own_rows_and_what_is_kept_is_on_the_others():
    north, south = joined([results()])
    assert (north.nats["own", "alone"], north.nats["own", "federated"], north.nats["own", "personal"]) == (2.0, 2.5, 1.5)
    assert (north.nats["others", "alone"], north.nats["others", "personal"]) == (4.0, 3.25)
    assert north.gains == (0.5,)
    assert north.kept == pytest.approx((4 - 3.25) / (4 - 3))
    assert south.gains == (pytest.approx(0.1),)
    assert south.kept == pytest.approx((4 - 2.75) / (4 - 2.5))
    assert north.exact["own", "personal"] == 0.75


def test_without_personal_adapters_the_federated_one_is_what_a_site_has():
    rows = joined([results(personal=False)])
    assert [row.gains for row in rows] == [(-0.5,), (-1.0,)]
    assert [row.kept for row in rows] == [None, None]
    assert heads(rows) == ["alone", "federated", "gain", "alone, others", "federated, others"]
    assert cells(rows[0], rows) == ["2.000", "2.500", "-0.500", "4.000", "3.000"]
    assert "alone minus federated" in note([results(personal=False)], rows)


def test_over_seeds_a_gain_has_its_interval_and_one_seed_without_an_arm_is_no_mean():
    runs = [results(0), results(1, better=0.25)]
    (north, _) = joined(runs)
    assert north.nats["own", "federated"] == pytest.approx(2.375)
    for seeds in (2, 3):
        said = "\n".join(lines([results(seed, better=0.1 * seed) for seed in range(seeds)]))
        assert ("95 %" in said, "[" in said) == (seeds == 3, seeds == 3)  # two give no usable interval
    (north, _) = joined([results(0), results(1, personal=False)])
    assert (north.nats["own", "personal"], north.kept) == (None, None)
    assert north.gains == (-0.5, -0.5)  # of the federated adapter, which both have


def test_where_the_federation_gained_nothing_no_share_of_it_is_said():
    arms = results().arms
    arms = {**arms, "federated": arms["local:north"]}
    (north, _) = joined([results().model_copy(update={"arms": arms})])
    assert north.kept is None


@pytest.mark.parametrize("personal", [True, False])
@pytest.mark.parametrize("seeds", [1, 3])
def test_it_fits_a_terminal(personal, seeds):
    said = lines([results(seed, personal=personal) for seed in range(seeds)])
    assert all(len(line) <= 100 for line in said)
    assert sum(line.startswith(("north", "south")) for line in said) == 2


def test_nothing_is_said_where_sites_have_no_arm_of_their_own():
    only = {"federated": results().arms["federated"]}
    assert lines([results().model_copy(update={"arms": only})]) == []


def with_steps(found, **steps):
    """Steps of arms, by the first word of their name, or of ``arm_site`` alone."""
    arms = {
        name: one.model_copy(update={"steps": steps.get(name.replace(":", "_"), steps.get(name.partition(":")[0], one.steps))})
        for name, one in found.arms.items()
    }
    return found.model_copy(update={"arms": arms})


STEPS = {
    "alike": (
        {"local": 8, "federated": 8, "personal": 16},
        "alone 8; federated 8; personal: from the federated adapter 8 further",
    ),
    "no rows to validate": (
        {"local": 8, "federated": 8, "personal": 16, "personal_south": 0},
        "alone 8; federated 8; personal: from the federated adapter 0 to 8 further",
    ),
    "passes over the rows": (
        {"local_north": 6, "local_south": 1000, "federated": None, "personal_north": 12, "personal_south": 2000},
        "alone 6 to 1,000; federated not counted (passes over the rows); personal: from the federated adapter 6 to 1,000 further",
    ),
    "never counted": (
        {"local": None, "federated": 8, "personal": None},
        "federated 8; personal: from the federated adapter not counted (passes over the rows) further",
    ),
}


@pytest.mark.parametrize(("steps", "said"), STEPS.values(), ids=STEPS)
def test_the_steps_of_each_arm_stand_by_its_gain_on_page_and_terminal(steps, said):
    found = [with_steps(results(), **steps)]
    page, terminal = note(found, joined(found)), " ".join(" ".join(lines(found)).split())
    for text in (page, terminal):
        assert said in text
        assert "More steps alone may bring a part of the gain" in text


def test_without_personal_adapters_steps_are_alike_and_nothing_is_said_of_more():
    found = [with_steps(results(personal=False), local=8, federated=8)]
    text = note(found, joined(found))
    assert "alone 8; federated 8." in text
    assert "More steps" not in text


def test_the_rows_of_the_others_are_the_others():
    assert "the others' rows" in "\n".join(lines([results()]))
