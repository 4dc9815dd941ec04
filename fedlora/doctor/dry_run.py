"""What would leave a site in the first round of a plan: the live code path, to the last byte, sent nowhere.

What is not live is the server, and under secure aggregation the other sites: their parts are played here, with keys that are made
for this and thrown away. Nothing of the site's own state is read or written.
"""

from __future__ import annotations

import getpass
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import Layout, Update
from fedlora.core.canonical import canonical
from fedlora.core.errors import ConfigError, FedLoRAError
from fedlora.core.events import Report
from fedlora.core.messages import SERVER, Reply, Task
from fedlora.core.plan import Dtype, Plan
from fedlora.core.sites.facts import Leaving
from fedlora.core.tables.audit import audited
from fedlora.doctor.canaries import LEAST_BYTES, holds_any
from fedlora.doctor.masked import MakeSite, masked_parts, play
from fedlora.doctor.rows import read_rows
from fedlora.formats.envelope import Header, open_envelope, parse
from fedlora.formats.keys import Identity
from fedlora.formats.state.memory import FileMemory
from fedlora.formats.update import values_size
from fedlora.protect.link import ServerLink, pinned
from fedlora.protect.sealed import SealedServer
from fedlora.rounds.checkpoint import Checkpoint
from fedlora.rounds.loop import task_of
from fedlora.rules import rule_of
from fedlora.site.admission import Approvals
from fedlora.site.first import Firsts
from fedlora.site.parts import load_site_key, site_of
from fedlora.site.site_file import SiteFile, load_site_file
from fedlora.site.work import Learner, Site

Entropy = Callable[[int], bytes]
_SHORTEST = 4  # bytes of a name that is looked for at all


@dataclass(frozen=True, slots=True, eq=False)
class WouldLeave:
    """What would leave.

    Attributes:
        message: its bytes.
        payload: the same before encryption.
        header: what the message says of itself in plain text, for everybody on the way.
        layout: of the update's tensors.
        contents: every field and tensor in it, with its bytes.
        others: step -> message that would leave in the same round beside it, and the same before encryption.
        stage: who was played, in words.
    """

    message: bytes
    payload: bytes
    header: Header
    layout: Layout
    contents: Sequence[Leaving]
    others: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)
    stage: str = "the server"

    def parts(self) -> list[Leaving]:
        """Every field and tensor with its bytes. Law: together they are the message."""
        head = [
            Leaving(name=f"header.{name}", what=str(value), size_bytes=len(canonical(value)))
            for name, value in self.header.fields().items()
        ]
        parts = [*head, *self.contents]
        rest = len(self.message) - sum(part["size_bytes"] for part in parts)
        return [*parts, Leaving(name="encryption, signature, names of fields", what="", size_bytes=rest)]

    def everything(self) -> bytes:
        """All that would leave, before and after encryption."""
        return self.payload + self.message + b"".join(part for both in self.others.values() for part in both)

    def in_fields(self) -> bytes:
        """What would leave, without values and what they are encrypted to: headers and numbers, and the other messages before
        encryption."""
        tensors = {name for name, _, _ in self.layout.slices()}
        values_bytes = sum(part["size_bytes"] for part in self.contents if part["name"] in tensors)
        parts = [self.payload[: max(len(self.payload) - values_bytes, 0)], canonical(self.header.fields())]
        for message, payload in self.others.values():
            parts += [canonical(parse(message, max_bytes=len(message)).header.fields()), payload]
        return b"\0".join(parts)


def _contents(update: Update, layout: Layout, dtype: Dtype) -> list[Leaving]:
    """Of an update that leaves as it is."""
    numbers = {"weight": update.weight, **update.counters}
    counts = [Leaving(name=name, what=str(n), size_bytes=len(canonical(n))) for name, n in numbers.items()]
    tensors = []
    for name, _, shape in layout.slices():
        one = Layout(((name, shape),))
        size_bytes = values_size(dtype, n=one.size, rows=one.rows())
        tensors.append(Leaving(name=name, what=f"{' x '.join(map(str, shape))} of {dtype}", size_bytes=size_bytes))
    return [*counts, *tensors]


