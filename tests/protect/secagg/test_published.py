"""What a site takes for a published adapter: whatever honest rounds can give, and nothing that is plainly made up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import PlainSite
from protect.secagg.world import secagg_plan
from raising import raising

from fedlora.core.adapter import Adapter, Layout, Update
from fedlora.core.errors import PlanRefused
from fedlora.core.grids import to_bfloat16
from fedlora.core.messages import Task
from fedlora.core.plan import Plan
from fedlora.formats.state.journal import Journal
from fedlora.lab.testing import TOY_BASE, ToyLearner, open_policy, toy_layout
from fedlora.protect.secagg import terms
from fedlora.protect.secagg.mode import SecAgg
from fedlora.protect.secagg.protocol.rings import PROFILES, encode, scale_for, scales_for, sum_to_mean
from fedlora.protect.secagg.terms import most_moved, reach
from fedlora.rules import add, optimizer_of, rounded, rule_of
from fedlora.rules.first import first_adapter, first_of
from fedlora.site.work import Site

LAYOUT = Layout.of({"m.lora_A.weight": (3, 6), "m.lora_B.weight": (5, 3), "n.lora_A.weight": (3, 4), "n.lora_B.weight": (4, 3)})
RULES = {
    "fedavg": {},
    "ffa": {"name": "ffa"},
    "rolora": {"name": "rolora"},
    "fedsvd": {"name": "fedsvd"},
    "fedsvd-every-2": {"name": "fedsvd", "fedsvd": {"every": 2}},
}
SERVERS = {
    "none": {},
    "sgd": {"name": "sgd", "sgd": {"learning_rate": 3.0}},
    "fedavgm": {"name": "fedavgm", "fedavgm": {"learning_rate": 0.7}},
    "nesterov": {"name": "nesterov", "nesterov": {"momentum": 0.6}},
    "fedadam": {"name": "fedadam", "fedadam": {"learning_rate": 0.01}},
    "fedadam-slow": {"name": "fedadam", "fedadam": {"learning_rate": 0.01, "beta1": 0.99, "beta2": 0.999}},
}


def plan_of(rule, server, *, schedule="cosine", rounds=6, unit=0, profile="int8"):
    made = secagg_plan(rounds=rounds, first_range=0.1, weight_unit=unit, profile=profile).model_dump()
    made["aggregate"] = {"weighting": made["aggregate"]["weighting"], **RULES[rule]}
    made["server_optimizer"] = SERVERS[server]
    made["training"] |= {"lr_scheduler_type": schedule}
    return Plan.model_validate(made)


def check_published(plan, adapter, *, round, first=None):
    """From the plan's own first adapter, or from that of an earlier run."""
    terms.check_published(plan, adapter, first=first or first_of(adapter.layout, seed=plan.run.seed), round=round)


def publish(plan, moves, first=None):
    """The adapter after each round in which all sites sent ``move(round, n)`` values, within what a round can show."""
    rule, optimizer, now, state = rule_of(plan), optimizer_of(plan), first or first_adapter(LAYOUT, seed=plan.run.seed), {}
    yield now
    for round, move in enumerate(moves, 1):
        sums = rule.start(now, cohort=4, round=round)
        sent = rule.reply(now.layout, round)
        sums.add("*", Update(np.float32(most_moved(plan, round)) * move(sent.size), 1, {}), squares=np.zeros(len(sent.entries)))
        found = rule.finish(sums, now, scale=1.0, round=round, state=state)
        state = {**state, **found.state}
        if found.delta is not None:
            moved, state = optimizer.step(found.delta, state)
            sent = now.layout.only(rule.down())
            now, state = rounded(add(now, moved), state, sent=sent, dtype=SecAgg.down(plan))
        else:
            now = found.adapter
        yield now


PAIRS = [(r, s) for r in RULES for s in SERVERS if not (r.startswith("fedsvd") and s != "none")]


@given(st.sampled_from(PAIRS), st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 2**32), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_honest_rounds_give_is_taken(pair, schedule, seed, full):
    """Also where every site sends the most it may in one direction."""
    plan, rng = plan_of(*pair, schedule=schedule), np.random.default_rng(seed)

    def move(n):
        return (np.sign(rng.normal(size=n)) if full else rng.uniform(-1, 1, n)).astype(np.float32)

    def ahead(n):
        return np.ones(n, np.float32)

    for steps in ([move] * 6, [ahead] * 6):
        for round, adapter in enumerate(publish(plan, steps), 1):
            check_published(plan, adapter.part(adapter.layout.only(rule_of(plan).down())), round=round)


