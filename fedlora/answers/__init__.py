"""What each command answers under ``--json``: the field ``data`` of its envelope. FORMAT.md, section 11.6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from fedlora.answers import enrollment, keeping
from fedlora.core.claims import PrivacyClaim
from fedlora.core.deployment.status import Asked, ServerStatus
from fedlora.core.records import Proof, Results
from fedlora.core.sites import facts as sites
from fedlora.core.tables.lab import Compared, ComparedRules, SiteRows

ENVELOPE = 1
"""Version of the envelope: the field ``fedlora``."""

_exact = with_config(ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False))


@_exact
class Failure(TypedDict):
    """Why a command could not do its work: the field ``error`` of its envelope."""

    code: str
    """error code, or ``usage``, ``os``, ``bug``, ``not-installed`` or ``interrupted``"""
    message: str
    hint: str
    """the way out; may be empty"""


@_exact
class Version(TypedDict):
    fedlora: str
    flwr: str


@_exact
class Sample(TypedDict):
    text: str
    """the file, TOML"""


@_exact
class Explained(TypedDict):
    code: str
    meaning: str
    cure: str


@_exact
class Explanations(TypedDict):
    codes: list[Explained]


@_exact
class Guides(TypedDict):
    guides: list[str]
    text: str | None
    out: str | None


@_exact
class Schema(TypedDict):
    names: list[str]
    """what there is a schema of"""
    schema: Mapping[str, Any] | None
    """the one that was asked for, JSON Schema 2020-12; null if none was"""


@_exact
class SiteKeys(TypedDict):
    public: str
    """path of what goes to the coordinator"""
    fingerprint: str


@_exact
class ServerKeys(TypedDict):
    home: str
    fingerprint: str


@_exact
class Survives(TypedDict):
    """How many absences a round under secure aggregation survives."""

    sites: int
    stay: int
    """sites that must stay until the end"""
    lost: int
    """sites that may drop out during a round"""
    away: int
    """sites that may be absent from it"""
    left_out: int
    """most present sites that one absent site excludes from a round"""


@_exact
class Forecast(TypedDict):
    """One round at a site on its device."""

    device: str
    checkpointing: str
    """what activation checkpointing recomputes"""
    micro_batch_tokens: int
    """tokens computed at once; 0: the plan's own batches"""
    peak_bytes: int
    beside_bytes: int
    """most memory for a round's adapters beside base, gradients and moments"""
    step_tokens: float
    steps: int
    token_s: float
    """seconds of a step for each of its tokens"""
    train_s: float
    evaluate_s: float


@_exact
class Place(TypedDict):
    file: str
    """its name; empty if there is a single file"""
    line: int


@_exact
class Identifiers(TypedDict):
    """What looks like one kind of identifier of a person: counts and places, never the text."""

    kind: str
    count: int
    rows: int
    places: list[Place]
    """of the first twenty rows"""


@_exact
class PlanBudget(TypedDict):
    """A plan beside the privacy budget of a site's population, in epsilon; null where it is infinite."""

    budget_epsilon: float
    spent: float | None
    """by what may have been released, or is set aside for other runs"""
    after: float | None
    """with this plan, if it runs to its end"""
    own_noise: float | None
    """the same, if no noise is counted but this site's"""
    fits: bool


@_exact
class Checked(TypedDict):
    digest: str
    """plan digest"""
    rounds: int
    pinned: bool
    survives: NotRequired[list[Survives]]
    """only under secure aggregation"""
    sites: NotRequired[list[SiteRows]]
    """only of a plan for a simulation"""
    round: NotRequired[Forecast]
    """only with --site"""
    proof: NotRequired[Proof]
    """what was found out about the base here; only with --site"""
    identifiers: NotRequired[list[Identifiers]]
    """only with --identifiers"""
    privacy: NotRequired[PrivacyClaim]
    """only of a plan with [privacy] whose noise is known"""
    budget: NotRequired[PlanBudget]
    """only of such a plan with --site"""


@_exact
class Pinned(TypedDict):
    plan: str
    """plan digest"""
    base: str
    """base digest"""
    init: str
    """adapter digest of the first adapter"""
    proof: Proof
    """what was found out about the base"""
    privacy: PrivacyClaim | None
    """null: a plan without [privacy]"""


@_exact
class Simulated(TypedDict):
    out: str
    """path"""
    results: list[Results]
    """of each seed"""
    compared: NotRequired[Compared]
    """only with several values in --set"""


