"""Why a run ended without enough sites, and what somebody can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedlora.core.errors import RunFailed, StateLost
from fedlora.core.messages import Task
from fedlora.core.plan import Federation
from fedlora.core.records import RoundRecord
from fedlora.core.sites.cures import CURES, GOES_ON
from fedlora.core.words import duration


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


def too_few(
    task: Task, record: RoundRecord, federation: Federation, *, waited_s: float = 0.0, people: Mapping[str, str] | None = None
) -> RunFailed:
    """The error of a round that stayed below its quorum, with the cause if the sites' answers identify one.

    Args:
        record: of its last attempt.
        waited_s: how long the round has waited for people in vain; 0: its attempts are used up.
        people: the sites that they would have had to bring back, each with its code: the others lack nothing but these.
    """
    answers = {record.missing.get(site, "") for site in record.asked}
    cause = next((c for c in _CAUSES if answers and answers <= c.codes), None)
    who = ", ".join(f"{site}: {code}" for site, code in record.missing.items())
    tried = f"in {federation.round_attempts} attempts" if not waited_s else f"after {duration(waited_s)} of waiting for people"
    text = (
        f"round {task.round}: {len(record.sites)} of {federation.min_sites} sites delivered {tried}"
        f"{f'; {cause.meaning}' if cause else ''}{f' ({who})' if who else ''}"
    )
    return RunFailed(text, hint=cause.hint if cause else _ways_out(people or record.missing), code="quorum")


def _ways_out(missing: Mapping[str, str]) -> str:
    """What each answer asks for; of sites that were away, that they come back."""
    known = [code for code in dict.fromkeys(missing.values()) if code in CURES and code not in GOES_ON]
    acts = [f"{code}: {CURES[code][0]}; {CURES[code][1]}" for code in known]
    if not acts:
        return "nothing is lost; bring the sites back and resume the run"
    back = ["bring the others back"] if any(code in GOES_ON for code in missing.values()) else []
    return f"nothing is lost; {'. '.join([*acts, *back])}. Then resume the run, or start the changed plan under another name"
