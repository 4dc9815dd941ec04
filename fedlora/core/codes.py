"""The codes of errors: one closed set. A code may leave the site, a text may not; scripts read the exit status.

A code that is not here does not pass the type checker, and :class:`fedlora.core.errors.FedLoRAError` refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeGuard, get_args

SetUp = Literal["config", "data", "held", "key-file", "local-port", "model", "not-installed", "state-lost", "store"]
"""3: a file, the data or the set-up has to be changed."""

Connection = Literal[
    "connection", "exposed", "revoked-site", "roster-expired", "roster-invalid", "roster-rollback", "unknown-site", "wrong-secret"
]
"""4: connection and enrollment."""

Refused = Literal[
    "audit",
    "budget",
    "impossible-adapter",
    "plan-not-approved",
    "plan-refused",
    "run-not-approved",
    "sits-out",
    "version-unsupported",
    "wrong-base",
]
"""5: refused by a site, or incompatible."""

Policy = Literal[
    "policy-allowed-models",
    "policy-init",
    "policy-lone-change",
    "policy-max-canary-share",
    "policy-max-first-range",
    "policy-max-local-steps",
    "policy-max-rounds",
    "policy-max-update-bytes",
    "policy-min-sites",
    "policy-protect",
    "policy-share",
]
"""5: the key of a site's [policy] that refuses a plan. The key's name leaves, never its value; rows have no part in it."""

REFUSES: Final[Mapping[str, str]] = {
    "policy-allowed-models": "model.model_name_or_path",
    "policy-init": "lora.init",
    "policy-lone-change": "protect.secagg.lone_change",
    "policy-max-canary-share": "audit.max_rows_share",
    "policy-max-first-range": "protect.secagg.first_range",
    "policy-max-local-steps": "federation.local_steps",
    "policy-max-rounds": "federation.num_rounds",
    "policy-max-update-bytes": "lora.r",
    "policy-min-sites": "federation.min_sites",
    "policy-protect": "protect.mode",
    "policy-share": "evaluation.share",
}
"""Each of :data:`Policy` -> the key of a plan that it bounds."""

Quorum = Literal["quorum"]
"""6: too few sites before the deadline."""

Resources = Literal["resources"]
"""7: memory, disk."""

Run = Literal["error", "internal", "remote", "run-failed", "stopped"]
Bytes = Literal[
    "bad-signature",
    "cannot-open",
    "envelope",
    "equivocation",
    "malformed-header",
    "oversized",
    "payload-mismatch",
    "replayed",
    "suite-downgrade",
    "trailing-bytes",
    "truncated",
    "wire",
    "wrong-context",
    "wrong-direction",
    "wrong-federation",
    "wrong-global",
    "wrong-layout",
    "wrong-plan",
    "wrong-recipient",
    "wrong-round",
    "wrong-run",
]
"""FORMAT.md, section 7, says when each is due."""
Updates = Literal["non-finite", "update-rejected", "weight-too-large"]
Sessions = Literal[
    "bad-dealer",
    "bad-share",
    "both-secrets",
    "cohort-too-small",
    "complaint-unanswered",
    "dropped-out",
    "lone-change",
    "secrets-gone",
    "session",
    "session-spent",
    "votes-missing",
]
"""FORMAT.md, section 10.9, says when each is due."""

Code = Literal[SetUp, Connection, Refused, Policy, Quorum, Resources, Run, Bytes, Updates, Sessions]
CODES: Final = frozenset[str](get_args(Code))

_STATUS: Final = {
    3: get_args(SetUp),
    4: get_args(Connection),
    5: get_args(Refused) + get_args(Policy),
    6: get_args(Quorum),
    7: get_args(Resources),
}


def is_code(text: str) -> TypeGuard[Code]:
    """Whether a text from outside is one of the set."""
    return text in CODES


def policy_key(code: str) -> str:
    """``policy.min_sites`` for ``policy-min-sites``."""
    return "policy." + code.removeprefix("policy-").replace("-", "_")


def exit_status(code: Code) -> int:
    """With which a command ends for it; 1 for all that says nothing of its own."""
    return next((status for status, group in _STATUS.items() if code in group), 1)