@given(st.sampled_from(PAIRS), st.integers(0, 2**32), st.sampled_from([0.0, 0.01, 3.0]))
@settings(max_examples=40, deadline=None)
def test_honest_rounds_that_begin_with_an_earlier_run_s_adapter_are_taken(pair, seed, size):
    """Whatever that adapter is; and what is far from it is refused, though it is what began another run."""
    plan, rng = plan_of(*pair), np.random.default_rng(seed)
    earlier = Adapter(to_bfloat16(rng.normal(0, size, LAYOUT.size).astype(np.float32)), LAYOUT)

    def move(n):
        return rng.uniform(-1, 1, n).astype(np.float32)

    sent = LAYOUT.only(rule_of(plan).down())
    for round, adapter in enumerate(publish(plan, [move] * 4, earlier), 1):
        check_published(plan, adapter.part(sent), round=round, first=earlier)
    if size == 3.0 and SERVERS[pair[1]].get("name") != "fedadam":
        with raising(PlanRefused, code="impossible-adapter"):
            check_published(plan, earlier.part(sent), round=2)


@pytest.mark.attack(
    "C11",
    "the server publishes B times c with A through c, or another made-up adapter",
    stops="an adapter further from the first one than all rounds can have moved it is refused before anything is trained",
)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("c", [30.0, 1000.0, float("inf")])
def test_a_factor_that_was_scaled_up_is_refused(pair, c):
    plan = plan_of(*pair)
    if SERVERS[pair[1]].get("name") == "fedadam":
        c *= 1000  # whose steps are as large for small moves: the bound is wide
    rng = np.random.default_rng(0)
    *_, last = publish(plan, [lambda n: rng.normal(0, 0.3, n).astype(np.float32)] * 5)
    tensors = last.tensors()
    for factor in rule_of(plan).down():
        made = {n: t * np.float32(min(c, 1e30)) if n.endswith(f"lora_{factor}.weight") else t / np.float32(min(c, 1e30))
                for n, t in tensors.items()}  # fmt: skip
        sent = Adapter.of(made).part(LAYOUT.only(rule_of(plan).down()))
        with raising(PlanRefused, code="impossible-adapter"):
            check_published(plan, sent, round=6)


@pytest.mark.attack(
    "D11",
    "under fedsvd a server publishes an A of its own, outside the directions that the first A has: B is read along them",
    stops="A's rows stay within the first row space, and a site looks",
)
@pytest.mark.parametrize("inside", [0.0, 0.5, 0.999])
def test_fedsvd_takes_no_direction_that_training_cannot_give(inside):
    plan = plan_of("fedsvd", "none")
    first = first_adapter(LAYOUT, seed=plan.run.seed)
    moved = first.vector.copy()
    for pair in LAYOUT.pairs():
        a0 = first.vector[pair.a].reshape(pair.rank, -1).astype(np.float64)
        rows = np.linalg.svd(a0)[2]
        made = inside * rows[: pair.rank] + np.sqrt(1 - inside**2) * np.roll(rows, -pair.rank, axis=0)[: pair.rank]
        moved[pair.a] = made.astype(np.float32).reshape(-1)
    with raising(PlanRefused, code="impossible-adapter"):
        check_published(plan, Adapter(moved, LAYOUT), round=3)


def test_a_factor_moves_only_in_rounds_that_train_it():
    plan = plan_of("rolora", "none", schedule="constant")
    first, far = first_adapter(LAYOUT, seed=plan.run.seed), most_moved(plan, 1)
    for round, factor, rounds in ((2, "A", 0), (2, "B", 1), (3, "A", 1), (4, "A", 1), (4, "B", 2), (6, "B", 3)):
        for by, taken in ((0.999 * rounds * far, True), ((rounds + 0.02) * far, False)):
            moved = first.vector.copy()
            for pair in LAYOUT.pairs():
                moved[pair.a if factor == "A" else pair.b] += np.float32(by)
            moved = to_bfloat16(moved)
            if taken:
                check_published(plan, Adapter(moved, LAYOUT), round=round)
            else:
                with raising(PlanRefused, code="impossible-adapter"):
                    check_published(plan, Adapter(moved, LAYOUT), round=round)


@pytest.mark.attack(
    "D20",
    "early in a run of momentum a server publishes what only many rounds could give",
    stops="the bound is what the rounds so far can give, with the server's own steps on them",
)
@pytest.mark.parametrize("server", [s for s in SERVERS if "fedadam" not in s])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_no_more_is_taken_than_the_largest_rounds_so_far_can_give(server, schedule):
    plan = plan_of("ffa", server, schedule=schedule)
    sent = LAYOUT.only("B")
    for round, adapter in enumerate(publish(plan, [lambda n: np.ones(n, np.float32)] * 6), 1):
        most = adapter.part(sent)
        check_published(plan, most, round=round)
        if round > 1:
            with raising(PlanRefused, code="impossible-adapter"):
                check_published(plan, Adapter(most.vector * np.float32(1.02), sent), round=round)


