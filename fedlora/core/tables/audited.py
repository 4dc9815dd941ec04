"""What a leakage audit of a run found: ``audit.json``, and the same in ``fedlora_run.json``. FORMAT.md, 16."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from fedlora.core.plan import Digest
from fedlora.core.records import Count, Filed, Record
from fedlora.core.tables.audit import Score

NAME: Final = "audit.json"
Bits = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1)]


class Stratum(Record):
    """Guesses about the canaries with one number of repeats, of all sites together."""

    repeats: Annotated[int, Field(ge=1)]
    canaries: Count
    guesses: Count
    right: Count
    bound: Annotated[float, Field(ge=0)]
    """epsilon is not below this, at the audit's confidence in all strata together"""
    largest: Annotated[float, Field(ge=0)]
    """the bound if every guess had been right: this stratum could have shown no more"""


class MeasuredStratum(Record):
    """What only a simulation can measure, which has the canaries of all sites at hand."""

    repeats: Annotated[int, Field(ge=1)]
    members: Count
    """canaries that were trained on"""
    others: Count
    """canaries that were not"""
    auc: Rate
    """0.5: this attack failed"""
    tpr_1: Rate
    """share of members found with at most 1 % false alarms"""
    tpr_01: Rate
    """the same with 0.1 %"""
    exposure: Bits | None
    """mean over the members that were tried, bits; null: none was"""
    chance: Bits
    """mean exposure of a secret that was not learned, bits"""
    candidates: Count
    """secrets among which a member's was ranked"""
    tried: Count
    """members that were tried"""
    extracted: Count
    """of these, whose secret the adapter says when it is given the prompt"""
    extracted_base: Count
    """whose secret the base says"""


class AuditRecord(Filed):
    """A leakage audit of one adapter. It is evidence of leakage where high; it is no evidence of safety where low."""

    FORMAT: ClassVar[int] = 1

    format: Literal[1] = 1
    run: str
    """run id"""
    plan: Digest
    """plan digest"""
    adapter: Digest
    """adapter digest: what is said here is said of this adapter alone"""
    sites: Count
    """that planted canaries and guessed"""
    score: Score
    """by what was guessed, as the plan said before the run"""
    confidence: Annotated[float, Field(gt=0, lt=1)]
    """of all strata's bounds together"""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """at which bounds are stated"""
    strata: tuple[Stratum, ...]
    bound: Annotated[float, Field(ge=0)]
    """the largest of the strata's"""
    largest: Annotated[float, Field(ge=0)]
    """the largest bound that this audit could have shown"""
    claimed: Annotated[float, Field(gt=0)] | None
    """epsilon that the plan's [privacy] proves; null: no bound is proven"""
    measured: tuple[MeasuredStratum, ...] | None
    """null: not a simulation"""
    verdict: Literal["failed", "not-auditable", "nothing-found"]
    """``failed``: leakage was found that stops the adapter; ``not-auditable``: too few guesses to show anything;
    ``nothing-found``: neither, which is no evidence of safety"""
    reasons: tuple[str, ...]
    """why it failed or could not be audited, in sentences"""
    said: tuple[str, ...]
    """the whole in sentences, the same wherever it is said"""


class Opening(Filed):
    """What a site shows of its canaries when a coordinator doubts: all of them follow from the seed, and none is a row of its."""

    FORMAT: ClassVar[int] = 1

    format: Literal[1] = 1
    run: str
    """run id"""
    plan: Digest
    """plan digest"""
    site: str
    seed: Digest
    """32 bytes, hex"""
    nonce: Digest
    """32 bytes, hex"""
