"""`fedlora budget` and what `fedlora check` says: what is spent, what a plan adds, what is left."""

import shutil

import pytest
from privacy.test_distributed import shared
from privacy.test_site import PLAN, RUN, SETTINGS, One, task

from fedlora.cli import main
from fedlora.core.errors import ConfigError, FedLoRAError, StateLost
from fedlora.core.plan import Plan
from fedlora.core.toml import dump_toml
from fedlora.flower.enrol import make_site_keys
from fedlora.lab.testing import toy_plan
from fedlora.privacy.claims import NO_CLAIM, NO_PRIVACY, run_epsilon
from fedlora.site.budget import BudgetDesk, cost_at
from fedlora.site.site_file import SiteFile


@pytest.fixture
def site(tmp_path):
    make_site_keys("a", tmp_path / "keys")
    file = SiteFile(name="a", key="keys/a.key", privacy=SETTINGS, data={"group_key": "patient", "held_out_fraction": 0.0})
    (tmp_path / "site.toml").write_text(dump_toml(file))
    (tmp_path / "plan.toml").write_text(dump_toml(PLAN))
    return tmp_path / "site.toml"


def test_an_account_says_what_is_spent_set_aside_and_left(site):
    desk, all_of_it = BudgetDesk(site), run_epsilon(PLAN)
    found = desk.account()
    assert (found.spent, found.committed, found.left, found.charges) == (0.0, 0.0, 8.0, 0)
    assert not (site.parent / "state" / "privacy").exists()  # who only looks makes nothing
    found = desk.reserve(PLAN)
    assert (found.spent, found.committed, found.left) == (0.0, all_of_it, 8.0 - all_of_it)
    assert found.reserved == {PLAN.digest(): all_of_it}
    found = desk.release(PLAN.digest()[:8])
    assert (found.committed, found.reserved) == (0.0, {})
    with pytest.raises(ConfigError, match="nothing set aside"):
        desk.release("ff")
    with pytest.raises(ConfigError, match=r"no \[privacy\]"):
        desk.reserve(toy_plan())


def test_a_plan_beside_the_budget_before_and_after_it_was_set_aside(site):
    for _ in range(2):
        cost, said = cost_at(site, PLAN)
        assert (cost.spent, cost.after, cost.fits) == (0.0, run_epsilon(PLAN), True)
        assert f"this plan: +{cost.after:.2f} if it runs to the end; after it {8.0 - cost.after:.2f} left" in said
        BudgetDesk(site).reserve(PLAN)
    big = PLAN.model_copy(update={"privacy": PLAN.privacy.model_copy(update={"noise_multiplier": 0.5, "epsilon": 50.0})})
    cost, said = cost_at(site, big)
    assert not cost.fits
    assert "over the budget, this site refuses it" in said
    with pytest.raises(FedLoRAError, match="would reach"):
        BudgetDesk(site).reserve(big)
    assert cost_at(site, toy_plan()) == (None, "")
    (site.parent / "site.toml").write_text(dump_toml(SiteFile(name="a", key="keys/a.key")))
    assert "no privacy budget" in cost_at(site, PLAN)[1]


def test_a_loss_is_accepted_where_something_is_missing_or_a_plan_is_named(site):
    desk = BudgetDesk(site)
    desk.reserve(PLAN)
    with pytest.raises(ConfigError, match="nothing is missing"):
        desk.accept_loss([])
    shutil.rmtree(site.parent / "state" / "privacy")
    with pytest.raises(StateLost):
        desk.account()
    with pytest.raises(StateLost):
        desk.reserve(PLAN)
    found = desk.accept_loss([PLAN])
    assert found.spent == found.committed == run_epsilon(PLAN)
    again = desk.accept_loss([PLAN])  # of a copy of the whole state, which nobody notices
    assert again.spent > found.spent
    assert desk.account() == again


def test_check_says_the_claim_and_the_budget_or_that_there_is_no_privacy(site, capsys):
    assert main(["check", str(site.parent / "plan.toml")]) == 0
    assert NO_CLAIM in capsys.readouterr().out
    (site.parent / "open.toml").write_text(dump_toml(Plan()))
    assert main(["check", str(site.parent / "open.toml")]) == 0
    assert NO_PRIVACY in capsys.readouterr().out
    assert main(["budget", "reserve", str(site), str(site.parent / "plan.toml")]) == 0
    assert main(["budget", "show", str(site)]) == 0
    assert "epsilon 0.00 of 8 spent" in capsys.readouterr().out
    assert main(["budget", "reserve", str(site)]) == 2


def test_an_account_and_a_plan_say_what_is_left_with_nobodys_noise_but_ours(site, capsys):
    plan = shared(noise_multiplier=6.0)
    own = run_epsilon(plan, honest_others=False)
    cost, said = cost_at(site, plan)
    assert (cost.after, cost.own_noise) == (run_epsilon(plan), own)
    assert f"{own:.2f} in all with nobody's noise but ours" in said
    (site.parent / "plan.toml").write_text(dump_toml(plan))
    assert main(["budget", "reserve", str(site), str(site.parent / "plan.toml")]) == 0
    assert f"{own:.2f} with nobody's noise but ours" in capsys.readouterr().out
    account = BudgetDesk(site).account()
    assert (account.committed, account.own_noise) == (run_epsilon(plan), own)
    (site.parent / "site.toml").write_text(site.read_text().replace("honest_others = true", "honest_others = false"))
    assert BudgetDesk(site).account().committed == own
    assert cost_at(site, plan)[0].after == own
    assert main(["check", str(site.parent / "plan.toml")]) == 0
    assert f"{own:.3g} with no noise but its own" in capsys.readouterr().out


def test_leaving_for_good_keeps_the_ledger_of_what_was_released(tmp_path):
    from fedlora.site.leaving import doomed

    one = One(tmp_path / "state")
    one.site.work(task(run=RUN))
    gone = doomed(one.file.model_copy(update={"state": "state"}), tmp_path)
    assert tmp_path / "state" / "journal" in gone
    assert not any((tmp_path / "state" / "privacy").is_relative_to(path) for path in gone)
