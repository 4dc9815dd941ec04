"""What is written about a run: a round's record, a simulation's results, the proof of a base.

Values only. FORMAT.md, section 11, specifies the files; :mod:`fedlora.formats.records` writes and reads them. A field is never
left out and never added: one more is another format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedlora.core.messages import Kind
from fedlora.core.plan import Digest

Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """A value that a program writes and another reads: frozen, its types exact, no field that is not listed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Filed(Record):
    """A record that is a file, or a line of one. ``FORMAT`` is what its field ``format`` says."""

    FORMAT: ClassVar[int]


# --- a round ----------------------------------------------------------------------------------------------------


class Numbers(Record):
    """What is known of a site, or of all sites together, in one round."""

    weight: Count | None
    """what it weighs in the mean; 0 in an evaluation; null if only the weight of all together is known"""
    metrics: Mapping[str, float]
    """the numbers that the plan shares, by name"""


class Bytes(Record):
    """Bytes of request and reply bodies, by site, over all attempts of the round."""

    down: Mapping[str, Count]
    """to the site"""
    up: Mapping[str, Count]
    """from the site"""


class Seconds(Record):
    """Wall time, seconds."""

    round: Annotated[float, Field(ge=0)]
    """of the attempt that counted: from the first request to the last reply"""
    aggregate: Annotated[float, Field(ge=0)]
    """from the last reply to the next adapter; 0 if there is none"""


class Outcome(Record):
    """The result of a round of training."""

    weight: Count
    """of all sites together; 0 if the round is void"""
    adapter: Digest
    """adapter digest of the global adapter after the round"""
    rule: Mapping[str, float]
    """the rule's own numbers, by name (server/RULES.md)"""


class RoundRecord(Filed):
    """One attempt of a round, or the last evaluation: who was asked, who counted, who did not and why, at what cost."""

    FORMAT: ClassVar[int] = 1

    format: Literal[1] = 1
    kind: Kind
    """``train``, or ``evaluate`` for the last evaluation"""
    round: Annotated[int, Field(ge=1)]
    """1 .. num_rounds; one more for the last evaluation"""
    attempt: Count
    """0 for the first attempt of the round"""
    asked: tuple[str, ...]
    """sites that got a request, sorted"""
    sites: Mapping[str, Numbers]
    """sites that counted"""
    missing: Mapping[str, str]
    """sites that did not -> an error code, ``late``, ``offline`` or ``not-drawn``"""
    together: Numbers | None
    """numbers of the rows of all sites that counted, as if they were one site's; null if none did"""
    majority: Mapping[str, float]
    """the site with more than half of the weight -> its share; empty if there is none or single weights are not known"""
    partial: bool
    """whether a site that belongs to the federation, and was drawn, did not count"""
    void: str | None
    """error code that ended the round without an update; null if it was not void"""
    bytes: Bytes
    seconds: Seconds
    outcome: Outcome | None
    """null in an evaluation, and in an attempt with too few sites"""

    @property
    def measured_by(self) -> str:
        """Whose rows the loss over all is of, if fewer sites have measured it than counted: `` (of 1 of 3 sites)``.

        Empty if all have, or, under secure aggregation, if nobody knows.
        """
        have = sum("eval/nll" in numbers.metrics for numbers in self.sites.values())
        return f" (of {have} of {len(self.sites)} sites)" if 0 < have < len(self.sites) else ""


# --- a simulation ---------------------------------------------------------------------------------------------------


class Score(Record):
    """How an adapter does on one site's rows."""

    nll: float | None
    """nats per supervised token, each token weighing the same"""
    exact_match: float | None
    """share of examples whose every supervised token is the most likely one"""
    coarse_match: float | None
    """share whose first characters are right; null if not asked for"""
    tokens: Count
    """supervised tokens"""
    examples: Count


class General(Record):
    """How an adapter does on the general hold-out."""

    nll: float | None


class ArmSeconds(Record):
    """Wall time of an arm, seconds."""

    train: float
    """of the whole arm, without its scores"""
    steps: float | None
    """of training steps alone; 0 where other processes trained; null in an arm without federation"""
    evaluate: float
    """of its scores"""


class ArmRecord(Filed):
    """One arm of a simulation: what it cost, and how its adapter does on every site's rows."""

    FORMAT: ClassVar[int] = 1

    format: Literal[1] = 1
    sites: Mapping[str, Score]
    general: General | None
    """null without a general hold-out"""
    tokens: Count
    """supervised tokens that were trained on; 0 if the plan does not count them"""
    steps: Count | None
    """optimizer steps; null if sites differ"""
    learning_rate: float | None
    """null if nothing was trained"""
    seconds: ArmSeconds


class Traffic(Record):
    """Bytes of a whole federation."""

    up: Count
    """from the sites"""
    down: Count
    """to the sites"""
    base: Count
    """of the base model as it lies in memory"""
    adapter: Count
    """of the adapter as float32"""


class Results(Filed):
    """One seed of a simulation."""

    FORMAT: ClassVar[int] = 2

    format: Literal[2] = 2
    name: str
    """the plan's run.name"""
    seed: Count
    plan: str
    """plan digest"""
    split: str
    """the rows that were scored: ``validation`` or ``test``"""
    sites: tuple[str, ...]
    arms: Mapping[str, ArmRecord]
    """``base``, ``local:SITE``, ``federated``, ``personal:SITE``, ``pooled-steps``, ``pooled-tokens``"""
    rounds: tuple[RoundRecord, ...]
    """of the arm ``federated``: its rounds, then its last evaluation; empty without that arm"""
    traffic: Traffic | None
    """of the arm ``federated``; null without it"""
    seconds: Mapping[str, float]
    """phase -> wall time, seconds"""
    environment: Mapping[str, str | int]
    """day, versions, commit if known, and the machine"""
    dataset: Mapping[str, Any] | None
    """``dataset.json`` of the data as it is; null without one"""


# --- a base --------------------------------------------------------------------------------------------------------


class Check(Record):
    """Something that was tried on a base, on one machine."""

    name: Literal["ids", "length", "neighbors", "alone", "ranks", "gradients", "quantization", "export", "merge"]
    verdict: Literal["right", "adapted", "wrong"]
    """``adapted``: it works in another way than asked, which ``found`` names"""
    found: str
    """what was found, in a sentence"""
    way_out: str
    """what to do; empty unless it is wrong"""


class Proof(Filed):
    """``proof.json``, beside a pinned plan: what its coordinator's machine found out about the base."""

    FORMAT: ClassVar[int] = 1

    format: Literal[1] = 1
    plan: Digest
    """plan digest"""
    base: Digest
    """base digest"""
    machine: str
    """device, versions and attention with which it was tried"""
    checks: tuple[Check, ...]