@dataclass(slots=True)
class _Taken:
    """A tally of one update."""

    update: Update | None = None
    error: FedLoRAError | None = None

    def accept(self, site: str, update: Update) -> None:
        self.update = update

    def accept_sum(self, sites: Sequence[str], update: Update, *, squares: NDArray[np.float64], counted: int) -> None:
        self.update = update

    def reject(self, site: str, error: FedLoRAError) -> None:
        self.error = error

    def void(self, error: FedLoRAError) -> None:
        self.error = error


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Who plays, and with which chance: for a test, what a live run had.

    Attributes:
        server: stands for the server's keys.
        reply: stands for the run's key.
        run: its id, 64 hex digits.
        clock: seconds since 1970.
        entropy: n random bytes, for the site.
    """

    server: Identity = field(default_factory=lambda: Identity.generate(SERVER))
    reply: Identity = field(default_factory=lambda: Identity.generate(SERVER))
    run: str = field(default_factory=lambda: os.urandom(32).hex())
    clock: Callable[[], float] = time.time
    entropy: Entropy = os.urandom


def dry_run(site_file: Path, plan: Plan, *, report: Report) -> WouldLeave:
    """Trains the first round on this site's rows, and builds the message that would leave.

    Raises:
        PlanRefused: this site's policy would not let anything leave.
        ConfigError: the plan is not pinned, or its mode is one that no single site can play.
        FedLoRAError: what a round of training raises.
    """
    from fedlora.learn.local import LocalLearners

    file, root = load_site_file(site_file), site_file.resolve().parent
    with tempfile.TemporaryDirectory(prefix="fedlora-dry-run-") as scratch:
        learner = LocalLearners(site_file, Path(scratch) / "team", report)(plan)
        firsts = Firsts(root / file.state, file.agreed.init)
        key = load_site_key(file, root)
        return played(key, file, plan, learner, state=Path(scratch), report=report, stage=Stage(), firsts=firsts)


def played(
    identity: Identity,
    file: SiteFile,
    plan: Plan,
    learner: Learner,
    *,
    state: Path,
    report: Report,
    stage: Stage,
    firsts: Firsts | None = None,
) -> WouldLeave:
    """The first round of a plan at one site, before a server that is played.

    Args:
        state: of this play, and of no run.
        firsts: where the site has the adapters of earlier runs; None: in ``state``.

    Raises:
        ConfigError, PlanRefused, FedLoRAError: see :func:`dry_run`.
    """
    firsts = firsts or Firsts(state, file.agreed.init)
    first = Checkpoint(0, firsts.of(plan, learner.layout))
    task = task_of("train", first, plan=plan, run=stage.run, aggregator=rule_of(plan))

    def make_site(who: Identity, settings: SiteFile, make_learner: Callable[[Plan], Learner], where: Path) -> Site:
        return site_of(
            who, stage.server.public, settings, make_learner=make_learner, state=where,
            report=report if who is identity else lambda event, facts: None,
            approvals=lambda: Approvals((plan.digest(),), roster=settings.roster), clock=stage.clock, entropy=stage.entropy,
            firsts=firsts,
        )  # fmt: skip

    if plan.protect.mode == "secagg":
        return _masked(identity, file, plan, learner, task, state=state, stage=stage, make_site=make_site)
    if plan.protect.mode != "sealed":
        raise ConfigError(f"protect.mode = {plan.protect.mode!r} cannot be played", hint="a plan with 'sealed' or 'secagg'")
    site = make_site(identity, file, lambda plan: learner, state / "site")
    link = ServerLink(
        stage.server, stage.reply, {identity.name: identity.public}, pinned(stage.server.public), FileMemory(state / "server"),
        lambda: int(stage.clock()), os.urandom, audited(plan) is not None,
    )  # fmt: skip
    taken = _Taken()
    exchange = SealedServer(link, plan.wire.dtype).collect(task, [identity.name], taken)
    (request,) = next(exchange)
    message = site.protection.answer(request, site.work)
    with suppress(StopIteration):
        exchange.send(iter([Reply(identity.name, message)]))
    if taken.update is None:
        raise taken.error or ConfigError("the played server did not take the message")
    envelope = parse(message, max_bytes=len(message))
    payload = open_envelope(envelope, stage.reply)
    contents = _contents(taken.update, task.reply_layout, plan.wire.dtype)
    return WouldLeave(message, payload, envelope.header, task.reply_layout, contents)


def _masked(
    identity: Identity,
    file: SiteFile,
    plan: Plan,
    learner: Learner,
    task: Task,
    *,
    state: Path,
    stage: Stage,
    make_site: MakeSite,
) -> WouldLeave:
    taken = _Taken()
    keys = {"server": stage.server, "reply": stage.reply}
    session = play(
        identity, file, plan, learner, task, **keys, state=state, tally=taken, make_site=make_site, clock=stage.clock
    )  # fmt: skip
    if taken.update is None:
        raise taken.error or ConfigError("the played server came to no sum")
    message = session.messages["mask"]
    header = parse(message, max_bytes=len(message)).header
    others = {step: (m, session.payloads[step]) for step, m in session.messages.items() if step != "mask"}
    return WouldLeave(
        message, session.payloads["mask"], header, task.reply_layout, masked_parts(plan, task.reply_layout), others,
        f"the server and {session.others} other sites, whose updates are zero",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Searched:
    """What was looked for in what would leave.

    Attributes:
        rows: how many texts of rows.
        found: kinds of what was found.
        not_searched: what was not looked for, or not everywhere, in words.
    """

    rows: int
    found: Sequence[str]
    not_searched: Sequence[str]


def canaries(would: WouldLeave, site_file: Path) -> Searched:
    """Looks in what would leave for what must not: as it stands, before and after encryption.

    Values, masked or encrypted or not, hold any few bytes by chance: in 200 MB of them, four bytes stand in one case of twenty.
    A name of fewer than :data:`LEAST_BYTES` is looked for in the fields alone, where one could stand.
    """
    file, root = load_site_file(site_file), site_file.resolve().parent
    paths = [p for p in (file.data.paths(root), file.data.held_out_paths(root)) if p]
    texts = [turn.text for p in paths for conversation in read_rows(file, p)[0] for turn in conversation.turns]
    long = [text for text in texts if len(text.encode("utf-8", "replace")) >= LEAST_BYTES]
    stretches = {"row": long, "path": [str(root), *map(str, file.data.paths(root)), *file.models.values()]}
    words = {kind: word.encode("utf-8", "replace") for kind, word in {"host name": platform.node(), "user name": _user()}.items()}

    def found_in(everything: bytes, fields: bytes) -> list[str]:
        found = [k for k, texts in stretches.items() if holds_any(everything, texts)]
        places = {k: everything if len(word) >= LEAST_BYTES else fields for k, word in words.items()}
        return found + [k for k, word in words.items() if len(word) >= _SHORTEST and word in places[k]]

    everything, fields = would.everything(), would.in_fields()
    found = found_in(everything, fields)
    if found:  # a directory or a machine may be called as the site is, which leaves by design
        named = {file.name, *(part["name"] for part in would.contents), *map(str, would.header.fields().values())}
        found = found_in(_without(everything, named), _without(fields, named))
    return Searched(len(long), found, _not_searched(len(texts) - len(long), words))


def _not_searched(short: int, words: Mapping[str, bytes]) -> list[str]:
    few = f"fewer than {LEAST_BYTES} bytes stand there by chance"
    said = [f"{short} text{'s' * (short > 1)} of rows: {few}"] if short else []
    said += [f"{k} in values: {few}" for k, word in words.items() if _SHORTEST <= len(word) < LEAST_BYTES]
    return said + [
        f"{k}: it has fewer than {_SHORTEST} bytes, or is not known" for k, word in words.items() if len(word) < _SHORTEST
    ]


def _without(blob: bytes, names: Iterable[str]) -> bytes:
    """Without names of four characters and more, the longest first."""
    for name in sorted(names, key=len, reverse=True):
        if len(name) > 3:
            blob = blob.replace(name.encode(), b"\0")
    return blob


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
