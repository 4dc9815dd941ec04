"""Sealed mode: each update is encrypted to the aggregator's key of this run and signed by its site.

"No one but the holder of the aggregator key can read an update; nobody can forge, replay, move or truncate one unnoticed."
The key is made when the run starts and deleted when it ends: later theft of the server's keys opens nothing recorded before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fedlora.core.adapter import MAX_PARAMETERS, Update
from fedlora.core.errors import WrongContext
from fedlora.core.messages import Reply, Request, Reveals, Task
from fedlora.core.plan import Dtype, Plan, parse_plan
from fedlora.formats import update as wire
from fedlora.formats.envelope import Header, match
from fedlora.formats.keys import KEM_BYTES, PublicIdentity
from fedlora.protect import Exchange, Tally, Work
from fedlora.protect.ledger import Base, ContributionStore
from fedlora.protect.link import Context, ServerLink, SiteLink, pinned, receive, reply_bytes
from fedlora.protect.mode import Mode, ServerParts, SiteParts, check_mode

PHASES = {"train": "train", "evaluate": "global"}
"""Kind of task -> phase of the request that brings it."""


@dataclass(frozen=True, slots=True, eq=False)
class SealedServer:
    """Server half.

    Args:
        link: keys, sites, sequence numbers.
        dtype: of the updates on the wire.
    """

    link: ServerLink
    dtype: str

    @property
    def reveals(self) -> Reveals:
        return "each"

    def missing(self, task: Task, sites: Sequence[str]) -> list[str]:
        return []

    def collect(self, task: Task, sites: Sequence[str], tally: Tally) -> Exchange:
        """One exchange: the task, sealed once for all sites; the replies, opened one at a time."""
        asked = self.link.known(sites, tally)
        if not asked:
            return
        payload = wire.dump_task(task, reply_key=self.link.reply_key.public.kem)
        body = self.link.seal(Context.of(task), payload, phase=PHASES[task.kind], codec="task/1", to=asked)
        del payload
        most = reply_bytes(self._limit(task))
        replies = yield [Request(site, PHASES[task.kind], body, most) for site in asked]
        del body
        receive(replies, asked, lambda reply: tally.accept(reply.site, self._open(task, reply)), tally.reject)

    def _dtype(self, task: Task) -> str:
        return self.dtype if task.kind == "train" else "float32"

    def _limit(self, task: Task) -> int:
        """Most bytes of an update that answers this task, known from the plan's layout and dtype."""
        return wire.max_update_bytes(task.reply_layout, dtype=self._dtype(task))

    def _open(self, task: Task, reply: Reply) -> Update:
        layout, dtype = task.reply_layout, self._dtype(task)
        context = replace(Context.of(task), n_params=layout.size)
        codec, limit = f"update/1/{dtype}", self._limit(task)
        payload = self.link.open(context, reply, phase=PHASES[task.kind], codec=codec, max_payload=limit)
        return wire.parse_update(payload, layout, dtype=dtype)


@dataclass(frozen=True, slots=True, eq=False)
class SealedSite:
    """Site half.

    Args:
        link: its keys, the pinned server and the sequence numbers.
        uncovers: a plan's digest -> sites whose update it may reveal beside sums, as a person here has agreed.
    """

    link: SiteLink
    uncovers: Callable[[str], Collection[str]] = lambda plan: ()

    def answer(self, request: Request, work: Work) -> bytes:
        """As :class:`fedlora.protect.SiteProtection`.

        Raises:
            LoneChange: this site has contributed to sums on this base model; its update beside them could reveal another one.
        """
        task, down, reply_key, plan = self._open(request)
        base, dtype = Base.of(plan), plan.wire.dtype if task.kind == "train" else "float32"
        given = ContributionStore(self.link.memory, self.link.identity, self.link.entropy)
        ledger = given.load()
        ledger.check(base, None, uncovers=self.uncovers(task.plan_digest))

        def admitted() -> None:  # on the disk before the work: a code for which it fails may follow from the rows, too
            if base not in ledger.sealed:
                given.save(ledger.after_sealed(base))

        update, layout = work(task, admitted), task.reply_layout
        del task  # the adapter goes before the update is copied
        payload = wire.dump_update(update, layout, dtype=dtype)
        del update
        return self.link.seal(down, payload, codec=f"update/1/{dtype}", n_params=layout.size, to=reply_key)

    def _open(self, request: Request) -> tuple[Task, Header, PublicIdentity, Plan]:
        header, payload = self.link.open(request, codec="task/1", roster=pinned(self.link.server))
        task, key = wire.parse_task(payload, max_parameters=MAX_PARAMETERS)
        check_task(header, task, key, phase=PHASES[task.kind])
        plan = parse_plan(task.plan)
        check_mode(plan, "sealed")
        return task, header, self.link.reply_key(key), plan


class Sealed(Mode):
    """Each update is encrypted to the aggregator and signed by its site."""

    phases = work = carries = frozenset(PHASES.values())

    @classmethod
    def server(cls, parts: ServerParts) -> SealedServer:
        return SealedServer(parts.link, parts.plan.wire.dtype)

    @classmethod
    def site(cls, parts: SiteParts) -> SealedSite:
        return SealedSite(parts.link, parts.uncovers)

    @classmethod
    def down(cls, plan: Plan) -> Dtype:
        return plan.wire.dtype

    @classmethod
    def words(cls, plan: Plan, said: Mapping[str, str]) -> dict[str, str]:
        few = "two sites in a round" if plan.federation.min_sites <= 2 else "few sites in a round"
        return {
            "who reads this site's update": "the aggregator. On the way nobody can read, change or replay it. Other sites see "
            f"what is published: with {few}, or a rule that keeps few updates, one of them can compute another's"
        }


def check_task(header: Header, task: Task, key: bytes, *, phase: str) -> None:
    """Checks that a task, the header that brought it and its phase agree.

    Raises:
        WrongContext: they differ; the code says in which field.
    """
    match(header, phase=phase, **Context.of(task).fields())
    if len(key) != KEM_BYTES:
        raise WrongContext("the reply key has a wrong length")
