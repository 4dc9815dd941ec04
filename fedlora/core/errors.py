"""Everything that can go wrong in the world, each case with a code.

An error has a ``code``, which may leave the site, and a text, which may not: the text can quote a path, a
tensor name or a setting. A programmer's mistake is a ``ValueError``; what is here is the world's.

An error has a class of its own only if some code handles it separately, or if it has a field of its own. All other cases are
codes of the closed set in :mod:`fedlora.core.codes`, given where the error is raised. The code decides a command's exit status.
"""

from __future__ import annotations

from typing import Self

from fedlora.core.codes import Code, exit_status, is_code


def plain(value: object) -> str:
    """``value`` with control, direction-changing and unprintable characters spelled out, also those that end a line: they could
    forge a terminal's output."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


class FedLoRAError(Exception):
    """Base of every named error.

    Args:
        message: what was found and what was expected. Stays on this machine.
        hint: what to do next. Stays on this machine.
        code: which case it is; the class's own by default.

    Raises:
        ValueError: a code that is none.
    """

    code: Code = "error"

    def __init__(self, message: str, *, hint: str = "", code: Code | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if code is not None:
            self.code = _known(code)

    def __init_subclass__(cls) -> None:
        _known(cls.code)

    @property
    def exit_status(self) -> int:
        """With which a command ends."""
        return exit_status(self.code)


def _known(code: str) -> Code:
    if not is_code(code):
        raise ValueError(f"{code!r} is no code of an error: see fedlora/core/codes.py")
    return code


# --- the set-up, and the other side --------------------------------------------------------------------------------


class ConfigError(FedLoRAError):
    """A plan, site or server file is wrong, or two of its choices do not fit together; a port is taken (local-port)."""

    code: Code = "config"


class DataError(FedLoRAError):
    """Site data cannot be used. The text names line numbers and reasons, never contents."""

    code: Code = "data"


class ModelError(FedLoRAError):
    """A base model or adapter on disk cannot be used."""

    code: Code = "model"


class KeyFileError(FedLoRAError):
    """A key file is missing, malformed or readable by others."""

    code: Code = "key-file"


class NotInstalled(FedLoRAError):
    """A part of FedLoRA needs packages of an extra that is not installed here."""

    code: Code = "not-installed"

    def __init__(self, module: str, *, extra: str, what: str) -> None:
        super().__init__(f"{module} is not installed; {what} need it", hint=f"pip install 'fedlora[{extra}]'")


class ConnectionFailed(FedLoRAError):
    """The other side, or a process of ours, cannot be reached; or something is reachable that must not be (exposed)."""

    code: Code = "connection"


class PlanRefused(FedLoRAError):
    """This site does not do what the plan or the server asks.

    policy-...: that key of its policy does not allow it. plan-refused: something else does not.
    plan-not-approved: no person at this site has approved this plan.
    run-not-approved: it was approved, but for fewer runs. sits-out: its operator has taken it out of this run.
    impossible-adapter: the published adapter has moved further than the sums of this plan's rounds can have moved it.
    """

    code: Code = "plan-refused"


class AuditFailed(FedLoRAError):
    """An adapter is not published: its leakage audit is missing, could show nothing, or has found what stops it."""

    code: Code = "audit"


# --- the run -------------------------------------------------------------------------------------------------------


class ResourceError(FedLoRAError):
    """Out of memory or disk."""

    code: Code = "resources"


class RunFailed(FedLoRAError):
    """The run cannot go on.

    quorum: fewer than ``min_sites`` sites delivered a valid update before the deadline. stopped: the server, or the run
    alone, was stopped in order.
    """

    code: Code = "run-failed"


class StoreError(FedLoRAError):
    """A checkpoint, journal or run directory is missing, damaged, there already or another run's."""

    code: Code = "store"


class StateLost(StoreError):
    """A site's state of earlier rounds is gone; continuing without it would give another result than an undisturbed run."""

    code: Code = "state-lost"