@pytest.mark.attack(
    "D26",
    "a server publishes an adapter half a percent further than the rounds so far can have moved it",
    stops="each value lies between the two that the largest rounds lead to, rounded as the server rounds; float32 adds "
    "(7 n + 7) 2^-24 of the largest that could be there after n rounds",
)
@pytest.mark.parametrize("profile", ["int4", "int8", "int24"])
@pytest.mark.parametrize("server", [s for s in SERVERS if "fedadam" not in s])
@pytest.mark.parametrize("rule", ["fedavg", "ffa"])
@pytest.mark.parametrize("way", [1, -1])
def test_the_bound_on_what_is_published_is_exact(rule, server, profile, way):
    plan = plan_of(rule, server, schedule="constant", profile=profile)
    first = first_adapter(LAYOUT, seed=plan.run.seed).vector
    sent = LAYOUT.only(rule_of(plan).down())
    for rounds, adapter in enumerate(publish(plan, [lambda n: np.full(n, np.float32(way))] * 6)):
        published = adapter.part(sent)
        check_published(plan, published, round=rounds + 1)
        far = Adapter(first, LAYOUT).part(sent).vector
        largest = np.abs(published.vector - far) + np.abs(far)  # float32 is as fine as the numbers are large
        beyond = published.vector + way * np.maximum(rounds, 1) * np.float32(1.1e-6) * max(largest.max(), 1e-3)
        if profile != "int24":  # the next value that can be published at all
            beyond = to_bfloat16(published.vector * np.float32(1 + 2**-7))
        for at in (0, sent.size // 3, sent.size - 1):
            if published.vector[at] * way <= 0 and profile != "int24":
                continue
            made = published.vector.copy()
            made[at] = beyond[at]
            with raising(PlanRefused, code="impossible-adapter"):
                check_published(plan, Adapter(made, sent), round=rounds + 1)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("unit", [0, 50])
def test_the_most_that_a_round_shows_is_what_sites_at_their_limits_give(profile, unit):
    plan, layout = plan_of("fedavg", "none", unit=unit, profile=profile), Layout.of({"m.lora_B.weight": (1, 2)})
    scales, shown = scales_for(layout, PROFILES[profile], reach=reach(plan, 2)), []
    for weight in range(1, 17) if unit else [16]:
        one = encode(np.float32([9, -9]), layout, PROFILES[profile], scales, weight_fraction=weight / 16, key=bytes(32))[0]
        shown.append(sum_to_mean(one * 3, layout, PROFILES[profile], scales, weight=3 * weight / 16, most=1 << 60).max())
    assert max(shown) == pytest.approx(most_moved(plan, 2), rel=1e-7)


@pytest.mark.parametrize("server", ["fedadam", "fedadam-slow"])
def test_adam_s_first_steps_are_bounded_by_what_its_second_moment_begins_with(server):
    plan = plan_of("ffa", server)
    plan = plan.model_copy(update={"protect": secagg_plan(rounds=6, first_range=1e-5).protect})
    sent, optimizer = LAYOUT.only("B"), optimizer_of(plan)
    one = optimizer.step(Adapter(np.full(sent.size, most_moved(plan, 1), np.float32), sent), {})[0].vector.max()
    for by, taken in ((one, True), (1.02 * one, False)):
        adapter = Adapter(to_bfloat16(np.full(sent.size, by, np.float32)), sent)
        if taken:
            check_published(plan, adapter, round=2)
        else:
            with raising(PlanRefused, code="impossible-adapter"):
                check_published(plan, adapter, round=2)


@pytest.mark.attack("D11", "the same before the first decomposition", stops="until then A is the first one")
def test_fedsvd_takes_no_other_a_before_the_first_decomposition():
    plan = plan_of("fedsvd-every-2", "none")
    first = first_adapter(LAYOUT, seed=plan.run.seed)
    moved = first.vector.copy()
    for pair in LAYOUT.pairs():
        rows = np.linalg.svd(first.vector[pair.a].reshape(pair.rank, -1).astype(np.float64))[2]
        moved[pair.a] = rows[: pair.rank].astype(np.float32).reshape(-1)
    with raising(PlanRefused, code="impossible-adapter"):
        check_published(plan, Adapter(moved, LAYOUT), round=2)
    check_published(plan, Adapter(moved, LAYOUT), round=3)


@pytest.mark.parametrize(("profile", "by", "taken"), [("int24", 0.99, True), ("int24", 1.05, False), ("int8", 0.99, False)])
def test_a_small_move_of_a_large_tensor_is_bounded_too(profile, by, taken):
    """What is rounded is rounded back, because it lay on the grid; what is not, stays where it has come to."""
    made = secagg_plan(rounds=6, first_range=1e-4, profile=profile).model_dump()
    plan = Plan.model_validate(made)
    first = first_adapter(LAYOUT, seed=plan.run.seed)
    moved = first.vector.copy()
    moved[np.argmax(moved)] += np.float32(by * most_moved(plan, 1))
    if taken:
        check_published(plan, Adapter(moved, LAYOUT), round=2)
    else:
        with raising(PlanRefused, code="impossible-adapter"):
            check_published(plan, Adapter(moved, LAYOUT), round=2)


def test_under_fedsvd_no_row_of_b_goes_further_than_its_own_changes():
    plan = plan_of("fedsvd", "none", schedule="constant")
    first = first_adapter(LAYOUT, seed=plan.run.seed)
    pair = LAYOUT.pairs()[0]
    longest = max(1.0, np.linalg.norm(first.vector[pair.a].reshape(pair.rank, -1).astype(float), 2))
    most = 2 * most_moved(plan, 1) * np.sqrt(pair.rank) * longest
    for length, taken in ((0.99 * most, True), (1.02 * most, False)):
        moved = first.vector.copy()
        row = np.zeros(pair.rank, np.float32)
        row[0] = length
        moved[pair.b] = np.concatenate([row, np.zeros(moved[pair.b].size - pair.rank, np.float32)])
        if taken:
            check_published(plan, Adapter(moved, LAYOUT), round=3)
        else:
            with raising(PlanRefused, code="impossible-adapter"):
                check_published(plan, Adapter(moved, LAYOUT), round=3)


def test_in_the_first_round_only_the_first_adapter_is_taken():
    exact = plan_of("fedavg", "none", profile="int24")
    values = first_adapter(LAYOUT, seed=exact.run.seed).vector
    nearly = Adapter(np.where(values, np.nextafter(values, np.float32(1)), values), LAYOUT)  # B's zeros stay
    with raising(PlanRefused, code="impossible-adapter"):
        check_published(exact, nearly, round=1)
    plan = plan_of("fedavg", "none")
    first = first_adapter(LAYOUT, seed=plan.run.seed)
    check_published(plan, first, round=1)
    other = Adapter(first.vector + np.float32(1e-3), LAYOUT)
    with raising(PlanRefused, code="impossible-adapter"):
        check_published(plan, other, round=1)
    check_published(plan, other, round=2)


def test_the_bound_grows_with_the_rounds_by_their_reach_and_where_weights_differ_by_a_part_of_a_level():
    for unit in (0, 50):
        plan = plan_of("fedavg", "none", unit=unit)
        first = first_adapter(LAYOUT, seed=plan.run.seed).vector
        levels = 8 * 16 if unit else 127  # a sixteenth of 127 levels is eight
        for round in (2, 5, 7, 100):
            far = levels * sum(float(scale_for(PROFILES["int8"], reach=reach(plan, r))) for r in range(1, min(round, 7)))
            check_published(plan, Adapter(to_bfloat16(first + np.float32(far)), LAYOUT), round=round)
            with raising(PlanRefused, code="impossible-adapter"):
                check_published(plan, Adapter(first + np.float32(1.03 * far), LAYOUT), round=round)


def test_a_site_trains_on_nothing_that_no_sums_lead_to(tmp_path):
    """Moved by as much as two rounds can move it, and by a thousand times that."""
    start = first_adapter(toy_layout(), seed=0)
    plan = secagg_plan(first_range=1.0).pinned(base=TOY_BASE, init=start.digest())
    learner = ToyLearner(1.0)
    policy = open_policy(max_first_range=64.0)
    site = Site("a", PlainSite(), lambda plan: learner, policy, frozenset({plan.model.model_name_or_path}), Journal(tmp_path))

    def asked(by):
        moved = Adapter(start.vector + np.float32(by), start.layout)
        return site.work(Task("ab" * 32, plan.canonical(), TOY_BASE, "train", 2, 0, moved))

    with raising(PlanRefused, code="impossible-adapter"):
        asked(1000.0)
    assert learner.trained == []
    asked(0.5)
    assert learner.trained == [2]
