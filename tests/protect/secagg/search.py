"""A search over what a server may do: hypothesis chooses moves, and after each what could be computed is held to the promises.

Moves are those of :class:`protect.secagg.liar.Liar`. That one was refused is no finding and no comfort: only what was opened is
looked at. ``FEDLORA_SEARCH`` sets the number of sequences, for a long search, which then also looks for the shortest one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Final
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from protect.secagg.liar import Liar, a_plan
from protect.secagg.loot import Session, both_kinds, evaluated, false_parts, twice_given, unannounced, uncovered
from protect.secagg.world import identity, names

from fedlora.core.adapter import Adapter
from fedlora.core.plan import Evaluation, Plan
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.protocol.dealing import BUNDLE_BYTES, Dealt, Secrets, deal
from fedlora.protect.secagg.protocol.opening import Deal
from fedlora.site.policy import Policy

PLAN: Final = a_plan(lone_change="refuse")
PLANS: Final[Sequence[Plan]] = (
    PLAN,
    a_plan(seed=1, lone_change="refuse"),
    a_plan(lone_change="refuse", rounds=4),
    a_plan(lone_change="allow", first_range=2.0),
    PLAN.model_copy(update={"evaluation": Evaluation(share=("eval/nll",))}),
    PLAN.model_copy(update={"protect": type(PLAN.protect)()}),  # sealed
)
SHARES: Final = ("train/loss", "eval/nll", "eval/tokens")


class Uncovered(AssertionError):
    """Something could be computed that was promised to stay hidden."""


# --- promises ---------------------------------------------------------------------------------------------------------


def alone(a: Liar) -> object:
    """Within a session no site's update is a combination of what was opened, whoever of the others colludes, up to the bound."""
    coalition = a.max_colluding - len(a.colluders)
    return [u for s in a.sessions if (u := uncovered((x.sites for x in s.sums()), coalition=coalition))]


def linear(a: Liar) -> object:
    """The same over all sums of one base that were ever opened, whatever the run, round and plan."""
    coalition = a.max_colluding - len(a.colluders)
    kinds = ("train", "evaluate")
    rows = {k: [x.sites for s in a.sessions for x in s.sums() if s.talk.task.kind == k] for k in kinds}
    return [u for k in kinds if (u := uncovered(rows[k], coalition=coalition))]


def evaluations(a: Liar) -> object:
    """No evaluation is opened that fewer sites are in than the bound of colluders and two; colluders count for nothing. Nor is
    one site's a combination of several, over all sums of one base."""
    coalition = a.max_colluding - len(a.colluders)
    rows = [(s.talk.task.kind, evaluated(one)) for s in a.sessions for one in s.sums()]
    few = [found for _, found in rows if 0 < len(found) < a.max_colluding + 2 - len(a.colluders)]
    kinds = ("train", "evaluate")
    return few + [u for k in kinds if (u := uncovered((r for kind, r in rows if kind == k and r), coalition=coalition))]


PROMISES: Final[Mapping[str, Callable[[Liar], object]]] = {
    "alone": alone,
    "linear": linear,
    "twice": lambda a: twice_given(a.sessions),
    "seeds": lambda a: both_kinds(a.sessions),
    "numbers": lambda a: unannounced(a.sessions),
    "parts": lambda a: false_parts(a.sessions),
    "sealed": lambda a: [site for site, *_ in a.single],
    "evaluations": evaluations,
}

# --- moves ------------------------------------------------------------------------------------------------------------

WHO = st.sampled_from(
    (
        *(255,) * 30,
        *(255 ^ 1 << i for i in range(8)),
        *((1 << to) - (1 << of) for to in range(9) for of in range(to)),
        *range(1, 32, 5),
    )
)
"""A set of sites, by eight bits: all, all but one, neighbors, any."""
MOST = st.sampled_from((*(255,) * 6, *(255 ^ 1 << i for i in range(8)), 7, 31, 248))
"""All or most of them."""
TASKS = st.fixed_dictionaries(
    {
        "run": st.integers(0, 2),
        "plan": st.sampled_from((0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5)),
        "round": st.sampled_from((1, 1, 2, 3)),
        "attempt": st.integers(0, 1),
        "kind": st.sampled_from(("train",) * 6 + ("evaluate",)),
        "adapter": st.integers(0, 2),
    }
)
STEPS = st.sampled_from(("share", "mask", "commit", "abort", "unmask"))
AT = st.sampled_from((0, 0, 0, 0, 0, 1, 2, 3))
"""One of the last sessions, mostly one that goes on."""

