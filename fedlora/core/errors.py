"""Everything that can go wrong in the world, each case with a name.

An error has a ``code``, which may leave the site, and a text, which may not: the text can quote a path, a
tensor name or a setting. A programmer's mistake is a ``ValueError``; what is here is the world's.

    FedLoRAError                                   exit status
    +- ConfigError DataError ...                   3   the file, the data or the set-up must be changed
    +- ConnectionFailed UnknownSite Roster... ...  4   connection, enrolment
    +- PlanRefused WrongBase VersionUnsupported    5   refused by policy, or incompatible
    +- QuorumNotReached                            6   too few sites before the deadline
    +- ResourceError                               7   memory, disk
    +- RunFailed ...                               1   everything else
"""

from __future__ import annotations


class FedLoRAError(Exception):
    """Base of every named error.

    Args:
        message: what was found and what was expected. Stays on this machine.
        hint: what to do next. Stays on this machine.
    """

    code = "error"
    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


# --- 3: the set-up ---------------------------------------------------------------------------------------------


class ConfigError(FedLoRAError):
    """A plan, site or server file is wrong, or two of its choices do not fit together."""

    code = "config"
    exit_status = 3


class DataError(FedLoRAError):
    """Site data cannot be used. The text names line numbers and reasons, never contents."""

    code = "data"
    exit_status = 3


class ModelError(FedLoRAError):
    """A base model or adapter on disk cannot be used."""

    code = "model"
    exit_status = 3


class KeyFileError(FedLoRAError):
    """A key file is missing, malformed or readable by others."""

    code = "key-file"
    exit_status = 3


class NotInstalled(FedLoRAError):
    """A part of FedLoRA needs packages of an extra that is not installed here."""

    code = "not-installed"
    exit_status = 3

    def __init__(self, module: str, *, extra: str, what: str) -> None:
        super().__init__(f"{module} is not installed; {what} need it", hint=f"pip install 'fedlora[{extra}]'")


# --- 4: connection and enrolment --------------------------------------------------------------------------------


class ConnectionFailed(FedLoRAError):
    """The other side, or a process of ours, cannot be reached."""

    code = "connection"
    exit_status = 4


# --- 5: refused ---------------------------------------------------------------------------------------------


class PlanRefused(FedLoRAError):
    """This site's policy does not allow what the plan asks."""

    code = "plan-refused"
    exit_status = 5


class ImpossibleAdapter(FedLoRAError):
    """The published adapter has moved further than the sums of this plan's rounds can have moved it."""

    code = "impossible-adapter"
    exit_status = 5


class PlanNotApproved(FedLoRAError):
    """No person at this site has approved this plan."""

    code = "plan-not-approved"
    exit_status = 5


class RunNotApproved(PlanNotApproved):
    """The plan was approved, but for fewer runs than this one makes."""

    code = "run-not-approved"


class WrongBase(FedLoRAError):
    """The base model here differs from the one the plan pins by content."""

    code = "wrong-base"
    exit_status = 5


class VersionUnsupported(FedLoRAError):
    """The other side speaks a format version that this one does not."""

    code = "version-unsupported"
    exit_status = 5


# --- 6, 7, 1: the run -----------------------------------------------------------------------------------------


class QuorumNotReached(FedLoRAError):
    """Fewer than ``min_sites`` sites delivered a valid update before the deadline."""

    code = "quorum"
    exit_status = 6


class ResourceError(FedLoRAError):
    """Out of memory or disk."""

    code = "resources"
    exit_status = 7


class RunFailed(FedLoRAError):
    """The run cannot go on."""

    code = "run-failed"


class StoreError(FedLoRAError):
    """A checkpoint, journal or run directory is missing, damaged, there already or another run's."""

    code = "store"
    exit_status = 3


class StateLost(StoreError):
    """What a site must know of the rounds before is gone; going on without it would give other bits than an undisturbed run."""

    code = "state-lost"


class SitsOut(FedLoRAError):
    """The operator of this site has decided that it takes part in this run no more."""

    code = "sits-out"
    exit_status = 5


class Stopped(RunFailed):
    """The server, or the run alone, was stopped in order while the run went on."""

    code = "stopped"


class RemoteError(FedLoRAError):
    """A site answered with an error code instead of an update."""

    code = "remote"

    def __init__(self, site: str, remote_code: str) -> None:
        super().__init__(f"site {site} answered {remote_code!r}", hint="the reason is in that site's own log")
        self.remote_code = remote_code


class UpdateRejected(FedLoRAError):
    """An update opened and parsed, but must not be aggregated."""

    code = "update-rejected"


class NonFiniteUpdate(UpdateRejected):
    """An update holds NaN or infinity."""

    code = "non-finite"


class WeightTooLarge(UpdateRejected):
    """A claimed weight is more than the plan allows: it would outweigh the others."""

    code = "weight-too-large"

    def __init__(self, who: str, claim: int, bound: int) -> None:
        super().__init__(
            f"{who}: a weight of {claim} is claimed, the plan allows {bound}",
            hint="aggregate.max_weight in the plan; 0 stands for what its steps and lengths can use",
        )