@_exact
class Reported(TypedDict):
    report: str
    """path of the page"""
    figures: list[str]
    """paths"""


@_exact
class Exported(TypedDict):
    out: str
    """path"""
    signed_by: str | None
    """fingerprint of the server that has signed it; null: nobody has"""
    unknown: list[str]
    """fields of ``prompt`` that fedlora_run.json does not know; ``prompt``: whether it is asked in chats or in plain text"""
    rounds: int | None
    """after which the adapter was; null for a site's own"""
    complete: bool | None
    """whether these are all rounds of the plan; null for a site's own"""


@_exact
class Verified(TypedDict):
    """A published directory is what its server has signed."""

    fingerprint: str
    """of the server"""
    files: list[str]
    trained: Mapping[str, Any]
    """the fields of its fedlora_run.json, in the version that stood there"""


@_exact
class Inspected(TypedDict):
    kind: Literal["adapter", "envelope", "update", "task", "journal entry", "plan", "roster", "results", "published run", "JSON"]
    facts: Mapping[str, Any]
    """names and sizes, never values; which, depends on the kind"""


@_exact
class ServerUp(TypedDict):
    home: str
    """of the server that was stopped"""


@_exact
class SiteUp(TypedDict):
    file: str
    """of the site that was stopped"""


@_exact
class RunDone(TypedDict):
    run: str
    """the run's directory"""
    rounds: int
    partial_rounds: list[int]
    """rounds without some site"""


@_exact
class Approved(TypedDict):
    plan: str
    """plan digest"""
    asks: Mapping[str, str]
    """topic -> sentence"""
    last: Mapping[str, str]
    """the same of the plan that was approved before"""
    changed: list[str]
    refusals: list[str]
    begun: int
    """runs of the plan that this site has taken part in"""
    uncovers: list[str]
    """sites that people have agreed to uncover by this plan"""
    before: list[str]
    """what this site has given on this base model, as far as it matters, in sentences"""
    uncovered: list[str] | None
    """sites whose update it could show beside what was given before; null if no roster is known yet"""
    approved: int
    """runs of the plan that are approved now"""


@_exact
class Coordinator(TypedDict):
    name: str
    signature: Literal["signed", "NOT VALID", "-"]
    fingerprint: str


@_exact
class RosterSite(TypedDict):
    name: str
    status: Literal["active", "revoked"]
    group: int | None
    fingerprint: str


@_exact
class RosterFacts(TypedDict):
    epoch: int
    digest: str
    previous: str
    fed: str
    valid_from: str
    """YYYY-MM-DD HH:MM UTC"""
    valid_until: str
    state: Literal["in force", "not in force yet", "expired"]
    min_version: str
    max_colluding: int
    min_cohort: int
    needed: int
    """signatures that are needed"""
    signatures: int
    """valid ones"""
    server: str
    """fingerprint"""
    coordinators: list[Coordinator]
    waiting: list[str]
    """sites that wait for a group"""
    sitting_out: list[str]
    """sites of a group of which one was revoked"""
    sites: list[RosterSite]


ANSWERS: Mapping[str, type[Any]] = {
    "version": Version,
    "schema": Schema,
    "explain": Explanations,
    "docs": Guides,
    "new plan": Sample,
    "new site": Sample,
    "new simulation": Sample,
    "keygen site": SiteKeys,
    "server init": ServerKeys,
    "check": Checked,
    "pin": Pinned,
    "simulate": Simulated,
    "compare": Compared,
    "compare-rules": ComparedRules,
    "report": Reported,
    "export": Exported,
    "verify": Verified,
    "inspect": Inspected,
    "server up": ServerUp,
    "server start": RunDone,
    "server pull": Exported,
    "server attach": RunDone,
    "server status": ServerStatus,
    "server watch": ServerStatus,
    "server stop": Asked,
    "server pause": Asked,
    "server resume": Asked,
    "site up": SiteUp,
    "site approve": Approved,
    "site pull": Exported,
    **sites.ANSWERS,
    **enrollment.ANSWERS,
    **keeping.ANSWERS,
    "roster new": RosterFacts,
    "roster add": RosterFacts,
    "roster revoke": RosterFacts,
    "roster sign": RosterFacts,
    "roster show": RosterFacts,
}
"""Command -> the type of ``data``. A test compares the names with the commands that there are."""
