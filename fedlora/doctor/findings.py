"""A finding: what was looked at, what is amiss, and the fix. And what a list of them means for a command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from fedlora.core.codes import Code, exit_status
from fedlora.core.errors import FedLoRAError
from fedlora.core.sites.facts import SiteFinding
from fedlora.processes.causes import CAUSES, Part

Verdict = Literal["right", "note", "later", "wrong"]

FAULTS: Final[Mapping[str, tuple[str, str]]] = {
    "key-missing": (
        "a key or the authority's certificate is not there",
        "Create keys with `fedlora keygen site`; the coordinator sends ca.crt and server.pub: put all together.",
    ),
    "key-open": (
        "a private key can be read by others",
        "chmod 600 the file that is named.",
    ),
    "bad-key": (
        "a key file is damaged, or holds another kind of key",
        "Restore the file from a backup, or make new keys with `fedlora keygen site` and have them enrolled.",
    ),
    "foreign-key": (
        "`key` is another site's",
        "Set `key` and `name` in the site file to those of one site.",
    ),
    "foreign-node-key": (
        "`node_key` is another site's",
        "Set `node_key` in the site file to the key that was made together with `key`.",
    ),
    "state-not-writable": (
        "the state directory cannot be written",
        "Correct `state` in the site file, or who may write there.",
    ),
    "disk-low": (
        "the disk is nearly full",
        "Make room: each round keeps an update there.",
    ),
    "has-left": (
        "somebody here has said that this site leaves the federation",
        "To come back, join with a new line from the coordinator: `fedlora site join` makes new keys.",
    ),
    "in-use": (
        "another process works in the state directory",
        "Wait for its end, or stop it: the message has its number.",
    ),
    "port-taken": (
        "`local_port` is another program's",
        "Set `local_port = 0` in the site file (any free one), or stop that program.",
    ),
    "no-approval": (
        "no plan is approved, so that every run is refused",
        "`fedlora site approve PLAN.toml --site SITE.toml` shows what a plan asks for, and approves one run.",
    ),
    "approvals-spent": (
        "every approved run has begun, and a further one was refused",
        "Nothing, if nobody agreed to a further run: it can show a site's update. To allow one more run: "
        "`fedlora site approve PLAN.toml --site SITE.toml --again`.",
    ),
    "plan-unknown": (
        "an approved plan's text is not here: its digest was typed in",
        "`fedlora site approve PLAN.toml --site SITE.toml` keeps the text of the plan that it shows.",
    ),
    "plan-not-approved": (
        "the plan that was named is not approved",
        "`fedlora site approve PLAN.toml --site SITE.toml` shows what it asks for, and approves one run.",
    ),
    "plan-refused": (
        "this site's own policy refuses the plan",
        "The message names the key; change it in the site file, or talk to the coordinator.",
    ),
    "lone-change": (
        "by what this site has given on the plan's base model, it would answer the plan with lone-change",
        "The message names the way out: another base model, the earlier plan again, or `fedlora site approve --uncovers`.",
    ),
    "no-roster": (
        "the plan needs a roster, and none is approved",
        "Set `roster` in the site file to the digest that the coordinators read to you from `fedlora roster show`.",
    ),
    "roster-expired": (
        "the roster in force here has ended",
        "The coordinators sign the next epoch, which comes with a run's first task; check this machine's clock.",
    ),
    "other-roster": (
        "the roster in force here is not the one that the site file names",
        "Read both digests to the coordinators over the telephone, then correct `roster` in the site file.",
    ),
    "bad-roster": (
        "the roster that was in force here cannot be read",
        "`fedlora site repair SITE.TOML` names the file and the choices.",
    ),
    "no-base": (
        "a base model is not there",
        "Correct [models] in the site file, or copy the base model there.",
    ),
    "wrong-base": (
        "the base model here is not the one that the plan pins",
        "Compare weights, tokenizer and chat template with the coordinator's; `fedlora pin` prints each.",
    ),
    "bad-base": (
        "the base model cannot be used",
        "The message says which check failed; copy the base model there again, all files of it.",
    ),
    "no-data": (
        "a data file is missing, unreadable or empty",
        "Correct [data] in the site file; the user that runs this must be able to read it.",
    ),
    "bad-data": (
        "the rows cannot be used",
        "The message names file and lines, never a value; correct [data] in the site file, or the rows.",
    ),
    "rows-dropped": (
        "some rows are left out",
        "Correct these rows, if they should count.",
    ),
    "no-group-key": (
        "rows of one patient may be trained on and evaluated on",
        "Set data.group_key to the column that says whose row it is.",
    ),
    "held-out-larger": (
        "more rows are held out than was asked for",
        "Remove repeated rows, or name rows for evaluation in data.held_out_path.",
    ),
    "few-held-out": (
        "so few rows are held out that their evaluation leaves as zeros",
        "More rows, a larger data.held_out_fraction, or a smaller policy.min_cell; this site trains all the same.",
    ),
    "gpu-unused": (
        "this machine has a GPU, and torch does not find it",
        "`nvidia-smi` says whether the driver works; torch has to be built for CUDA; a container may have lost its GPU.",
    ),
    "small-shm": (
        "GPUs that train together have little memory to share",
        "Start the container with --shm-size=1g, or set gpus = 1 in the site file.",
    ),
    "no-training": (
        "the packages for training are not installed",
        "Install the extra that the message names.",
    ),
    "step-failed": (
        "the training step did not work",
        "The message says what failed; correct it, then run `fedlora site doctor` again.",
    ),
    "too-slow": (
        "a round takes longer than the plan's deadline",
        "Ask the coordinator for a longer round_deadline or fewer local_steps in the plan.",
    ),
}
"""Name of a fault -> what it means and what to do, for `fedlora explain`; a test seeds each. Beside them stand the causes of
:data:`fedlora.processes.causes.CAUSES`."""


@dataclass(frozen=True, slots=True)
class Found:
    """One finding.

    Attributes:
        part: what was looked at.
        name: of the fault, in :data:`FAULTS` or the table of causes; empty if nothing is amiss.
        verdict: right; note: it works, and somebody should know; later: it may go away by itself, and is tried again; wrong:
            somebody has to act.
        why: what was found, in a sentence without any row's contents.
        fix: what to do.
        code: with which a command ends that cannot go on.
        numbers: counts by name.
    """

    part: Part
    name: str
    verdict: Verdict
    why: str
    fix: str = ""
    code: Code = "config"
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name and self.name not in FAULTS and self.name not in CAUSES:
            raise ValueError(f"{self.name!r} is no fault of the tables")

    @classmethod
    def right(cls, part: Part, why: str, **numbers: float) -> Found:
        return cls(part, "", "right", why, numbers=numbers)

    @classmethod
    def of(cls, part: Part, name: str, error: FedLoRAError, *, verdict: Verdict = "wrong") -> Found:
        """What an error says."""
        return cls(part, name, verdict, str(error), error.hint, error.code)

    @classmethod
    def caused(cls, name: str, facts: Mapping[str, str]) -> Found:
        """A cause of the table by which `site up` explains itself."""
        cause = CAUSES[name]
        code: Code = {"accepted": "unknown-site", "process": "local-port"}.get(cause.part, "connection")  # type: ignore[assignment]
        return cls(cause.part, name, "wrong" if cause.lasts else "later", cause.sentence(facts), cause.remedy(facts), code)

    def lasting(self, *, sample: str = "") -> Found:
        """The same as a fault that does not go away by itself.

        Args:
            sample: key of the site file that still has the sample's value; empty: the finding stays as it is.
        """
        if not sample or self.verdict != "later":
            return self
        fix = f"{sample} in the site file is still the sample's: set it. {self.fix[:1].upper()}{self.fix[1:]}"
        return replace(self, verdict="wrong", fix=fix)

    @property
    def status(self) -> int:
        """Exit status of a command that cannot go on."""
        return exit_status(self.code) if self.verdict in ("later", "wrong") else 0

    def error(self) -> FedLoRAError:
        """The error with which a command ends that cannot go on."""
        return FedLoRAError(self.why, hint=self.fix, code=self.code)

    def facts(self) -> SiteFinding:
        """For a program, and for the screen."""
        said = f"{self.why}; {self.fix}" if self.fix else self.why
        return SiteFinding(
            part=self.part, name=self.name, verdict=self.verdict, why=self.why, fix=self.fix, said=said, status=self.status,
            numbers=dict(self.numbers),
        )  # fmt: skip

    def lines(self) -> list[str]:
        """For people: the finding, and its fix in a line of its own."""
        fault = f" [{self.name}]" if self.name else ""
        return [f"  {self.verdict:5}  {self.part:8}  {self.why}{fault}", *([f"  {'':5}  {'':8}  {self.fix}"] if self.fix else [])]


def worst(found: Iterable[Found]) -> Found | None:
    """The finding by which a command ends: the first that is wrong, else the first that may go away; None: it may go on."""
    kept = list(found)
    return next((f for v in ("wrong", "later") for f in kept if f.verdict == v), None)