class RemoteError(FedLoRAError):
    """A site answered with an error code instead of an update."""

    code: Code = "remote"

    def __init__(self, site: str, remote_code: str) -> None:
        super().__init__(f"site {site} answered {remote_code!r}", hint="look for the reason in that site's own log")
        self.remote_code = remote_code


class UpdateRejected(FedLoRAError):
    """An update opened and parsed, but must not be aggregated."""

    code: Code = "update-rejected"

    @classmethod
    def too_heavy(cls, who: str, claim: int, bound: int) -> Self:
        """weight-too-large: a claimed weight is more than the plan allows: it would outweigh the others."""
        return cls(
            f"{who}: a weight of {claim} is claimed, the plan allows {bound}",
            hint="compare that site's data with aggregate.max_weight in the plan; 0 means the most that a round's steps can use",
            code="weight-too-large",
        )


class NonFiniteUpdate(UpdateRejected):
    """An update holds NaN or infinity."""

    code: Code = "non-finite"


# --- bytes: payload, envelope, roster ------------------------------------------------------------------------------


class WireError(FedLoRAError):
    """Bytes from elsewhere are malformed, or of a version that this one does not read (version-unsupported)."""

    code: Code = "wire"


class EnvelopeError(FedLoRAError):
    """An envelope is malformed, forged, replayed or meant for somebody else. FORMAT.md, section 7, has a code for each condition.

    unknown-site: the sender is not one of the enrolled sites.
    """

    code: Code = "envelope"


class Oversized(EnvelopeError):
    """A length exceeds its limit; nothing was allocated."""

    code: Code = "oversized"


class BadSignature(EnvelopeError):
    """No valid signature by the key that is pinned for the sender."""

    code: Code = "bad-signature"


class CannotOpen(EnvelopeError):
    """Decryption failed. One text for all causes."""

    code: Code = "cannot-open"


class WrongContext(EnvelopeError):
    """Something is about another federation, run, plan, round, base, adapter or layout than this exchange, or not for this
    recipient: the code says which, as ``wrong-plan``."""

    code: Code = "wrong-context"


class RevokedSite(EnvelopeError):
    """The site was enrolled once; the roster no longer counts it in."""

    code: Code = "revoked-site"


class RosterInvalid(EnvelopeError):
    """A roster is malformed, not approved, or not signed by enough of the coordinators who have to."""

    code: Code = "roster-invalid"


class RosterRollback(EnvelopeError):
    """A roster that is older than the one in force here, or another one of the same epoch."""

    code: Code = "roster-rollback"


class RosterExpired(EnvelopeError):
    """A roster outside the time for which it was signed, or a clock that is wrong."""

    code: Code = "roster-expired"


# --- secure aggregation: a session of it went wrong -----------------------------------------------------------------


class SessionError(FedLoRAError):
    """Secure aggregation: a message does not fit the session. FORMAT.md, section 10.9, has a code for each condition.

    session-spent: this site has given its masked update of the round already. secrets-gone: the secrets of the session are not
    there (any more); the site counts as one that dropped out. both-secrets: somebody asked for both kinds of share of one site,
    which would open its update; the session is burnt. votes-missing: not enough signed votes. complaint-unanswered: a
    dealer did not show what it had dealt. dropped-out: a site gave no update to a session that could not end without it.
    """

    code: Code = "session"


class CohortTooSmall(SessionError):
    """Fewer sites than the rules demand: the sum would reveal too much about one of them."""

    code: Code = "cohort-too-small"


class LoneChange(CohortTooSmall):
    """A sum that, alone or beside earlier ones, could reveal an update or an evaluation of one site, or of few of which all but
    one collude."""

    code: Code = "lone-change"


class BadShare(SessionError):
    """A share is not what its dealer has committed to."""

    code: Code = "bad-share"


class DealerLied(SessionError):
    """The shares that a site has dealt do not match what it has signed, and its own signature proves it.

    Args:
        site: the dealer.
    """

    code: Code = "bad-dealer"

    def __init__(self, message: str, *, site: str) -> None:
        super().__init__(message, hint="ask that site whether its copy of FedLoRA is intact")
        self.site = site
