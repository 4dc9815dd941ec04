"""What the commands answer with which a server is kept: its log, its backups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from fedlora.core.tables.audited import AuditRecord

_exact = with_config(ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False))


@_exact
class Finding(TypedDict):
    """Something that is not as it was written."""

    file: str
    what: str
    choices: list[str]
    """options of the command, each with its cost"""
    wrong: bool
    """false if it mends itself"""
    run: str
    """run id, or empty"""


@_exact
class Repaired(TypedDict):
    done: list[str]
    """what was changed, in sentences"""
    wrong: bool
    """whether something is wrong still; the exit status is then 1"""
    findings: list[Finding]


@_exact
class AuditLine(TypedDict):
    number: int
    at: int
    """seconds since 1970"""
    what: str
    """FORMAT.md, 11.8, lists them"""
    by: str
    """user of that machine's operating system"""
    facts: Mapping[str, Any]


@_exact
class AuditShown(TypedDict):
    file: str
    lines: list[AuditLine]
    """those that the server's key has signed"""
    wrong: list[str]
    """what is wrong with the log, in sentences"""


@_exact
class AuditVerified(TypedDict):
    file: str
    lines: int
    """signed ones"""
    last: str
    """digest of the last line, hex"""
    wrong: bool
    """whether something is wrong; the exit status is then 1"""
    findings: list[Finding]


@_exact
class BackedUp(TypedDict):
    file: str
    digest: str
    """SHA-256 of the manifest, hex"""
    files: int
    size_bytes: int
    """of the files in it"""
    open: list[str]
    """runs that were not over"""


@_exact
class RestoredRun(TypedDict):
    name: str
    round: int
    """rounds that are done there"""
    said: str
    """what going on with it costs"""


@_exact
class Restored(TypedDict):
    home: str
    digest: str
    files: int
    size_bytes: int
    made: int
    """when the backup was made, seconds since 1970"""
    open: list[RestoredRun]
    """runs that are not over"""


@_exact
class BudgetShown(TypedDict):
    """Epsilon of one population, at one delta; null where it is infinite."""

    population: str
    budget_epsilon: float
    delta: float
    spent: float | None
    """by what may have been released"""
    committed: float | None
    """by that and all that is set aside"""
    own_noise: float | None
    """the same, if no noise is counted but this site's"""
    left: float
    """of the budget, once all that is set aside is spent"""
    reserved: Mapping[str, float | None]
    """run, or plan digest -> epsilon of what is set aside for it, alone"""
    charges: int
    """rounds that were charged"""
    accountant: str


@_exact
class SideScored(TypedDict):
    """One model on the rows of `evaluate`."""

    nll: float
    """nats a token of the answers"""
    exact: int
    """answers that greedy decoding would give"""
    accuracy: float | None
    """share of right labels; this and the next three are null or empty without --labels"""
    macro_f1: float | None
    calibration_error: float | None
    f1: Mapping[str, float | None]
    """of each label; null: it stands in no row and was not said"""
    token_f1: float | None
    """mean over the answers that were written out; this and the next three are null without --generate"""
    rouge_1: float | None
    rouge_2: float | None
    rouge_l: float | None


@_exact
class ShownExample(TypedDict):
    """An example, where --show asked for it."""

    line: int
    prompt: str
    """its end"""
    expected: str
    base: str
    adapter: str


@_exact
class Evaluation(TypedDict):
    """Base and adapter on rows at hand. For this site alone."""

    examples: int
    tokens: int
    """of the answers"""
    base: SideScored
    adapter: SideScored
    nll_change: float
    """the adapter's less the base's"""
    nll_low: float
    """of the change, 95 %"""
    nll_high: float
    groups: int
    """of examples of one patient or customer, or equal ones: what interval and p count"""
    gained: int
    """exact answers of the adapter alone"""
    lost: int
    """of the base alone"""
    p: float
    """of McNemar's exact test"""
    written: int
    """answers that were written out"""
    shown: list[ShownExample]


@_exact
class Personalized(TypedDict):
    """How a site's own adapter was chosen. For this site alone."""

    out: str
    way: Literal["global", "further", "alone"]
    """to which adapter the way goes from the global one: none, further steps here, what this site learns alone"""
    share: float
    """how far along that way; 0: the global adapter"""
    examples: int
    """held-out examples that chose"""
    tried: list[Mapping[str, Any]]
    """candidates, as in personal.json"""
    apart: int
    """held-out examples that neither trained nor chose"""
    before: float | None
    """loss of a token over these under the global adapter, nats; null: there were too few to keep some apart"""
    after: float | None
    """under the chosen one"""
    tokens: int
    """that further training used"""
    steps: int


@_exact
class CameOut(TypedDict):
    """Rows that a model said word by word when it was given their first half."""

    rows: int
    """rows that were tried"""
    found: int
    longest: int
    """longest run of equal tokens"""


@_exact
class RowsAudited(TypedDict):
    """How well a site's own rows can be told from others. For that site alone."""

    run: str
    score: str
    """``ratio`` or ``loss``"""
    members: int
    """rows that were trained on"""
    others: int
    """held-out rows"""
    auc: float
    """0.5: this attack failed"""
    tpr_1: float
    """share of members found with at most 1 % false alarms"""
    tpr_01: float
    """the same with 0.1 %"""
    with_adapter: CameOut
    with_base: CameOut


@_exact
class RunAudited(TypedDict):
    """What a leakage audit of a run found."""

    file: str
    wrong: bool
    """whether it found what stops the adapter; the exit status is then 1"""
    audit: AuditRecord


@_exact
class CanariesOpened(TypedDict):
    """A site shows its canaries of a run."""

    file: str
    """what was written, for the coordinator"""
    run: str
    commitment: str


@_exact
class CanariesChecked(TypedDict):
    """A site's canaries are those that it committed to."""

    site: str
    run: str
    round: int
    """in which its commitment came first"""
    canaries: int
    inside: int
    """of these, trained on"""


ANSWERS: Final[Mapping[str, type[Any]]] = {
    "site repair": Repaired,
    "server repair": Repaired,
    "server audit show": AuditShown,
    "server audit verify": AuditVerified,
    "server backup": BackedUp,
    "server restore": Restored,
    "budget show": BudgetShown,
    "budget reserve": BudgetShown,
    "budget accept-loss": BudgetShown,
    "audit run": RunAudited,
    "audit rows": RowsAudited,
    "evaluate": Evaluation,
    "personalize": Personalized,
    "audit open": CanariesOpened,
    "audit check": CanariesChecked,
}
