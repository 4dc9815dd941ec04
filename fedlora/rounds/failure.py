"""Why a run ended without enough sites, and what somebody can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedlora.core.errors import RunFailed, StateLost
from fedlora.core.messages import Task
from fedlora.core.plan import Federation
from fedlora.core.records import RoundRecord
from fedlora.core.sites.cures import CURES

_GOES_ON: Final = ("late", "node-unavailable", "offline", "not-drawn", "quorum")
"""What is over when the site is back: nothing else has to be done."""


@dataclass(frozen=True, slots=True)
class _Cause:
    """A cause of a failed round: all sites answer with one of ``codes``."""

    codes: frozenset[str]
    meaning: str
    hint: str


_CAUSES: Final = (
    _Cause(
        frozenset({"replayed", "equivocation"}),
        "every site that was asked has seen later messages of this server: the server's numbers are those of an old backup",
        "stop the server, run `fedlora server repair HOME RUN --raise-numbers`, then resume the run",
    ),
    _Cause(
        frozenset({StateLost.code, "wrong-round"}),
        "every site that was asked has done later rounds of this run: the checkpoints here are those of an old backup",
        "restore newer checkpoints of the run and resume it; without them, export this run or start again under another name",
    ),
)


def too_few(task: Task, record: RoundRecord, federation: Federation) -> RunFailed:
    """The error of a round that stayed below its quorum, with the cause if the sites' answers identify one.

    Args:
        record: of its last attempt.
    """
    answers = {record.missing.get(site, "") for site in record.asked}
    cause = next((c for c in _CAUSES if answers and answers <= c.codes), None)
    who = ", ".join(f"{site}: {code}" for site, code in record.missing.items())
    text = (
        f"round {task.round}: {len(record.sites)} of {federation.min_sites} sites delivered in {federation.round_attempts} "
        f"attempts{f'; {cause.meaning}' if cause else ''}{f' ({who})' if who else ''}"
    )
    return RunFailed(text, hint=cause.hint if cause else _ways_out(record.missing), code="quorum")


def _ways_out(missing: Mapping[str, str]) -> str:
    """What each answer asks for; of sites that were away, that they come back."""
    known = [code for code in dict.fromkeys(missing.values()) if code in CURES and code not in _GOES_ON]
    acts = [f"{code}: {CURES[code][0]}; {CURES[code][1]}" for code in known]
    if not acts:
        return "nothing is lost; bring the sites back and resume the run"
    back = ["bring the others back"] if any(code in _GOES_ON for code in missing.values()) else []
    return f"nothing is lost; {'. '.join([*acts, *back])}. Then resume the run, or start the changed plan under another name"
