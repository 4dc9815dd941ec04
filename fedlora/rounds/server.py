"""The server's half of one run: creates it, builds its parts, deletes its key at the end."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError, FedLoRAError, KeyFileError, StoreError
from fedlora.core.events import Event, Report
from fedlora.core.facts import StateFile
from fedlora.core.messages import SERVER
from fedlora.core.plan import Plan
from fedlora.core.tables.audit import audited
from fedlora.formats.files import copy_of, set_aside, unfinished, write_atomic
from fedlora.formats.keys import Identity, PublicIdentity, load_identity, load_public
from fedlora.formats.published.records import Prompt
from fedlora.formats.trust import rosters_in
from fedlora.protect.link import ServerLink, pinned
from fedlora.protect.mode import ServerParts
from fedlora.protect.modes import mode_of
from fedlora.rounds.checkpoint import Checkpoint
from fedlora.rounds.loop import run as run_rounds
from fedlora.rounds.patience import Wait
from fedlora.rounds.store import RunStore
from fedlora.rounds.transport import Transport
from fedlora.rules import rule_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ServerRun:
    """A run with its parts, for a deployment or a simulation.

    Attributes:
        store: the run's directory.
        identity: the server's keys.
        sites: the enrolled sites, by name.
        roster: file with the signed roster, for secure aggregation; it may be replaced by the next epoch during the run.
        report: gets the run's events.
    """

    store: RunStore
    identity: Identity
    sites: Mapping[str, PublicIdentity]
    roster: Path
    report: Report

    def run(
        self,
        transport: Transport,
        *,
        between: Callable[[int, int], None] = lambda done, rounds: None,
        wait: Wait | None = None,
    ) -> Checkpoint:
        """Runs the remaining rounds.

        The run's key is made when the run starts and deleted when it ends: server keys stolen later cannot open updates that were
        recorded during the run.

        Args:
            between: called before each round; see :func:`fedlora.rounds.loop.run`, as for ``wait``.

        Raises:
            ConfigError: fewer sites are enrolled than a round needs, or lora.ranks names another one.
            StoreError, RosterInvalid, RosterExpired: there is no valid roster.
            RunFailed (quorum): see :func:`fedlora.rounds.loop.run`.
        """
        store, plan = self.store, self.store.plan
        _check_sites(plan, self.sites)
        _check_numbers(store)
        link = ServerLink(
            identity=self.identity,
            reply_key=_run_key(store, self.report),
            sites=self.sites,
            roster=pinned(self.identity.public),
            memory=store.memory,
            clock=lambda: int(time.time()),
            entropy=os.urandom,
            audited=audited(plan) is not None,
        )
        parts = ServerParts(
            plan, link, store.memory, lambda: rosters_in(self.roster, store.memory, self.identity.public), self.report
        )
        last = run_rounds(
            plan,
            store=store,
            aggregator=rule_of(plan),
            protection=mode_of(plan).server(parts),
            transport=transport,
            enrolled=self.sites.keys(),
            report=self.report,
            between=between,
            wait=wait,
        )
        _delete_run_key(store.directory)
        return last


def start_run(directory: Path, plan: Plan, first: Adapter, *, run: str = "", prompt: Prompt | None = None) -> RunStore:
    """A new run in ``directory``.

    Args:
        run: 64 hex digits; empty: random.
        prompt: how its adapters are asked; what is not of this plan is left out.

    Raises:
        ConfigError: the plan is not pinned, or ``first`` is not the adapter that it pins.
        StoreError: the directory holds a run.
    """
    if not plan.is_pinned:
        raise ConfigError(
            "the plan does not pin both the base and the first adapter",
            hint="make the pinned plan and the adapter with `fedlora pin`",
        )
    if first.digest() != plan.lora.init_digest:
        raise ConfigError(
            "this is not the first adapter that the plan pins", hint="use the one that `fedlora pin` wrote together with the plan"
        )
    if prompt is not None and (prompt.kind, prompt.max_length) != (plan.training.prompt, plan.training.max_length):
        prompt = None  # the plan was changed after `fedlora pin`
    return RunStore.create(directory, plan, first, run=run or secrets.token_hex(32), prompt=prompt)


def load_server_key(home: Path) -> Identity:
    """The server's private key.

    Raises:
        KeyFileError: missing, malformed, or it does not belong to ``server.pub`` beside it.
    """
    identity, public = load_identity(home / "server.key"), home / "server.pub"
    if identity.name != SERVER or (public.exists() and load_public(public) != identity.public):
        raise KeyFileError(
            f"{home / 'server.key'} is not the key whose public half is {public}",
            hint="restore it from a backup: sites pin that key",
        )
    return identity


def _check_sites(plan: Plan, sites: Mapping[str, PublicIdentity]) -> None:
    if len(sites) < plan.federation.min_sites:
        raise ConfigError(
            f"{len(sites)} sites are enrolled, the plan's federation.min_sites is {plan.federation.min_sites}",
            hint="enrol more sites, or make a plan that needs fewer",
        )
    if strangers := sorted(plan.lora.ranks.keys() - sites.keys()):
        raise ConfigError(
            f"lora.ranks names {', '.join(strangers)}, not enrolled here", hint="correct the name, or enrol the site"
        )


def _check_numbers(store: RunStore) -> None:
    """Refuses to run with lost sequence numbers: sites reject every message with a number that they have seen.

    Raises:
        StoreError: the numbers are missing, although rounds were done.
    """
    if store.begun and not (store.directory / "final.json").exists() and store.memory.get(f"{store.run}/down") is None:
        raise StoreError(
            f"the numbers of this server's messages are gone from {store.memory.directory}, though rounds are done: "
            "every site would reject its messages as replays",
            hint=f"run `{store.repair} --raise-numbers`, which numbers them above all that sites have seen; then resume the run",
        )


_RUN_KEY = "run-key"
"""Key of the public half of the run's key in the server's memory."""


def _public(identity: Identity) -> bytes:
    return identity.signing.public_key().public_bytes_raw()


def _run_key_files(directory: Path) -> tuple[Path, Path]:
    return directory / "run.key", copy_of(directory / "run.key")


def _delete_run_key(directory: Path) -> None:
    for file in (path for key in _run_key_files(directory) for path in (key, unfinished(key))):
        if file.is_dir():
            set_aside(file)
        file.unlink(missing_ok=True)


def delete_old_keys(runs: Path) -> None:
    """Deletes the keys of runs that are done: one that was killed after its last record has left its own.

    Args:
        runs: ``HOME/runs``.
    """
    for directory in sorted(runs.glob("*")):
        complete = False
        with suppress(FedLoRAError, OSError):  # no run, or one that cannot be read: nobody can say that it is done
            complete = RunStore.open(directory).complete
        try:
            if complete:
                _delete_run_key(directory)
        except (FedLoRAError, OSError) as e:  # no reason for a server not to begin
            log.warning("%s: the key of this run, which is done, cannot be deleted; do it by hand: %s", directory, e)


def _run_key(store: RunStore, report: Report) -> Identity:
    """The run's key. A new one is made only if both of its files are missing or damaged, or are another key."""
    directory, known, found = store.directory, store.memory.get(_RUN_KEY), []
    for file in _run_key_files(directory):
        if file.is_dir():
            set_aside(file)
        with suppress(KeyFileError):
            one = load_identity(file)
            if one.name == "run" and known in (None, _public(one)):
                found.append((file, one))
    damaged = [f for f in _run_key_files(directory) if f.exists() and f not in [file for file, _ in found]]
    if not found:
        for file in damaged:
            file.unlink()
        new = directory / "run.new"
        new.unlink(missing_ok=True)  # left by an interrupted start
        Identity.generate("run").save(new)
        os.replace(new, directory / "run.key")
        found.append((directory / "run.key", load_identity(directory / "run.key")))
    store.memory.put(_RUN_KEY, _public(found[0][1]))
    for file in damaged:
        report(Event.MENDED, StateFile(file=file.name))
    for file in _run_key_files(directory):
        if file != found[0][0]:
            write_atomic(file, found[0][0].read_bytes())
    return found[0][1]