DIES = st.sampled_from((-1, -1, -1, -1, -1, -1, 0, 1, 2, 3))
"""A site is killed when so many more files were written; -1: not."""


def mixed(true: Dealt, false: Dealt, what: str) -> Dealt:
    """A deal with the server's own shares or ingredient, and the dealer's signature."""
    if what == "shares":
        commitments = (*false.commitments[:2], true.commitments[2])
        return replace(true, sealed=false.sealed[:BUNDLE_BYTES] + true.sealed[BUNDLE_BYTES:], commitments=commitments)
    commitments = (*true.commitments[:2], false.commitments[2])
    return replace(true, sealed=true.sealed[:BUNDLE_BYTES] + false.sealed[BUNDLE_BYTES:], commitments=commitments)


def move(name: str) -> Callable[..., Any]:
    """A rule that is chosen where :attr:`Search.only` does not leave it out; single updates only where they are looked at."""
    return precondition(lambda self: name in (self.only or (name,)) and (name != "single_update" or "sealed" in self.promises))


def inside(name: str) -> Callable[..., Any]:
    """The same, for moves within a session."""
    return precondition(lambda self: self.within and name in (self.only or (name,)))


class Search(RuleBasedStateMachine):
    """A federation under one server for some dozen moves.

    Attributes:
        promises: names of what is looked at.
        policy: of every operator.
        sizes: of the federation.
        within: whether the moves are mostly within a session, or sessions are mostly whole and it is their sums that matter.
        only: names of the moves that may be chosen; empty: all.
    """

    promises: ClassVar[Sequence[str]] = tuple(PROMISES)
    policy: ClassVar[Mapping[str, Any]] = {}
    sizes: ClassVar[Sequence[int]] = (4, 3, 5)
    within: ClassVar[bool] = True
    only: ClassVar[Sequence[str]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.liar: Liar | None = None
        self.held_out: Mapping[str, int] = {}

    @initialize(size=st.integers(0, 2), colluding=st.booleans(), shares=st.booleans(), small=st.sampled_from((0, 0, *range(32))))
    def begin(self, size: int, colluding: bool, shares: bool, small: int) -> None:
        n = self.sizes[size]
        few = Policy(share=("train/loss",), **self.policy)
        self.held_out = {s: 5 for i, s in enumerate(names(n)) if small >> i & 1}
        policies = {s: few if shares and s != "site-1" else Policy(**self.policy) for s in names(n)}
        if not self._begin(n, [f"site-{n}"] if colluding else [], policies):  # no sum with metrics of few sites: as it should be
            assert self._begin(n, [f"site-{n}"] if colluding else [], {s: Policy(**self.policy) for s in names(n)})

    def _begin(self, n: int, colluders: Sequence[str], policies: Mapping[str, Policy]) -> bool:
        self.teardown()
        approved = [p for p in PLANS if p.protect.mode == "secagg" for _ in range(8)]
        self.liar = Liar(n, colluders=colluders, plan=PLAN, policies=policies, approved=approved, held_out=self.held_out)
        session = self.liar.cohort(self.liar.offer(self.liar.task(), names(n)))
        if session is not None and self.within:
            self.liar.share(session)
        elif session is not None:
            self.liar.finish(session)
        return session is not None

    def teardown(self) -> None:
        if self.liar is not None:
            self.liar.close()

    # --- what rules say in numbers ------------------------------------------------------------------------------

    @property
    def a(self) -> Liar:
        assert self.liar is not None
        return self.liar

    def sites(self, who: int) -> list[str]:
        found = [s for i, s in enumerate(names(self.a.n)) if who >> (8 * i // self.a.n) & 1]
        return found or names(1)

    def adapter(self, which: int) -> Adapter:
        """The first one; what its change would make of it; the same in other factors."""
        first, mean = self.a.first, np.mean([h.pupil.delta for h in self.a.hospitals.values()], axis=0)
        moved = Adapter((first.vector + mean).astype(np.float32), first.layout)
        if which == 2:
            return Adapter.of({n: (t * 64 if "lora_B" in n else t / 64).astype(np.float32) for n, t in moved.tensors().items()})
        return (first, moved)[which]

    def work(self, task: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        plan, adapter = PLANS[task["plan"]], self.adapter(task["adapter"]) if task["round"] > 1 else None
        facts = {k: task[k] for k in ("run", "round", "attempt", "kind")}
        return self.a.task(plan=plan, adapter=adapter, **facts), {"plan": plan}

    def session(self, at: int) -> Session:
        """One that goes on; a fresh one in another run if there is none; now and then any that there was."""
        every = self.a.sessions
        going = [s for s in every if not s.revealed and len(s.deals) > 2]
        chosen = every if at == 2 else going
        if not chosen:
            fresh = self.a.cohort(self.a.offer(self.a.task(run=64 + len(every)), names(self.a.n)))
            if fresh is None:
                return every[-1]
            self.a.share(fresh)
            return fresh
        return chosen[-1 - at % len(chosen)]

    # --- rules --------------------------------------------------------------------------------------------------

    @move("whole_session")
    @rule(task=TASKS, who=WHO, present=WHO)
    def whole_session(self, task: Mapping[str, Any], who: int, present: int) -> None:
        work, offer = self.work(task)
        self.a.whole(work, self.sites(who), present=self.sites(present), **offer)
        self.check()

    @inside("offer")
    @rule(task=TASKS, who=WHO, dies=DIES)
    def offer(self, task: Mapping[str, Any], who: int, dies: int) -> None:
        work, offer = self.work(task)
        talk = self.a.offer(work, self.sites(who), dies=dies, **offer)
        session = self.a.cohort(talk)
        if session is not None:
            self.a.share(session)

    @inside("other_cohort")
    @rule(at=AT, who=WHO, forged=st.integers(0, 31))
    def other_cohort(self, at: int, who: int, forged: int) -> None:
        """Another set of sites from the same offer; in the names of some the server advertises itself."""
        talk = self.session(at).talk
        talk = replace(talk, adverts=dict(talk.adverts), roots=dict(talk.roots))
        for site in self.sites(forged) if forged else ():
            self.a.impersonate(talk, site)
        session = self.a.cohort(talk, self.sites(who))
        if session is not None:
            self.a.share(session)

    @inside("step")
    @rule(at=AT, step=STEPS, who=WHO, listed=WHO, dies=DIES)
    def step(self, at: int, step: str, who: int, listed: int, dies: int) -> None:
        """One step to some sites: with these dealers, on these deliveries, with a kill after so many writes."""
        session, sites = self.session(at), self.sites(who)
        chosen = self.a.listed(session, self.sites(listed))
        if step == "share":
            self.a.share(session, sites, dies=dies)
        elif step == "mask":
            numbers = {session.cohort.number(s) for s in self.sites(listed) if s in session.cohort.names}
            self.a.mask(session, sites, deals={n: d for n, d in session.deals.items() if n in numbers}, dies=dies)
        elif step == "commit":
            self.a.commit(session, sites, chosen)
        elif step == "abort":
            self.a.abort(session, sites)
        else:
            self.a.unmask(session, sites, chosen, dies=dies)
        self.check()

    @inside("two_views")
    @rule(at=AT, who=st.integers(1, 254), first=MOST, second=MOST)
    def two_views(self, at: int, who: int, first: int, second: int) -> None:
        """Some sites are shown one set of deliveries, the others another; all are then asked for their shares."""
        session = self.session(at)
        self.a.share(session)
        self.a.mask(session)
        views = [
            (self.sites(who), self.sites(first)),
            ([s for s in names(self.a.n) if s not in self.sites(who)], self.sites(second)),
        ]
        for ask in (self.a.commit, self.a.unmask):
            for sites, listed in views:
                if sites:
                    ask(session, sites, self.a.listed(session, listed))
        self.check()

    @inside("two_votes")
    @rule(at=AT, who=MOST, first=WHO, second=MOST)
    def two_votes(self, at: int, who: int, first: int, second: int) -> None:
        """The same sites are asked to agree to a set and for their shares, and then to another."""
        session = self.session(at)
        self.a.share(session)
        self.a.mask(session)
        for listed in (first, second):
            chosen = self.a.listed(session, self.sites(listed))
            self.a.commit(session, self.sites(who), chosen)
            self.a.unmask(session, self.sites(who), chosen)
        self.check()

    @inside("two_relays")
    @rule(at=AT, who=WHO, first=WHO, second=WHO)
    def two_relays(self, at: int, who: int, first: int, second: int) -> None:
        """The same sites are asked for masked updates on the deals of some, and then on those of others."""
        session = self.session(at)
        self.a.share(session)
        for dealers in (first, second):
            numbers = {session.cohort.number(s) for s in self.sites(dealers) if s in session.cohort.names}
            self.a.mask(session, self.sites(who), deals={n: d for n, d in session.deals.items() if n in numbers})
        self.check()

    @move("again")
    @rule(
        at=AT,
        aborted=st.sampled_from((0, 0, 255, 255, 127, 31)),
        what=st.sampled_from(("run", "round", "attempt")),
        who=WHO,
        present=MOST,
    )
    def again(self, at: int, aborted: int, what: str, who: int, present: int) -> None:
        """The same work once more, in another run, round or attempt, with other sites; before that, some are asked for ABORT."""
        session = self.a.sessions[-1 - at % len(self.a.sessions)]
        if aborted:
            self.a.abort(session, self.sites(aborted))
        talk = session.talk
        facts = {
            "run": f"{int(talk.task.run[:2], 16) + 1:02x}" * 32,
            "round": talk.task.round + 1,
            "attempt": talk.task.attempt + 1,
        }
        task = replace(talk.task, **{what: facts[what]})
        self.a.whole(task, self.sites(who), present=self.sites(present), plan=talk.plan)
        self.check()

    @inside("swapped_deal")
    @rule(at=AT, dealer=st.integers(1, 5), other=AT, holders=WHO, what=st.sampled_from(("deal", "shares", "ingredient", "other")))
    def swapped_deal(self, at: int, dealer: int, other: int, holders: int, what: str) -> None:
        """Relays in a dealer's name what the server has made itself, or what was dealt elsewhere."""
        session = self.session(at)
        if dealer > len(session.cohort.adverts) or dealer not in session.deals:
            return
        true, secrets = session.deals[dealer], Secrets(os.urandom(32))
        false = Deal.parse(session.cohort, dealer, deal(session.cohort, dealer, secrets, key=identity("server").signing))
        if what == "other":
            false = self.session(other).deals.get(dealer, true)
            if false.dealt.keys() != true.dealt.keys():
                return
        else:
            for holder, one in false.dealt.items():
                session.own[one.sealed[BUNDLE_BYTES:]] = secrets.mask_keys.ingredient(
                    session.cohort, dealer=dealer, holder=holder
                )
            session.own.pop(b"", None)
        if what in ("shares", "ingredient"):
            false = replace(true, dealt={h: mixed(true.dealt[h], one, what) for h, one in false.dealt.items()})
        self.a.mask(session, self.sites(holders), deals={**session.deals, dealer: false})
        self.check()

    @inside("complaints")
    @rule(at=AT, dealers=WHO, holders=WHO)
    def complaints(self, at: int, dealers: int, holders: int) -> None:
        """Dealers are asked to show what they have dealt to some sites, in whose names is complained."""
        session = self.session(at)
        self.a.share(session)
        self.a.complain(session, self.sites(dealers), self.sites(holders))
        self.check()

    @move("single_update")
    @rule(task=TASKS, who=WHO)
    def single_update(self, task: Mapping[str, Any], who: int) -> None:
        self.a.sealed(self.work(task)[0], self.sites(who))
        self.check()

    @move("restart")
    @rule(who=WHO)
    def restart(self, who: int) -> None:
        for site in self.sites(who):
            if site in self.a.hospitals:
                self.a.hospitals[site].restart()

    @move("replay")
    @rule(index=st.integers(0, 200))
    def replay(self, index: int) -> None:
        self.a.replay(-1 - index)

    # --- the oracle ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        for name in self.promises:
            if found := PROMISES[name](self.a):
                raise Uncovered(f"{name}: {found}")


def search(*promises: str, examples: int = 30, steps: int = 12, **machine: Any) -> None:
    """Looks for a sequence of moves that breaks one of these promises.

    Args:
        machine: attributes of :class:`Search`.

    Raises:
        Uncovered: found.
    """
    long = int(os.environ.get("FEDLORA_SEARCH", "0"))
    profile = settings(
        max_examples=long or examples,
        stateful_step_count=3 * steps if long else steps,
        derandomize=not long,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if long else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    with patch.object(PublicIdentity, "kem_key", lambda self: _sound(self)):
        run_state_machine_as_test(type("Search", (Search,), {"promises": promises, **machine}), settings=profile)  # type: ignore[no-untyped-call]


_sound = lru_cache(maxsize=1 << 14)(PublicIdentity.kem_key)
"""A key that was sound once is sound: a third of the time goes into that."""