# --- bytes: the payload (wire) and the envelope around it (protect) ------------------------------------------------


class WireError(FedLoRAError):
    """An update blob is malformed."""

    code = "wire"


class EnvelopeError(FedLoRAError):
    """An envelope is malformed, forged, replayed or meant for somebody else."""

    code = "envelope"


class MalformedHeader(EnvelopeError):
    """The header is not canonical JSON with exactly the fields of this version."""

    code = "malformed-header"


class Truncated(EnvelopeError):
    """Bytes are missing."""

    code = "truncated"


class Oversized(EnvelopeError):
    """A length exceeds its limit; nothing was allocated."""

    code = "oversized"


class TrailingBytes(EnvelopeError):
    """Bytes follow the end."""

    code = "trailing-bytes"


class BadSignature(EnvelopeError):
    """No valid signature by the key that is pinned for the sender."""

    code = "bad-signature"


class SuiteDowngrade(EnvelopeError):
    """A weaker or unknown cipher suite than the federation allows."""

    code = "suite-downgrade"


class UnknownSite(EnvelopeError):
    """The sender is not one of the enrolled sites."""

    code = "unknown-site"
    exit_status = 4


class RevokedSite(EnvelopeError):
    """The site was enrolled once; the roster no longer counts it in."""

    code = "revoked-site"
    exit_status = 4


class RosterInvalid(EnvelopeError):
    """A roster is malformed, not approved, or not signed by enough of the coordinators who have to."""

    code = "roster-invalid"
    exit_status = 4


class RosterRollback(EnvelopeError):
    """A roster that is older than the one in force here, or another one of the same epoch."""

    code = "roster-rollback"
    exit_status = 4


class RosterExpired(EnvelopeError):
    """A roster outside the time for which it was signed, or a clock that is wrong."""

    code = "roster-expired"
    exit_status = 4


class CannotOpen(EnvelopeError):
    """Decryption failed. One text for all causes."""

    code = "cannot-open"


class PayloadMismatch(EnvelopeError):
    """The opened payload does not have the digest or size that the header states."""

    code = "payload-mismatch"


class Replayed(EnvelopeError):
    """A sequence number at or below the highest one seen."""

    code = "replayed"


class Equivocation(EnvelopeError):
    """Two different bodies under one sequence number."""

    code = "equivocation"


class WrongContext(EnvelopeError):
    """The header is about something else than this exchange."""

    code = "wrong-context"


class WrongFederation(WrongContext):
    """Another federation."""

    code = "wrong-federation"


class WrongRun(WrongContext):
    """Another run."""

    code = "wrong-run"


class WrongPlan(WrongContext):
    """Another plan."""

    code = "wrong-plan"


class WrongRound(WrongContext):
    """Another round or attempt."""

    code = "wrong-round"


class WrongDirection(WrongContext):
    """A message of the other direction, or of another phase."""

    code = "wrong-direction"


class WrongRecipient(WrongContext):
    """Not addressed to this key."""

    code = "wrong-recipient"


class WrongGlobal(WrongContext):
    """Another global adapter."""

    code = "wrong-global"


class WrongLayout(WrongContext):
    """Another set of names and shapes."""

    code = "wrong-layout"


# --- secure aggregation: a session of it went wrong -----------------------------------------------------------------


class SessionError(FedLoRAError):
    """Secure aggregation: a message does not fit the session."""

    code = "session"


class CohortTooSmall(SessionError):
    """Fewer sites than the rules demand: the sum would say too much about one of them."""

    code = "cohort-too-small"


class LoneChange(CohortTooSmall):
    """A sum that, beside earlier ones, would show the update of one site or of so few that colluders see the last of them."""

    code = "lone-change"


class SessionSpent(SessionError):
    """This site has given its masked update of the round already; another session of it needs proof that the first ended."""

    code = "session-spent"


class SecretsGone(SessionError):
    """The secrets of this session are not there (any more): this site counts as one that dropped out."""

    code = "secrets-gone"


class BothSecretsRequested(SessionError):
    """Somebody asked for both kinds of share of one site, which would open its update. The session is burnt."""

    code = "both-secrets"


class BadShare(SessionError):
    """A share is not what its dealer has committed to."""

    code = "bad-share"


class DealerLied(SessionError):
    """What a site has dealt is not what it has signed for, and its own signature shows it.

    Args:
        site: the dealer.
    """

    code = "bad-dealer"

    def __init__(self, message: str, *, site: str) -> None:
        super().__init__(message, hint="ask that site whether its copy of FedLoRA is intact")
        self.site = site


class VotesMissing(SessionError):
    """Not enough signed votes for what is asked."""

    code = "votes-missing"


class MetricMissing(SessionError):
    """A metric that every site of the round has to send, or one site's would be known, is not here."""

    code = "metric-missing"


class ComplaintUnanswered(SessionError):
    """A site says that it was dealt what does not open, and the dealer did not show it."""

    code = "complaint-unanswered"
