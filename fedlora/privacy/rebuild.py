"""A privacy ledger whose lines are damaged or gone: what they can have held, and a new file in its place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.core.errors import ConfigError, FedLoRAError, StoreError
from fedlora.formats.files import flush_directory, named_disk_errors, read_file, unfinished, write_atomic
from fedlora.formats.keys import Identity
from fedlora.formats.state.budget import Begun, Charged, Event, Line, Lost, Reserved, facts_of, parse_line
from fedlora.formats.state.chain import NONE, Chain
from fedlora.formats.state.memory import DictMemory, get_record, put_record
from fedlora.privacy.account import merged


def as_lost(chain: Chain, identity: Identity, also: Sequence[Event]) -> tuple[Begun | None, tuple[Event, ...]]:
    """The first line, if it is whole, and all that the ledger can have counted or set aside.

    Each line that is signed counts as it stands. Each that is not, or is missing, counts as the costliest release that any other
    line or ``also`` names: least noise, highest rate, most steps.

    Raises:
        ConfigError: lines are lost, and nothing names a release.
    """
    whole, missing = _whole_lines(chain, identity)
    charged = [line.event for line in whole if isinstance(line, Charged)]
    lost = [event for line in whole if isinstance(line, Lost) for event in line.events]
    reserved = {line.run: line.events for line in whole if isinstance(line, Reserved)}  # closed or not: a line may be lost
    aside = [event for events in reserved.values() for event in events]
    known = [*charged, *aside, *also]
    if missing and not known:
        raise unestimated(f"{missing} lines")
    guess = [_costliest(known, [*charged, *also], missing)] if missing else []
    begun = next((line for line in whole if isinstance(line, Begun)), None)
    return begun, merged([*charged, *lost, *aside, *also, *guess])


def unestimated(lines: str) -> ConfigError:
    """Lines are lost, and counting nothing for them would take the releases back."""
    return ConfigError(
        f"{lines} of the privacy ledger are lost, and nothing says what a release was",
        hint="name the plans that this site took part in with --plan",
    )


def _costliest(known: Sequence[Event], single: Sequence[Event], missing: int) -> Event:
    most = max((event.count for event in single), default=max(event.count for event in known))
    return known[0].model_copy(
        update={
            "noise_multiplier": min(event.noise_multiplier for event in known),
            "sampling_rate": max(event.sampling_rate for event in known),
            "honest_sites": max(event.honest_sites for event in known),
            "failure": max(event.failure for event in known),
            "count": missing * most,
        }
    )


def _whole_lines(chain: Chain, identity: Identity) -> tuple[list[Line], int]:
    """The lines that this site has signed, each once, and the number of those that are not there."""
    found, _ = Chain(chain.file, DictMemory(), chain.kind, chain.owner).read(identity.public)
    lines: dict[int, Line] = {}
    for facts in found:
        number = facts.pop("number")
        try:
            lines[number] = parse_line(facts, str(chain.file))
        except FedLoRAError:
            continue  # it counts among those that are not there
    try:
        last = chain.known()[0]
    except StoreError:
        last = 0
    return list(lines.values()), max([last, len(chain.digests()), *lines]) - len(lines)


def replace_chain(chain: Chain, identity: Identity, lines: Sequence[Line]) -> None:
    """Puts a new chain of these lines in the place of another, whose file is kept beside it.

    Killed anywhere, the ledger is still refused, or is the new one; the call may be repeated.
    """
    new, memory = unfinished(chain.file), DictMemory()
    new.unlink(missing_ok=True)
    fresh = Chain(new, memory, chain.kind, chain.owner)
    for line in lines:
        fresh.add(facts_of(line), identity)
    end = dict(zip(("number", "digest"), fresh.known(), strict=True))
    put_record(chain.memory, _replaces(chain), chain.kind, end)
    old = read_file(chain.file)
    if old is not None:
        write_atomic(_free(chain), old)
    with named_disk_errors(chain.file):
        os.replace(new, chain.file)
        flush_directory(chain.file.parent)
    _end_with(chain, end)


def finish_replacing(chain: Chain) -> bool:
    """Whether a new chain stands in its place already and only the memory did not know it: it does now."""
    try:
        end = get_record(chain.memory, _replaces(chain), chain.kind)
    except StoreError:
        return False
    if not end or end["digest"] != (chain.digests() or [NONE])[-1]:
        return False
    _end_with(chain, end)
    return True


def _end_with(chain: Chain, end: Mapping[str, Any]) -> None:
    put_record(chain.memory, chain.kind, chain.kind, end)
    put_record(chain.memory, _replaces(chain), chain.kind, {"number": 0, "digest": ""})


def _replaces(chain: Chain) -> str:
    """Key of the end of a chain that is about to take the place of another."""
    return f"{chain.kind}/replaces"


def _free(chain: Chain) -> Path:
    number = 1
    while (path := chain.file.with_suffix(f".damaged-{number}")).exists():
        number += 1
    return path
